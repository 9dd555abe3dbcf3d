"""The penalised problem on moments: objective, gradient, certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.convex.statistics.moments import Moments, unit_columns
from compress.convex.statistics.sums import as_tensor

_TINY = torch.finfo(torch.float64).tiny
_WORTH_LOOKING = 1e6  # multiplications of a product from which on its zero rows are looked for
_SHORT = 2**18  # multiplications up to which a product of NumPy costs less than one that wakes other threads
_vecdot = getattr(numpy, "vecdot", None)  # from NumPy 2 on; half the price of `einsum` for a few rows


@dataclass(frozen=True, eq=False)
class MultitaskLasso:
    """Minimise over V (K·s, D):  ½‖Ψ − ΦV‖²_F / N  +  λ Σ_k c_k ‖v_k‖_F, v_k the s rows of unit k.

    For an unpenalised intercept pass `moments.centred()`.

    Attributes:
        moments: second moments of Φ (N, K·s) and Ψ (N, D).
        penalty: λ ≥ 0.
        unit_costs: c (K,), strictly positive; the theory's choice is ‖w_k‖ (Shenouda 2024). Default 1.
    """

    moments: Moments
    penalty: float
    unit_costs: Any = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "penalty", float(self.penalty))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`penalty` must be a number, got {self.penalty!r}.") from error
        if not self.penalty >= 0 or self.penalty == float("inf"):
            raise ValueError(f"`penalty` must be finite and not negative, got {self.penalty}.")
        if self.unit_costs is not None:
            costs = as_tensor(self.unit_costs, "unit_costs").detach().to(self.moments.covariance)
            object.__setattr__(self, "unit_costs", costs)
            if tuple(costs.shape) != (self.moments.unit_count,):
                raise ValueError(
                    f"`unit_costs` must have shape ({self.moments.unit_count},), got {tuple(costs.shape)}."
                )
            if not bool((costs > 0).all()) or not bool(torch.isfinite(costs).all()):
                raise ValueError("`unit_costs` must be finite and strictly positive.")

    @cached_property
    def costs(self) -> Tensor:
        """c (K,) in float64, ones by default."""
        if self.unit_costs is None:
            return self.moments.covariance.new_ones(self.moments.unit_count)
        costs: Tensor = self.unit_costs
        return costs

    @property
    def lambda_max(self) -> float:
        """λ_max = max_k ‖H_k‖_F/c_k: from here on V = 0 is optimal."""
        norms = unit_norms(self.moments.cross, self.moments.group_size)
        return float((norms / self.costs).max()) if norms.numel() else 0.0

    def objective(self, coefficients: Tensor) -> float:
        """½‖Ψ − ΦV‖²_F/N + λΣc_k‖v_k‖."""
        return certificate(self, coefficients).objective

    def weighted_norm(self, coefficients: Tensor) -> float:
        """Σc_k‖v_k‖_F."""
        return float((self.costs * unit_norms(coefficients, self.moments.group_size)).sum())

    def correlation(self, coefficients: Tensor) -> Tensor:
        """ΦᵀR/N = H − GV (K·s, D), from the active rows of V alone where that is less work."""
        n, d = coefficients.shape
        if n * n * d > _WORTH_LOOKING:
            active = active_columns(coefficients, self.moments.group_size)
            if 2 * active.numel() <= n:
                rows = self.moments.gram.index_select(0, active)  # G is symmetric, and its rows lie side by side
                return torch.addmm(self.moments.cross, rows.T, coefficients.index_select(0, active), alpha=-1)
        elif coefficients.is_cpu and n * n * d <= _SHORT:
            product = on_host(self.moments.gram) @ on_host(coefficients)
            return torch.from_numpy(on_host(self.moments.cross) - product)
        return torch.addmm(self.moments.cross, self.moments.gram, coefficients, alpha=-1)

    def duality_gap(self, coefficients: Tensor) -> float:
        """Relative duality gap (P(V) − D(θ))/P(V) ≥ (P(V) − min P)/P(V), for any V; see `certificate`."""
        return certificate(self, coefficients).gap

    def residual_energy(self, coefficients: Tensor, correlation: Tensor) -> float:
        """‖Ψ − ΦV‖²_F/N, never negative, from V and its `correlation`."""
        fit = self.moments.energy - inner_product(coefficients, self.moments.cross)
        fit -= inner_product(coefficients, correlation)
        return 0.0 if fit < 0 else fit  # NaN stays NaN


@dataclass(frozen=True)
class Certificate:
    """What a point V is worth, from V and the moments alone.

    Attributes:
        objective: ½‖Ψ − ΦV‖²_F/N + λΣc_k‖v_k‖.
        gap: relative duality gap, `rounding` counted in.
        rounding: the part of it that rounding in the moments may hide; no point is certified below it.
        residual: ‖Ψ − ΦV‖²_F/N.
        active: units (n,) with v_k ≠ 0, sorted.
    """

    objective: float
    gap: float
    rounding: float
    residual: float
    active: Tensor


def certificate(problem: MultitaskLasso, coefficients: Tensor) -> Certificate:
    """Objective and relative duality gap of any V, from (G, H, energy) alone.

    With R = Ψ − ΦV, C = ΦᵀR/N and t = min(1, λ/max_k(‖C_k‖/c_k)), θ = tR is dual feasible and
    P(V) − D(θ) = ½(1 − t)²‖R‖²/N + λΣc_k‖v_k‖ − t⟨V, C⟩, which has no cancellation of large terms.
    Relative to P(V); 0 where P(V) = 0.
    """
    s, costs = problem.moments.group_size, on_host(problem.costs)
    correlation = problem.correlation(coefficients)
    inner = inner_product(coefficients, correlation)
    fit = problem.moments.energy - inner_product(coefficients, problem.moments.cross) - inner
    fit = 0.0 if fit < 0 else fit  # NaN stays NaN
    norms, correlated = norms_on_host(coefficients, s), norms_on_host(correlation, s)
    with numpy.errstate(all="ignore"):
        penalised = problem.penalty * float(costs @ norms)
        ratios = correlated / numpy.maximum(problem.penalty * costs, _TINY)
        largest = float(ratios.max(initial=0.0))  # NaN stays NaN
    objective = fit / 2 + penalised
    gap = dual_gap(fit, penalised, inner, 1 / largest if not largest <= 1 else 1.0)
    rounding = _rounding(problem, norms)
    return Certificate(
        objective=objective,
        gap=relative_gap(max(0.0, gap) + rounding if gap == gap else math.nan, objective),
        rounding=relative_gap(rounding, objective),
        residual=fit,
        active=torch.from_numpy(numpy.flatnonzero(norms > 0)).to(coefficients.device),
    )


Number = TypeVar("Number", float, Tensor)


def dual_gap(fit: Number, penalised: Number, inner: Number, t: Number) -> Number:
    """P(V) − D(θ) = ½(1 − t)²‖R‖²/N + λΣc_k‖v_k‖ − t⟨V, C⟩ at θ = tR; see `certificate`.

    Args:
        fit, penalised, inner: ‖R‖²/N, λΣc_k‖v_k‖, ⟨V, C⟩; of one problem or of many.
        t: min(1, 1/max_k(‖C_k‖/(λc_k))).
    """
    return (1 - t) ** 2 * fit / 2 + penalised - t * inner


def shrink_factor(norms: Tensor, thresholds: Tensor) -> Tensor:
    """max(0, 1 − w/‖z‖): what the proximal operator of w‖·‖ multiplies z by."""
    return torch.where(norms > thresholds, (norms - thresholds) / norms, 0.0)


def rounding_of_gap(problem: MultitaskLasso, coefficients: Tensor) -> float:
    """How far rounding, of float64 or of products in less, may have moved the gap of V, in units of the objective.

    Errors of sums grow with the root of their length (Higham and Mary 2019): C_k is off by a few eps times
    g_k(‖Ψ‖ + ‖(g_j‖v_j‖)_j‖), g_k the root mean square of unit k's features, and by what the rows lost when their
    means were taken away, eps times a mean for each of N rows. That moves ⟨V, C⟩, and the dual point by as much as
    the constraint it breaks.
    """
    return _rounding(problem, norms_on_host(coefficients, problem.moments.group_size))


def _rounding(problem: MultitaskLasso, norms: NDArray[numpy.float64]) -> float:
    moments, costs = problem.moments, on_host(problem.costs)
    sizes, recorded = moments.unit_sizes
    with numpy.errstate(all="ignore"):
        penalised = problem.penalty * float(costs @ norms)
        output = math.sqrt(max(0.0, moments.energy))
        reach = output + _length(sizes * norms)
        lost = min(1.0, 4 / math.sqrt(max(1.0, moments.count)))
        off = sizes * (reach + lost * _length(recorded * norms)) + recorded * (lost * output)  # (K,)
        moved = reach**2 + _length(norms * off)
        if penalised > 0:
            moved += penalised * float((off / costs).max()) / problem.penalty
    return 4 * moments.rounding * moved


def _length(vector: NDArray[numpy.float64]) -> float:
    return math.sqrt(float(vector @ vector))


def relative_gap(gap: float, objective: float) -> float:
    """gap/objective, at most 1 as no objective is below zero; infinite where either is not finite, 0 where P(V) = 0."""
    if not (math.isfinite(gap) and math.isfinite(objective)):
        return math.inf
    return min(1.0, max(0.0, gap) / objective) if objective > 0 else 0.0


def unit_norms(matrix: Tensor, group_size: int) -> Tensor:
    """Frobenius norm (K,) of every unit's s rows of a (K·s, D) matrix."""
    rows = matrix if group_size == 1 else matrix.reshape(matrix.shape[0] // group_size, -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def on_host(values: Tensor) -> NDArray[numpy.float64]:
    """A tensor as a NumPy array, whose calls cost less than those of torch; shares memory on the CPU."""
    array: NDArray[numpy.float64] = values.numpy(force=True)
    return array


def norms_on_host(matrix: Tensor, group_size: int) -> NDArray[numpy.float64]:
    """`unit_norms` as a NumPy array."""
    if not matrix.is_cpu:
        return on_host(unit_norms(matrix, group_size))
    rows = on_host(matrix).reshape(matrix.shape[0] // group_size, group_size * matrix.shape[1])
    return numpy.sqrt(row_products(rows, rows))


def row_products(left: NDArray[numpy.float64], right: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """⟨left_i, right_i⟩ (n,) of the rows of two matrices of one shape."""
    products: NDArray[numpy.float64]
    products = _vecdot(left, right) if _vecdot is not None else numpy.einsum("ij,ij->i", left, right)
    return products


def inner_product(left: Tensor, right: Tensor) -> float:
    """⟨left, right⟩ of two matrices of one shape."""
    if not left.is_cpu:
        return float((left * right).sum())
    return float(numpy.vdot(on_host(left), on_host(right)))


def active_columns(coefficients: Tensor, group_size: int) -> Tensor:
    """Columns (n,) of the units whose rows of V (K·s, D) are not all zero."""
    active = (unit_norms(coefficients, group_size) != 0).nonzero()[:, 0]  # NaN counts as active
    return unit_columns(active, group_size)

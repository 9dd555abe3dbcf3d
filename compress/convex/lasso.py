"""The penalised problem on moments: objective, gradient, certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.convex.statistics.moments import Moments, unit_columns
from compress.convex.statistics.sums import as_tensor


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

    @property
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
        """ΦᵀR/N = H − GV (K·s, D), from the active rows of V alone."""
        active = active_columns(coefficients, self.moments.group_size)
        if 2 * active.numel() > coefficients.shape[0]:
            return self.moments.cross - self.moments.gram @ coefficients
        rows = self.moments.gram.index_select(0, active)  # G is symmetric, and its rows lie side by side
        return torch.addmm(self.moments.cross, rows.T, coefficients.index_select(0, active), alpha=-1)

    def duality_gap(self, coefficients: Tensor) -> float:
        """Relative duality gap (P(V) − D(θ))/P(V) ≥ (P(V) − min P)/P(V), for any V; see `certificate`."""
        return certificate(self, coefficients).gap

    def residual_energy(self, coefficients: Tensor, correlation: Tensor) -> float:
        """‖Ψ − ΦV‖²_F/N, never negative, from V and its `correlation`."""
        fit = self.moments.energy - float((coefficients * (self.moments.cross + correlation)).sum())
        return 0.0 if fit < 0 else fit  # NaN stays NaN


@dataclass(frozen=True)
class Certificate:
    """What a point V is worth, from V and the moments alone.

    Attributes:
        objective: ½‖Ψ − ΦV‖²_F/N + λΣc_k‖v_k‖.
        gap: relative duality gap, `rounding` counted in.
        rounding: the part of it that rounding in the moments may hide; no point is certified below it.
        residual: ‖Ψ − ΦV‖²_F/N.
    """

    objective: float
    gap: float
    rounding: float
    residual: float


def certificate(problem: MultitaskLasso, coefficients: Tensor) -> Certificate:
    """Objective and relative duality gap of any V, from (G, H, energy) alone.

    With R = Ψ − ΦV, C = ΦᵀR/N and t = min(1, λ/max_k(‖C_k‖/c_k)), θ = tR is dual feasible and
    P(V) − D(θ) = ½(1 − t)²‖R‖²/N + λΣc_k‖v_k‖ − t⟨V, C⟩, which has no cancellation of large terms.
    Relative to P(V); 0 where P(V) = 0.
    """
    s = problem.moments.group_size
    correlation = problem.correlation(coefficients)
    fit = problem.residual_energy(coefficients, correlation)
    norms = unit_norms(coefficients, s)
    penalised = problem.penalty * float((problem.costs * norms).sum())
    objective = fit / 2 + penalised
    ratios = unit_norms(correlation, s) / (problem.penalty * problem.costs).clamp_min(torch.finfo(torch.float64).tiny)
    inner = (coefficients * correlation).sum()
    largest = ratios.max() if ratios.numel() else torch.zeros_like(inner)
    gap = float(dual_gap(inner.new_tensor(fit), inner.new_tensor(penalised), inner, largest))
    rounding = rounding_of_gap(problem, coefficients)
    return Certificate(
        objective=objective,
        gap=relative_gap(max(0.0, gap) + rounding if gap == gap else math.nan, objective),
        rounding=relative_gap(rounding, objective),
        residual=fit,
    )


def dual_gap(fit: Tensor, penalised: Tensor, inner: Tensor, largest: Tensor) -> Tensor:
    """P(V) − D(θ) = ½(1 − t)²‖R‖²/N + λΣc_k‖v_k‖ − t⟨V, C⟩ at θ = tR, t = min(1, 1/largest); see `certificate`.

    Args:
        fit, penalised, inner: ‖R‖²/N, λΣc_k‖v_k‖, ⟨V, C⟩; of one problem or of many.
        largest: max_k ‖C_k‖/(λc_k).
    """
    t = 1 / largest.clamp_min(1)
    return (1 - t).square() * fit / 2 + penalised - t * inner


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
    moments = problem.moments
    norms = unit_norms(coefficients, moments.group_size)
    penalised = problem.penalty * float((problem.costs * norms).sum())
    sizes = _unit_sizes(moments.gram.diagonal(), moments.group_size)
    recorded = _unit_sizes(moments.recorded_energy, moments.group_size)
    recorded = torch.where(sizes > 0, torch.maximum(sizes, recorded), 0.0)  # constant units have no part in anything
    output = math.sqrt(max(0.0, moments.energy))
    reach = output + float(torch.linalg.vector_norm(sizes * norms))
    lost = min(1.0, 4 / math.sqrt(max(1.0, moments.count)))
    shift = float(torch.linalg.vector_norm(recorded * norms))
    off = sizes * reach + lost * (recorded * output + sizes * shift)  # (K,)
    moved = reach**2 + float(torch.linalg.vector_norm(norms * off))
    if penalised > 0:
        moved += penalised * float((off / problem.costs).max()) / problem.penalty
    return 4 * moments.rounding * moved


def _unit_sizes(squares: Tensor, group_size: int) -> Tensor:
    return squares.reshape(-1, group_size).sum(1).clamp_min(0).sqrt()


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


def active_columns(coefficients: Tensor, group_size: int) -> Tensor:
    """Columns (n,) of the units whose rows of V (K·s, D) are not all zero."""
    active = (unit_norms(coefficients, group_size) != 0).nonzero()[:, 0]  # NaN counts as active
    return unit_columns(active, group_size)

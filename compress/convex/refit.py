"""Least squares on the second moments: refit after selection, and the error of any output weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex.statistics.factored import FactoredMoments
from compress.convex.statistics.moments import Moments
from compress.errors import MomentsError

RIDGE = 1e-8
"""Default ridge, relative to each column's own second moment: it bounds the condition number by about K·s/RIDGE."""


@dataclass(frozen=True, eq=False)
class Refit:
    """Output weights of the kept units by least squares.

    Attributes:
        coefficients: V_S (|S|·s, D), rows in the order of the units asked for.
        intercept: b (D,), zero without an intercept.
        error: ‖Ψ − Φ_S V_S − 1bᵀ‖_F over ‖Ψ − mean(Ψ)‖_F (over ‖Ψ‖_F without an intercept), on these moments.
        ridge: the relative ridge that was used; larger than asked for only where the factorisation needed it.
    """

    coefficients: Tensor
    intercept: Tensor
    error: float
    ridge: float


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """(C + ridge·I) W = T in unit-scaled columns: C = SGS, T = SH, V = SW, S = diag(1/√G_ii).

    Constant and dead columns are replaced by columns of the identity with T = 0, so they get W = 0 and cost nothing.
    Rescaling a unit changes nothing here.
    """

    gram: Tensor  # (n, n), unit diagonal (+ ridge)
    cross: Tensor  # (n, D)
    scale: Tensor  # (n,) S, zero for constant columns
    energy: float  # of the (centred) outputs
    group_size: int
    ridge: float


def normal_equations(moments: Moments, *, ridge: float = RIDGE, intercept: bool = True) -> NormalEquations:
    """The scaled, ridged normal equations of min ‖Ψ − ΦV − 1bᵀ‖²."""
    fitted = moments.centred() if intercept else moments
    diagonal = fitted.gram.diagonal()
    alive = diagonal > 0
    scale = torch.where(alive, diagonal.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    gram = fitted.gram * scale[:, None]
    gram.mul_(scale)
    gram.diagonal().fill_(1.0 + ridge)
    return NormalEquations(
        gram=gram,
        cross=fitted.cross * scale[:, None],
        scale=scale,
        energy=fitted.energy,
        group_size=moments.group_size,
        ridge=ridge,
    )


def factored(equations: NormalEquations) -> tuple[Tensor, float]:
    """Lower Cholesky factor of the ridged gram and the ridge it needed (×10 until it is positive definite).

    The diagonal of the gram is that of the ridge it needed then.

    Raises:
        MomentsError: the gram is not positive semidefinite; moments of samples always are.
    """
    return factored_with(equations.gram, equations.ridge)


def factored_with(scaled: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of a gram (n, n) of unit diagonal, with `ridge` or more on it; see `factored`.

    The diagonal is written over. Raises MomentsError.
    """
    while True:
        scaled.diagonal().fill_(1.0 + ridge)
        factor, info = torch.linalg.cholesky_ex(scaled)
        if not int(info):
            return factor, ridge
        if ridge >= 1e-3:
            raise MomentsError(
                f"the gram matrix ({scaled.shape[0]} columns) is not positive semidefinite even with a relative ridge "
                f"of {ridge:.0e}: the moments are not those of one set of samples."
            )
        ridge = max(10 * ridge, 1e-15)


def refit(
    moments: Moments | FactoredMoments, units: Tensor | None = None, *, ridge: float = RIDGE, intercept: bool = True
) -> Refit:
    """V_S = argmin ‖Ψ − Φ_S V − 1bᵀ‖²_F/N + ridge·Σ_i G_ii‖v_i‖² for the kept units S (|S|,), all units by default.

    The ridge is relative to every column's own second moment, so rescaling a unit changes no output.
    """
    kept = _ordinary(moments, units)
    kept = kept.centred() if intercept else kept
    coefficients, used = solve_ridged(kept, ridge)
    bias = kept.intercept(coefficients)
    error = relative_error(kept, None, coefficients, bias, intercept=intercept)
    return Refit(coefficients, bias, error, used)


def solve_ridged(moments: Moments, ridge: float) -> tuple[Tensor, float]:
    """V (K·s, D) of the ridged normal equations as the moments stand, centred or not, and the ridge that it took."""
    if not moments.unit_count:
        return moments.covariance.new_zeros(0, moments.output_count), ridge
    equations = normal_equations(moments, ridge=ridge, intercept=False)
    factor, used = factored(equations)
    return equations.scale[:, None] * torch.cholesky_solve(equations.cross, factor), used


def relative_error(
    moments: Moments | FactoredMoments,
    units: Tensor | None,
    coefficients: Tensor,
    intercept_values: Tensor | None = None,
    *,
    intercept: bool = True,
) -> float:
    """‖Ψ − Φ_S V − 1bᵀ‖_F / ‖Ψ − mean(Ψ)‖_F of any V (|S|·s, D) and b (D,), on these (held-back) moments.

    Args:
        units: S (|S|,), whose columns `coefficients` belongs to; None: all units, in order.
        intercept_values: b (D,); None: no bias, or for `centred()` moments the best one.
        intercept: the denominator is centred; else it is ‖Ψ‖_F.
    """
    kept = _ordinary(moments, units)
    if tuple(coefficients.shape) != tuple(kept.cross_covariance.shape):
        raise ValueError(
            f"`coefficients` must have shape {tuple(kept.cross_covariance.shape)}, got {tuple(coefficients.shape)}."
        )
    v = coefficients.to(kept.covariance)
    left = kept.residual(v)  # residual energy = centred residual energy + ‖mean residual − b‖²
    if intercept_values is not None:
        bias = intercept_values.to(v)
    else:
        bias = left.output_mean if kept.is_centred else torch.zeros_like(kept.output_mean)
    residual = left.centred_energy + float((left.output_mean - bias).square().sum())
    return relative(residual, kept.centred_energy if intercept else kept.energy)


def relative(left: float, total: float) -> float:
    """√(left/total) of two energies; 0 where there is nothing to explain and nothing is left."""
    if total <= 0:
        return 0.0 if left <= 0 else math.inf
    return math.sqrt(max(0.0, left) / total)


def _ordinary(moments: Moments | FactoredMoments, units: Tensor | None) -> Moments:
    if units is not None:
        return moments.subset(units)
    if isinstance(moments, FactoredMoments):
        return moments.subset(torch.arange(moments.unit_count))
    return moments

"""The penalised problem on moments: objective, gradient, certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex.moments import Moments


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
    unit_costs: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.penalty >= 0 or self.penalty == float("inf"):
            raise ValueError(f"`penalty` must be finite and not negative, got {self.penalty}.")
        costs = self.unit_costs
        if costs is not None:
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
            return self.moments.gram.new_ones(self.moments.unit_count)
        return self.unit_costs.to(self.moments.gram)

    @property
    def silencing_penalty(self) -> float:
        """λ_max = max_k ‖H_k‖_F/c_k: from here on V = 0 is optimal."""
        norms = unit_norms(self.moments.cross, self.moments.group_size)
        return float((norms / self.costs).max()) if norms.numel() else 0.0

    def objective(self, coefficients: Tensor) -> float:
        """½‖Ψ − ΦV‖²_F/N + λΣc_k‖v_k‖."""
        correlation = self.correlation(coefficients)
        return self.residual_energy(coefficients, correlation) / 2 + self.penalty * self.weighted_norm(coefficients)

    def weighted_norm(self, coefficients: Tensor) -> float:
        """Σc_k‖v_k‖_F."""
        return float((self.costs * unit_norms(coefficients, self.moments.group_size)).sum())

    def correlation(self, coefficients: Tensor) -> Tensor:
        """ΦᵀR/N = H − GV (K·s, D)."""
        return self.moments.cross - self.moments.gram @ coefficients

    def gradient(self, coefficients: Tensor) -> Tensor:
        """Gradient GV − H (K·s, D) of the smooth part."""
        return -self.correlation(coefficients)

    def duality_gap(self, coefficients: Tensor) -> float:
        """Relative duality gap (P(V) − D(θ))/P(V) ≥ (P(V) − min P)/P(V), for any V; see `certificate`."""
        return certificate(self, coefficients)[1]

    def residual_energy(self, coefficients: Tensor, correlation: Tensor) -> float:
        """‖Ψ − ΦV‖²_F/N, never negative, from V and its `correlation`."""
        fit = self.moments.energy - float((coefficients * (self.moments.cross + correlation)).sum())
        return 0.0 if fit < 0 else fit  # NaN stays NaN


def certificate(problem: MultitaskLasso, coefficients: Tensor) -> tuple[float, float]:
    """Objective and relative duality gap of any V, from (G, H, energy) alone.

    With R = Ψ − ΦV, C = ΦᵀR/N and t = min(1, λ/max_k(‖C_k‖/c_k)), θ = tR is dual feasible and
    P(V) − D(θ) = ½(1 − t)²‖R‖²/N + λΣc_k‖v_k‖ − t⟨V, C⟩, which has no cancellation of large terms
    (EVIDENCE §2). Relative to P(V); 0 where P(V) = 0.
    """
    s = problem.moments.group_size
    correlation = problem.correlation(coefficients)
    fit = problem.residual_energy(coefficients, correlation)
    penalised = problem.penalty * problem.weighted_norm(coefficients)
    objective = fit / 2 + penalised
    norms = unit_norms(correlation, s)
    largest = float((norms / problem.costs).max()) if norms.numel() else 0.0
    t = 1.0 if largest <= problem.penalty else problem.penalty / largest
    gap = (1 - t) ** 2 * fit / 2 + penalised - t * float((coefficients * correlation).sum())
    return objective, relative_gap(gap, objective)


def relative_gap(gap: float, objective: float) -> float:
    """gap/objective: infinite where either is not finite, zero where nothing is left to minimise."""
    if not (math.isfinite(gap) and math.isfinite(objective)):
        return math.inf
    return max(0.0, gap) / objective if objective > 0 else 0.0


def unit_norms(matrix: Tensor, group_size: int) -> Tensor:
    """Frobenius norm (K,) of every unit's s rows of a (K·s, D) matrix."""
    rows = matrix if group_size == 1 else matrix.reshape(matrix.shape[0] // group_size, -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms

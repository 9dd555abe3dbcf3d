"""The exact form: the output weights of least Σc_k‖v_k‖ that reproduce Ψ on the numerical range of Φ."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, relative_gap, unit_norms
from compress.convex.solution import Solution, Status
from compress.convex.solve import Solver, check_tolerance, deadline_after, find_solver, solve
from compress.convex.statistics.eigen import eigen_decomposition
from compress.convex.statistics.moments import Moments, unit_columns
from compress.convex.width_bound import remove_dependent_units

RANGE_TOLERANCE = 1e-7
"""Singular values of Φ below this fraction of the largest one are taken as zero (1e-14 on eigenvalues of the gram)."""

_INNER = 300  # iterations of a round: what they leave the next round mends

FEASIBLE = 1e-7
"""Relative error ‖PΨ − ΦV‖/‖PΨ‖ up to which V counts as reproducing Ψ."""


def solve_exact(
    moments: Moments,
    unit_costs: Any = None,
    *,
    solver: Solver | str = "newton",
    tolerance: float = 1e-6,
    range_tolerance: float = RANGE_TOLERANCE,
    max_rounds: int = 60,
    time_limit: float = math.inf,
) -> Solution:
    """Minimise Σc_k‖v_k‖ subject to ΦV = PΨ, P the projection on the numerical range of Φ.

    With Q an orthonormal basis of that range among the columns of Φ (K·s, r), and W₀ the least-squares weights, the
    constraint is QᵀV = QᵀW₀, whatever the singular values of Φ are: so well conditioned it is solved. Where Φ has full
    column rank, V = W₀ is the only point. Else the method of multipliers on the penalised form: solve, add the residual
    back, solve again; with Y the sum of residuals over λ, ‖Y_k‖ ≤ c_k, the certificate is ⟨Y, W₀⟩. The point is put
    on the constraint by least squares on its own support, and units that the others can replace at no cost are
    removed (Carathéodory): no more than rank(Φ)·rank(ΦV) units are left.

    `gap` is relative to Σc_k‖v_k‖; `error` is ‖PΨ − ΦV‖/‖PΨ‖; `penalty` is 0.

    Args:
        range_tolerance: relative singular value of Φ that is taken as zero.
        time_limit: seconds; the best point so far comes back, feasible ones before others.
    """
    check_tolerance(tolerance)
    if not 0 <= range_tolerance < 1:
        raise ValueError(f"`range_tolerance` must be in [0, 1), got {range_tolerance}.")
    if max_rounds < 1:
        raise ValueError(f"`max_rounds` must be at least 1, got {max_rounds}.")
    deadline = deadline_after(time_limit)
    name = find_solver(solver).name
    form = _Form.of(moments, unit_costs, range_tolerance)
    if not form.energy > 0:
        return form.point(torch.zeros_like(moments.cross_covariance), None).solution(form, tolerance, 0, name, "")
    if form.basis.shape[1] == form.basis.shape[0]:
        best, iterations, reason = form.point(form.weights, form.slope(form.weights)), 0, ""
    else:
        best, iterations, reason = _multipliers(form, solver, tolerance, max_rounds, deadline)
    if best.feasible and iterations:
        fewer = form.point(form.without_dependent(best.coefficients), best.multiplier)
        if fewer.feasible and fewer.norm <= best.norm * (1 + 1e-9):
            best = fewer
    return best.solution(form, tolerance, iterations, name, reason)


@dataclass(frozen=True, eq=False)
class _Form:
    """One exact problem: minimise Σc_k‖v_k‖ subject to QᵀV = QᵀW₀.

    Attributes:
        problem: of `moments` as they are; its costs are used.
        basis: Q (K·s, r).
        values: eigenvalues (r,) of the gram for the columns of Q.
        weights: W₀ (K·s, D).
        projected: moments with QQᵀ for a gram and W₀ for outputs.
        energy: ‖PΨ‖²/N.
    """

    problem: MultitaskLasso
    basis: Tensor
    values: Tensor
    weights: Tensor
    projected: Moments
    energy: float

    @classmethod
    def of(cls, moments: Moments, unit_costs: Any, range_tolerance: float) -> _Form:
        values, vectors = eigen_decomposition(moments.gram)
        top = float(values[-1]) if values.numel() else 0.0
        kept = values > max(range_tolerance**2, 1e-15 * values.numel()) * top
        values, basis = values[kept], vectors[:, kept]
        half = basis.T @ moments.cross  # (r, D)
        weights = basis @ (half / values[:, None])
        projected = Moments(
            covariance=basis @ basis.T,
            cross_covariance=weights,
            centred_energy=float(weights.square().sum()),
            feature_mean=torch.zeros_like(moments.feature_mean),
            output_mean=torch.zeros_like(moments.output_mean),
            count=moments.count,
            group_size=moments.group_size,
            rounding=moments.rounding,
        )
        energy = float((half.square() / values[:, None]).sum())
        return cls(MultitaskLasso(moments, 0.0, unit_costs), basis, values, weights, projected, energy)

    def point(self, coefficients: Tensor, multiplier: Tensor | None) -> _Point:
        """A V with its error and, with a multiplier Y (K·s, D) in the span of Q, a dual value."""
        left = self.values.sqrt()[:, None] * (self.basis.T @ (coefficients - self.weights))
        error = float(torch.linalg.vector_norm(left)) / math.sqrt(self.energy) if self.energy > 0 else 0.0
        dual = 0.0
        if multiplier is not None:
            largest = float((unit_norms(multiplier, self.projected.group_size) / self.problem.costs).max())
            dual = float((multiplier * self.weights).sum()) / max(1.0, largest)
        return _Point(coefficients, multiplier, self.problem.weighted_norm(coefficients), dual, error)

    def slope(self, coefficients: Tensor) -> Tensor:
        """A multiplier for the only feasible point: the gradient of Σc_k‖v_k‖."""
        s = self.projected.group_size
        norms = unit_norms(coefficients, s)
        factor = torch.where(norms > 0, self.problem.costs / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
        slope = coefficients * factor.repeat_interleave(s)[:, None]
        return self.basis @ (self.basis.T @ slope)

    def on_constraint(self, coefficients: Tensor) -> Tensor:
        """The nearest V with QᵀV = QᵀW₀ that keeps zero units zero, weighted by ‖v_k‖, where its support allows one."""
        s = self.projected.group_size
        norms = unit_norms(coefficients, s)
        support = (norms > 0).nonzero()[:, 0]
        if not support.numel():
            return coefficients
        index = unit_columns(support, s)
        weight = norms[support].repeat_interleave(s)
        design = self.basis[index].T * weight  # (r, |A|·s)
        corrected = coefficients.clone()
        for _ in range(2):
            left = self.basis.T @ (self.weights - corrected)  # (r, D)
            step = torch.linalg.lstsq(design.cpu(), left.cpu(), driver="gelsd", rcond=1e-13).solution.to(left)
            corrected[index] += weight[:, None] * step
        return corrected

    def without_dependent(self, coefficients: Tensor) -> Tensor:
        """V with ΦV unchanged, at no larger Σc_k‖v_k‖, and no unit that the others can replace."""
        s = self.projected.group_size
        fewer = remove_dependent_units(self.basis.T, coefficients, self.problem.costs, s, tolerance=1e-12)
        return self.on_constraint(fewer)


@dataclass(frozen=True, eq=False)
class _Point:
    coefficients: Tensor
    multiplier: Tensor | None
    norm: float  # Σc_k‖v_k‖
    dual: float
    error: float

    @property
    def feasible(self) -> bool:
        return self.error <= FEASIBLE

    @property
    def gap(self) -> float:
        return relative_gap(self.norm - self.dual, self.norm)

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better: feasible points by their gap, before others by their error."""
        return (False, self.gap) if self.feasible else (True, self.error)

    def solution(self, form: _Form, tolerance: float, iterations: int, solver: str, reason: str) -> Solution:
        certified = self.feasible and self.gap <= tolerance
        if not self.feasible:
            reason = f"{reason or 'no further progress in float64'}; the smallest relative error is {self.error:.1e}"
        return Solution(
            coefficients=self.coefficients,
            intercept=form.problem.moments.intercept(self.coefficients),
            penalty=0.0,
            objective=self.norm,
            gap=self.gap if self.feasible else math.inf,
            active=(unit_norms(self.coefficients, form.projected.group_size) > 0).nonzero()[:, 0],
            status=Status.CERTIFIED if certified else Status.STOPPED,
            reason="" if certified else reason or "no further progress in float64",
            tolerance=tolerance,
            iterations=iterations,
            solver=solver,
            error=self.error,
        )


def _multipliers(
    form: _Form, solver: Solver | str, tolerance: float, max_rounds: int, deadline: float
) -> tuple[_Point, int, str]:
    """The best point of the method of multipliers, the inner iterations it took, and why it ended; empty: certified."""
    costs = form.problem.costs
    lambda_max = MultitaskLasso(form.projected, 0.0, costs).lambda_max
    penalty = 0.1 * lambda_max
    shifted, start = form.weights, None  # the residual is added back to W₀
    best: _Point | None = None
    iterations, poor, inner_tolerance = 0, 0, 1e-4
    for _ in range(max_rounds):
        inner = solve(
            MultitaskLasso(form.projected.with_outputs(shifted), penalty, costs),
            solver,
            tolerance=inner_tolerance,
            max_iterations=_INNER,
            start=start,
            time_limit=deadline - time.monotonic(),
        )
        iterations += inner.iterations
        start = inner.coefficients
        multiplier = (shifted - form.basis @ (form.basis.T @ start)) / penalty
        point = form.point(form.on_constraint(start), multiplier)
        if best is None or point.rank < best.rank:
            halved = best is None or (best.rank[0] and not point.rank[0]) or point.rank[1] < 0.5 * best.rank[1]
            poor = 0 if halved else poor + 1
            best = point
        else:
            poor += 1
        if best.feasible and best.gap <= tolerance:
            return best, iterations, ""
        if time.monotonic() > deadline:
            return best, iterations, "the time limit was reached"
        if poor >= 10:
            return best, iterations, "no further progress in float64"
        inner_tolerance = max(min(1e-10, 1e-3 * tolerance), min(1e-4, 1e-3 * best.rank[1], 0.1 * inner_tolerance))
        # a smaller λ converges in fewer rounds, a larger one has easier inner problems
        if penalty > 1e-6 * lambda_max:
            penalty *= 0.3
        shifted = form.weights + penalty * multiplier
    assert best is not None, "at least one round"
    return best, iterations, f"{max_rounds} rounds were not enough"

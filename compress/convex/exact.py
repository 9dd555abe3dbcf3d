"""The exact form: the output weights of least Σc_k‖v_k‖ that reproduce Ψ on the numerical range of Φ."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from compress.convex.eigen import eigen_decomposition
from compress.convex.lasso import MultitaskLasso, relative_gap, unit_norms
from compress.convex.moments import Moments, unit_columns
from compress.convex.solve import solve
from compress.convex.solvers.solution import Solution

RANGE_TOLERANCE = 1e-7
"""Singular values of Φ below this fraction of the largest one are taken as zero (1e-14 on eigenvalues of the gram)."""


def solve_exact(
    moments: Moments,
    unit_costs: Tensor | None = None,
    *,
    solver: str = "newton",
    tolerance: float = 1e-6,
    range_tolerance: float = RANGE_TOLERANCE,
    max_rounds: int = 40,
) -> Solution:
    """Minimise Σc_k‖v_k‖ subject to ΦV = PΨ, P the projection on the numerical range of Φ.

    The method of multipliers on the penalised form: solve, add the residual back to Ψ, solve again; with u the sum of
    residuals over λ, (GW)_k = Φ_kᵀu/N and ⟨u, Ψ⟩ give the certificate. The point is then put on ΦV = PΨ by a least
    squares correction on its own support.

    `gap` is relative to Σc_k‖v_k‖ of the corrected point; `error` is ‖PΨ − ΦV‖/‖PΨ‖; `penalty` is 0.
    """
    values, vectors = eigen_decomposition(moments.gram)
    top = float(values[-1]) if values.numel() else 0.0
    kept = values > max(range_tolerance**2, 1e-15 * values.numel()) * top
    values, vectors = values[kept], vectors[:, kept]  # (r,), (K·s, r)
    half = vectors.T @ moments.cross  # (r, D)
    weights = vectors @ (half / values[:, None])  # W₀ (K·s, D): ΦW₀ = PΨ
    ranged = Moments(  # about zero, whatever `moments` are about
        covariance=(vectors * values) @ vectors.T,
        cross_covariance=moments.cross,
        centred_energy=moments.energy,
        feature_mean=torch.zeros_like(moments.feature_mean),
        output_mean=torch.zeros_like(moments.output_mean),
        count=moments.count,
        group_size=moments.group_size,
    )
    target = ranged.with_outputs(weights)
    if not target.energy > 0:
        zero = torch.zeros_like(moments.cross)
        return _solution(target, zero, torch.zeros_like(zero), unit_costs, tolerance, 0, solver)
    silencing = MultitaskLasso(target, 0.0, unit_costs).silencing_penalty
    penalty = 1e-3 * silencing
    shifted, point = weights, None  # Ψ + u·λ = Φ·shifted
    best: Solution | None = None
    iterations, poor = 0, 0
    for _ in range(max_rounds):
        problem = MultitaskLasso(ranged.with_outputs(shifted), penalty, unit_costs)
        inner = solve(problem, solver, tolerance=min(1e-10, 1e-3 * tolerance), start=point)
        iterations += inner.iterations
        point = inner.coefficients
        multiplier = (shifted - point) / penalty  # u = Φ·multiplier
        corrected = _on_constraint(target, point, values, vectors)
        found = _solution(target, corrected, multiplier, unit_costs, tolerance, iterations, solver)
        if best is None or found.gap < best.gap:
            poor = 0 if best is None or found.gap < 0.5 * best.gap else poor + 1
            best = found
        else:
            poor += 1
        if best.certified or poor >= 6:
            break
        # the next target is Ψ + λu; a smaller λ converges in fewer rounds, a larger one has easier inner problems
        if inner.certified and penalty > 1e-6 * silencing:
            penalty *= 0.3
        shifted = weights + penalty * multiplier
    assert best is not None
    return replace(best, iterations=iterations)


def _on_constraint(target: Moments, point: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """The nearest point with ΦV = PΨ that keeps zero units zero (weighted by ‖v_k‖), where the support allows one."""
    s = target.group_size
    norms = unit_norms(point, s)
    support = (norms > 0).nonzero()[:, 0]
    if not support.numel():
        return point
    index = unit_columns(support, s)
    weight = norms[support].repeat_interleave(s)
    # coordinates in which Φ is orthonormal: Φ = U·diag(√values)·vectorsᵀ
    design = values.sqrt()[:, None] * vectors[index].T * weight  # (r, |A|·s)
    corrected = point.clone()
    for _ in range(2):
        residual = (vectors.T @ (target.cross - target.gram @ corrected)) / values.sqrt()[:, None]  # (r, D)
        step = torch.linalg.lstsq(design, residual, driver="gelsd", rcond=1e-12).solution
        corrected[index] += weight[:, None] * step
    return corrected


def _solution(
    target: Moments,
    point: Tensor,
    multiplier: Tensor,
    unit_costs: Tensor | None,
    tolerance: float,
    iterations: int,
    solver: str,
) -> Solution:
    problem = MultitaskLasso(target, 0.0, unit_costs)
    s = target.group_size
    primal = problem.weighted_norm(point)
    images = unit_norms(target.gram @ multiplier, s) / problem.costs  # ‖Φ_kᵀu‖/(N c_k), at most 1 when feasible
    largest = float(images.max()) if images.numel() else 0.0
    dual = float((multiplier * target.cross).sum()) * (1.0 if largest <= 1 else 1 / largest)
    residual = problem.residual_energy(point, problem.correlation(point))
    error = math.sqrt(residual / target.energy) if target.energy > 0 else 0.0
    gap = relative_gap(primal - dual, primal)
    active = (unit_norms(point, s) > 0).nonzero()[:, 0]
    if error > 1e-7:
        status = f"stopped: the support cannot reproduce Ψ, relative error {error:.1e}"
    elif gap <= tolerance:
        status = f"certified: relative gap {gap:.1e} is within {tolerance:.0e}"
    else:
        status = f"stopped: no further progress in float64; relative gap {gap:.1e} is above {tolerance:.0e}"
    return Solution(point, 0.0, primal, gap, active, status, iterations, solver, error)

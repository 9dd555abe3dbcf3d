"""The default solver: a growing working set, each solved by ADMM and exact semismooth Newton steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.convex.lasso import unit_norms
from compress.convex.solvers.restricted import Restricted
from compress.convex.solvers.scaled import Outcome, ScaledProblem
from compress.convex.solvers.small import is_small, minimise_restricted, minimise_small
from compress.convex.statistics.moments import unit_columns

_FIRST_UNITS = 64
_FIRST_COLUMNS = 1024  # of units of many columns, no more than these at first
_DIRECT = 700  # iterations before proximal steps on the dual are tried


@dataclass(frozen=True)
class Newton:
    """A growing working set, ADMM to find its support, then exact semismooth Newton steps.

    Where a direct attempt stalls (kinks in a nearly flat valley: tiny λ, rank-deficient Φ) proximal steps on the dual
    follow, whose inner problems have a larger λ. Small problems and working sets are tried in NumPy first, where a step
    costs less.

    Attributes:
        small: unknowns K·s·D up to which they are small; 0: none is.
    """

    small: int = 8192

    name = "newton"

    def minimise(
        self, problem: ScaledProblem, *, tolerance: float, start: Tensor | None, max_iterations: int, deadline: float
    ) -> Outcome:
        """Solve to a relative gap of `tolerance`; see `solve`."""
        tried: list[Outcome] = []
        small = self.small
        if is_small(problem.cross, small):
            tried.append(minimise_small(problem, tolerance, start, max_iterations, deadline))
            small = 0  # where that stalls it takes all the care there is, from the same start
        if _goes_on(tried, max_iterations, deadline):
            most = min(max_iterations - _iterations(tried), _DIRECT)
            tried.append(_attempt(problem, tolerance, start, most, deadline, small))
        if _goes_on(tried, max_iterations, deadline):
            left = max_iterations - _iterations(tried)
            tried.append(_dual_steps(problem, tolerance, left, deadline, small))
        reason, best = tried[-1].reason, tried[-1]
        if reason and _iterations(tried) >= max_iterations:
            reason = f"{max_iterations} iterations were not enough"
        if reason and len(tried) > 1:
            best = min(tried, key=lambda outcome: problem.gap_at(outcome.coefficients))
        return Outcome(best.coefficients, _iterations(tried), reason)


def _goes_on(tried: list[Outcome], max_iterations: int, deadline: float) -> bool:
    """Whether what was tried fell short and more may be tried."""
    if not tried:
        return True
    return bool(tried[-1].reason) and _iterations(tried) < max_iterations and time.monotonic() <= deadline


def _iterations(tried: list[Outcome]) -> int:
    return sum(outcome.iterations for outcome in tried)


def _dual_steps(problem: ScaledProblem, tolerance: float, max_iterations: int, deadline: float, small: int) -> Outcome:
    """Proximal points on the dual: each step is the same problem with (1 + μ) times the penalty and another Ψ.

    The dual max ⟨u, Ψ⟩ − ½‖u‖² over ‖Φ_kᵀu‖ ≤ w_k gets −½μ‖u − u_j‖²; its primal has Ψ + μu_j and (1 + μ)w. With
    u_j = aΨ − ΦW that needs the moments alone, and the larger penalty makes the inner problems easy.
    """
    a, shift = 0.0, torch.zeros_like(problem.cross)
    point = torch.zeros_like(problem.cross)
    best, best_gap = point, problem.gap_at(point)
    mu, iterations = 1e4, 0
    for _ in range(60):
        if iterations >= max_iterations:
            return Outcome(best, iterations, "the iterations allowed were not enough")
        if time.monotonic() > deadline:
            return Outcome(best, iterations, "the time limit was reached")
        image = problem.rows(torch.arange(problem.unit_count, device=shift.device)) @ shift
        linear, square = float((shift * problem.cross).sum()), float((shift * image).sum())
        inner = replace(
            problem,
            thresholds=problem.thresholds * (1 + mu),
            cross=(1 + mu * a) * problem.cross - mu * image,
            energy=(1 + mu * a) ** 2 * problem.energy - 2 * mu * (1 + mu * a) * linear + mu**2 * square,
        )
        outcome = _attempt(inner, 1e-3 * tolerance, point, _DIRECT, deadline, small)
        iterations += max(1, outcome.iterations)
        point = outcome.coefficients
        gap = problem.gap_at(point)
        if gap < best_gap:
            best, best_gap = point, gap
        if gap <= tolerance:
            return Outcome(point, iterations, "")
        if outcome.reason:
            mu *= 10
            continue
        a, shift = (1 + mu * a) / (1 + mu), (mu * shift + point) / (1 + mu)
        mu = max(1.0, mu / 3)
    return Outcome(best, iterations, "no further progress in float64")


def _attempt(
    problem: ScaledProblem,
    tolerance: float,
    start: Tensor | None,
    max_iterations: int,
    deadline: float,
    small: int,
) -> Outcome:
    s = problem.group_size
    point = torch.zeros_like(problem.cross) if start is None else start.clone()
    support = (unit_norms(point, s) > 0).nonzero()[:, 0]
    best, best_gap, iterations, stalls = point, float("inf"), 0, 0
    inner_tolerance = 0.1
    while True:
        correlation = problem.correlation(point, support)
        _, gap, ratios = problem.gap(point, correlation)
        if gap < best_gap:
            stalls = 0 if gap < 0.5 * best_gap else stalls + 1
            best, best_gap = point, gap
        else:
            stalls += 1
        if gap <= tolerance:
            return Outcome(point, iterations, "")
        if iterations >= max_iterations:
            return Outcome(best, iterations, f"{max_iterations} iterations were not enough")
        if time.monotonic() > deadline:
            return Outcome(best, iterations, "the time limit was reached")
        if stalls >= 12:
            return Outcome(best, iterations, "no further progress in float64")
        working = _working_set(problem, ratios, support)
        index = unit_columns(working, s)
        restricted = Restricted.of(problem, working)
        inner_tolerance = max(0.3 * tolerance, min(inner_tolerance, 0.05 * gap))
        if stalls >= 3:
            inner_tolerance = 0.03 * tolerance
        rows, rotation = restricted.use_fewer_outputs()
        inside = point[index] if rotation is None else point[index] @ rotation
        left = max_iterations - iterations
        if stalls == 0 and is_small(rows.cross, small):
            inside, used = minimise_restricted(rows, inside, inner_tolerance, left, deadline)
        else:
            inside, used = rows.minimise(inside, inner_tolerance, left, deadline)
        iterations += used
        inside = inside if rotation is None else inside @ rotation.T
        point = torch.zeros_like(point)
        point[index] = inside
        support = working[unit_norms(inside, s) > 0]


def _working_set(problem: ScaledProblem, ratios: Tensor, support: Tensor) -> Tensor:
    """The support, and of the units that violate their optimality condition the worst, at most doubling the set."""
    violating = torch.full_like(ratios, -1.0)
    violating[problem.candidates] = ratios[problem.candidates]
    violating[support] = -1.0
    room = max(1, min(_FIRST_UNITS, _FIRST_COLUMNS // problem.group_size), support.shape[0])
    wanted = min(room, int((violating > 1).sum()))
    added = violating.topk(wanted).indices
    return torch.cat([support, added]).sort().values

"""Searches over λ: a regularisation path, a tolerance, a number of units."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, relative_gap, rounding_of_gap, unit_norms
from compress.convex.refit import refit
from compress.convex.solution import Solution, Status
from compress.convex.solve import Solver, certified_point, check_tolerance, deadline_after, find_solver, solve
from compress.convex.solvers.scaled import Outcome
from compress.convex.statistics.eigen import eigen_decomposition
from compress.convex.statistics.moments import Moments

_SMALLEST = 1e-9  # the smallest λ at which units are counted, as a fraction of λ_max
_FURTHEST = 3.0  # step down in log λ, by what least squares leaves, at most
_PAST = 1.15  # times that step, to come past the λ that is looked for
_HIDDEN = 0.1  # rounding of a gap, relative to the tolerance, from which on a smaller λ tells no more units
_SPECTRAL = 2048  # columns up to which least squares is settled by eigenvalues where a factorisation leaves doubt


def solve_path(
    moments: Moments,
    penalties: Sequence[float],
    unit_costs: Any = None,
    *,
    solver: Solver | str = "newton",
    tolerance: float = 1e-6,
    time_limit: float = math.inf,
) -> list[Solution]:
    """Penalised solutions for every λ, in the order given; each λ starts from the solution of the one before it.

    Args:
        time_limit: seconds for the whole path; solves after it return where they start.
    """
    deadline = deadline_after(time_limit)
    solutions: list[Solution] = []
    start: Tensor | None = None
    for penalty in penalties:
        problem = MultitaskLasso(moments, float(penalty), unit_costs)
        left = deadline - time.monotonic()
        solution = solve(problem, solver, tolerance=tolerance, start=start, time_limit=left)
        start = solution.coefficients if math.isfinite(solution.gap) else None
        solutions.append(solution)
    return solutions


def penalty_grid(moments: Moments, count: int = 20, smallest: float = 1e-3, unit_costs: Any = None) -> list[float]:
    """`count` penalties, geometric from λ_max down to `smallest` times it."""
    if count < 1 or not 0 < smallest <= 1:
        raise ValueError(f"`count` must be positive and `smallest` in (0, 1], got {count} and {smallest}.")
    top = MultitaskLasso(moments, 0.0, unit_costs).lambda_max
    return [top * smallest ** (i / max(1, count - 1)) for i in range(count)]


def solve_tolerance(
    moments: Moments,
    error: float,
    unit_costs: Any = None,
    *,
    solver: Solver | str = "newton",
    tolerance: float = 1e-6,
    max_solves: int = 60,
    time_limit: float = math.inf,
) -> Solution:
    """Minimise Σc_k‖v_k‖ subject to ‖Ψ − ΦV‖_F ≤ error·‖Ψ‖_F.

    Least squares says first whether any V does. Then penalised solves bracket the λ whose solution has this error, and
    the point of that error between the bracket's two ends is a feasible one whose gap falls with the bracket's square;
    the next solve starts there.
    Its certificate is that of this form: with R = Ψ − ΦV and u = αR, α = min_k c_k/‖Φ_kᵀR‖, the dual value is
    ⟨u, Ψ⟩ − error·‖Ψ‖‖u‖. `penalty` is 1/α, near the λ whose penalised form has the same solution.

    A status of INFEASIBLE comes with the least-squares point and its error, the smallest one there is.

    Args:
        error: relative error allowed.
        max_solves: penalised solves allowed.
        time_limit: seconds; the best feasible point so far comes back, with its gap.
    """
    if not 0 <= error < math.inf:
        raise ValueError(f"`error` must be finite and not negative, got {error}.")
    check_tolerance(tolerance)
    deadline = deadline_after(time_limit)
    name = find_solver(solver).name
    problem = MultitaskLasso(moments, 0.0, unit_costs)
    top, bound = problem.lambda_max, error * math.sqrt(moments.energy)
    silent = _Point.of(problem, torch.zeros_like(moments.cross_covariance), top)
    if silent.fit <= bound**2 or top <= 0:
        solved = silent.solution(problem, bound, tolerance, name, 0)
        return solved if silent.fit <= bound**2 else _infeasible(solved, error)
    low = _Point.of(problem, _least_squares(moments, error), 0.0)
    if low.fit > (bound * (1 + 1e-9)) ** 2:
        return _infeasible(low.solution(problem, bound, tolerance, name, 0), error)
    high, guess = silent, top * max(error, 1e-6)
    best = low.solution(problem, bound, tolerance, name, 0)
    iterations, slow, reason = 0, 0, f"{max_solves} solves were not enough"
    between = high
    for _ in range(max_solves):
        if time.monotonic() > deadline:
            reason = "the time limit was reached"
            break
        start = between.coefficients
        inner = _inner_tolerance(high if low.penalty == 0 else low, tolerance, best.gap)
        solved = solve(
            MultitaskLasso(moments, guess, unit_costs),
            solver,
            tolerance=inner,
            start=start,
            time_limit=deadline - time.monotonic(),
        )
        iterations += solved.iterations
        point = _Point.of(problem, solved.coefficients, guess)
        before = _log_width(low, high)
        if point.fit <= bound**2:
            low = point
        else:
            high = point
        between, share = _between(problem, low, high, bound)
        for candidate in (low, between):
            solution = candidate.solution(problem, bound, tolerance, name, iterations)
            best = solution if solution.gap < best.gap else best
        if best.certified:
            break
        if best.rounding > tolerance and best.gap <= 3 * best.rounding:
            break
        if _log_width(low, high) < 1e-13:
            reason = "λ is as close as float64 allows"
            break
        slow = slow + 1 if _log_width(low, high) > 0.5 * before else 0
        guess = _next_guess(low, high, bound, share, bisect=slow >= 2)
        slow = 0 if slow >= 2 else slow
    if not best.certified and (best.reason == "" or time.monotonic() > deadline):
        best = replace(best, reason=reason)
    return replace(best, iterations=iterations)


@dataclass(frozen=True, eq=False)
class _Point:
    """A V with what the tolerance form asks of it: ΦᵀR/N and ‖R‖²/N."""

    coefficients: Tensor
    correlation: Tensor
    fit: float
    norm: float  # Σc_k‖v_k‖
    penalty: float

    @classmethod
    def of(cls, problem: MultitaskLasso, coefficients: Tensor, penalty: float) -> _Point:
        correlation = problem.correlation(coefficients)
        fit = problem.residual_energy(coefficients, correlation)
        return cls(coefficients, correlation, fit, problem.weighted_norm(coefficients), penalty)

    def solution(
        self, problem: MultitaskLasso, bound: float, tolerance: float, solver: str, iterations: int
    ) -> Solution:
        """The solution of the tolerance form at this point, feasible or not; `bound` is error·‖Ψ‖_F/√N."""
        moments, v = problem.moments, self.coefficients
        ratios = unit_norms(self.correlation, moments.group_size) / problem.costs
        largest = float(ratios.max()) if ratios.numel() else 0.0
        # ⟨R, Ψ⟩/N = ‖R‖²/N + ⟨V, C⟩
        dual = self.fit + float((v * self.correlation).sum()) - bound * math.sqrt(self.fit)
        dual = dual / largest if largest > 0 else 0.0
        hidden = (
            rounding_of_gap(replace(problem, penalty=largest), v) / largest if largest > 0 and self.norm > 0 else 0.0
        )
        gap, rounding = (relative_gap(value, self.norm) for value in (max(0.0, self.norm - dual) + hidden, hidden))
        feasible = math.sqrt(self.fit) <= bound * (1 + 1e-9)
        certified = feasible and gap <= tolerance
        reason = (
            "" if certified or rounding <= tolerance else f"rounding in the moments hides gaps below {rounding:.0e}"
        )
        energy = moments.energy
        return Solution(
            coefficients=v,
            intercept=moments.intercept(v),
            penalty=largest,
            objective=self.norm,
            gap=gap if feasible else math.inf,
            active=(unit_norms(v, moments.group_size) > 0).nonzero()[:, 0],
            status=Status.CERTIFIED if certified else Status.STOPPED,
            reason=reason,
            tolerance=tolerance,
            iterations=iterations,
            solver=solver,
            error=math.sqrt(self.fit / energy) if energy > 0 else 0.0,
            rounding=rounding,
        )


def _infeasible(solution: Solution, error: float) -> Solution:
    text = f"the smallest relative error that any V reaches is {solution.error:.3e}, {error:.3e} was asked for"
    return replace(solution, status=Status.INFEASIBLE, reason=text, gap=math.inf)


def _least_squares(moments: Moments, error: float) -> Tensor:
    """V (K·s, D) of least ‖Ψ − ΦV‖, or, where a ridge does already, one of at most the relative `error`."""
    ridged = refit(moments, ridge=1e-13, intercept=False)
    if ridged.error <= error * (1 - 1e-9) or moments.covariance.shape[0] > _SPECTRAL:
        return ridged.coefficients
    scale = moments.gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale.reciprocal(), 0.0)
    values, vectors = eigen_decomposition(moments.gram * scale[:, None] * scale)
    kept = values > 1e-15 * values.numel() * values[-1]
    turned = vectors[:, kept]
    exact = scale[:, None] * (turned @ ((turned.T @ (scale[:, None] * moments.cross)) / values[kept, None]))
    problem = MultitaskLasso(moments, 0.0)
    fits = [problem.residual_energy(v, problem.correlation(v)) for v in (exact, ridged.coefficients)]
    return exact if fits[0] <= fits[1] else ridged.coefficients


def _inner_tolerance(point: _Point, tolerance: float, gap: float) -> float:
    """Gap of the next penalised solve: g there is g·P/(λΣc‖v‖) here; rough while the bracket is wide."""
    penalised = point.penalty * point.norm
    share = penalised / (point.fit / 2 + penalised) if penalised > 0 else 1e-2
    needed = max(1e-13, 0.1 * tolerance * share)
    return max(needed, min(1e-4, 1e-2 * gap * share))


def _log_width(low: _Point, high: _Point) -> float:
    return math.log(high.penalty / low.penalty) if low.penalty > 0 else math.inf


def _between(problem: MultitaskLasso, low: _Point, high: _Point, bound: float) -> tuple[_Point, float]:
    """The point on the line from `low` to `high` whose ‖R‖²/N is bound², and its place in (0, 1) from `low`."""
    mixed = low.fit + float(((low.coefficients - high.coefficients) * low.correlation).sum())  # ⟨R_low, R_high⟩/N
    a, b, c = high.fit + low.fit - 2 * mixed, 2 * (mixed - low.fit), low.fit - bound**2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    share = -2 * c / (b + root) if b + root > 0 else 0.0
    share = min(1.0, max(0.0, share * (1 - 1e-13)))
    penalty = low.penalty + share * (high.penalty - low.penalty)
    for _ in range(3):
        point = _Point.of(problem, torch.lerp(low.coefficients, high.coefficients, share), penalty)
        if point.fit <= bound**2 * (1 + 1e-10):
            break
        share *= 1 - 1e-7
    return point, share


def _next_guess(low: _Point, high: _Point, bound: float, share: float, *, bisect: bool) -> float:
    if low.penalty == 0:  # down from the smallest λ so far: what least squares leaves grows by about λ² from there on
        wanted, excess = bound**2 - low.fit, high.fit - low.fit
        step = 0.5 * math.log(excess / wanted) if wanted > 1e-12 * excess > 0 else math.inf
        distance = 0.75 * math.log(high.fit / bound**2) if bound > 0 else 5.0
        return high.penalty * math.exp(-max(0.5, distance, _PAST * min(step, _FURTHEST)))
    if bisect:
        return math.sqrt(low.penalty * high.penalty)
    return low.penalty + min(max(share, 1e-3), 1 - 1e-3) * (high.penalty - low.penalty)


def solve_unit_count(
    moments: Moments,
    units: int,
    unit_costs: Any = None,
    *,
    solver: Solver | str = "newton",
    tolerance: float = 1e-6,
    max_solves: int = 60,
    time_limit: float = math.inf,
) -> Solution:
    """The penalised solution with exactly `units` active units: a search for its λ (docs/theory.md).

    From a solution with too few units the candidates for λ are the sorted ‖r_k‖/c_k of its silent units, r = H − GV:
    the one that would let in as many units as are missing, or the median of those inside the bracket. Where a whole
    group of units enters at one λ the solution with the most units below `units` comes back, as STOPPED.
    """
    count = moments.unit_count
    if not 0 <= units <= count or units != int(units):
        raise ValueError(f"`units` must be a whole number between 0 and {count}, got {units}.")
    units = int(units)
    check_tolerance(tolerance)
    deadline = deadline_after(time_limit)
    top = MultitaskLasso(moments, 0.0, unit_costs).lambda_max
    settled = min(1e-9, tolerance)  # the support settles later than the objective
    problem = MultitaskLasso(moments, top, unit_costs)
    zero = Outcome(torch.zeros_like(moments.cross_covariance), 0, "")
    best = certified_point(problem, zero.coefficients, zero, find_solver(solver).name, tolerance)
    high, low, most = top, 0.0, count  # at `high` too few units (or just enough), at `low` too many: `most`
    candidates = _candidates(best, moments, unit_costs)
    solution, iterations, slow = best, 0, 0
    reason = "no λ found"
    for _ in range(max_solves):
        active = best.active.numel()
        if active == units or high <= _SMALLEST * top or (low > 0 and high - low <= 1e-12 * high):
            break
        if time.monotonic() > deadline:
            reason = "the time limit was reached"
            break
        penalty = _next_penalty(candidates, units - active, most - active, low, high, top, bisect=slow >= 2)
        solution = solve(
            MultitaskLasso(moments, penalty, unit_costs),
            solver,
            tolerance=max(settled, min(tolerance, solution.rounding)),  # below it iterations chase rounding
            start=solution.coefficients,
            time_limit=deadline - time.monotonic(),
        )
        iterations += solution.iterations
        before = math.log(high / max(low, _SMALLEST * top))
        if solution.active.numel() <= units:
            high, best, candidates = penalty, solution, _candidates(solution, moments, unit_costs)
        else:
            low, most = penalty, solution.active.numel()
        slow = slow + 1 if low > 0 and math.log(high / low) > 0.5 * before else 0
        if solution.rounding > _HIDDEN * tolerance and not low:
            reason = "no λ above rounding found"
            break
    best = replace(best, iterations=iterations, tolerance=tolerance)
    if best.active.numel() != units:
        text = f"{reason} between {best.active.numel()} units and {most}"
        return replace(best, status=Status.STOPPED, reason=text)
    if best.gap <= tolerance:
        return replace(best, status=Status.CERTIFIED, reason="")
    return best


def _candidates(solution: Solution, moments: Moments, unit_costs: Any) -> Tensor:
    problem = MultitaskLasso(moments, solution.penalty, unit_costs)
    ratios = unit_norms(problem.correlation(solution.coefficients), moments.group_size) / problem.costs
    ratios[solution.active] = -1.0
    return ratios.sort(descending=True).values


def _next_penalty(
    candidates: Tensor, missing: int, surplus: int, low: float, high: float, top: float, *, bisect: bool
) -> float:
    """λ between `low` and `high` that should let in the `missing` units; `surplus` come in at `low`."""
    if low <= 0:
        wanted = float(candidates[missing]) if missing < candidates.numel() else 0.0
        floor = max(_SMALLEST * top, high / 4)
        return max(floor, min(wanted, 0.7 * high))
    if bisect:
        return math.sqrt(low * high)
    inside = candidates[(candidates > low) & (candidates < high)]
    if inside.numel() > missing:
        # the ratios fall with λ by a common trend: units enter where their ratio, so extrapolated, meets λ
        wanted = float(inside[missing - 1])
        share = math.log(high / wanted) / math.log(high / low)
        expected = min(1.0, missing / max(1, surplus))
        share = min(max(share, 0.5 * expected), 0.95)
        return high * math.pow(low / high, share)
    return high * math.pow(low / high, missing / max(1, surplus))

"""Searches over λ: a regularisation path, a tolerance, a number of units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from compress.convex.lasso import MultitaskLasso, relative_gap, unit_norms
from compress.convex.moments import Moments
from compress.convex.solve import solve
from compress.convex.solvers.solution import Solution

_POLISH = 40  # iterations allowed for the last digits
_SMALLEST = 1e-9  # the smallest λ tried, as a fraction of the silencing penalty


def solve_path(
    moments: Moments,
    penalties: Sequence[float],
    unit_costs: Tensor | None = None,
    *,
    solver: str = "newton",
    tolerance: float = 1e-6,
    time_limit: float = math.inf,
) -> list[Solution]:
    """Penalised solutions for every λ, in the order given; each λ starts from the solution of the one before it."""
    solutions: list[Solution] = []
    start: Tensor | None = None
    for penalty in penalties:
        problem = MultitaskLasso(moments, float(penalty), unit_costs)
        solution = solve(problem, solver, tolerance=tolerance, start=start, time_limit=time_limit)
        start = solution.coefficients if math.isfinite(solution.gap) else None
        solutions.append(solution)
    return solutions


def penalty_grid(
    moments: Moments, count: int = 20, smallest: float = 1e-3, unit_costs: Tensor | None = None
) -> list[float]:
    """`count` penalties, geometric from the silencing penalty down to `smallest` times it."""
    if count < 1 or not 0 < smallest <= 1:
        raise ValueError(f"`count` must be positive and `smallest` in (0, 1], got {count} and {smallest}.")
    top = MultitaskLasso(moments, 0.0, unit_costs).silencing_penalty
    return [top * smallest ** (i / max(1, count - 1)) for i in range(count)]


def solve_tolerance(
    moments: Moments,
    error: float,
    unit_costs: Tensor | None = None,
    *,
    solver: str = "newton",
    tolerance: float = 1e-6,
    max_solves: int = 60,
) -> Solution:
    """Minimise Σc_k‖v_k‖ subject to ‖Ψ − ΦV‖_F ≤ error·‖Ψ‖_F, by root finding on λ with warm starts.

    The certificate is that of this form: with R = Ψ − ΦV and u = αR, α = min_k c_k/‖Φ_kᵀR‖, the dual value is
    ⟨u, Ψ⟩ − error·‖Ψ‖‖u‖. `penalty` is the λ whose penalised form has the same solution. When even the smallest λ
    tried leaves a larger error the status begins with "infeasible" and says which error was reached.
    """
    if not error >= 0:
        raise ValueError(f"`error` must not be negative, got {error}.")
    top = MultitaskLasso(moments, 0.0, unit_costs).silencing_penalty
    bound = error * moments.energy**0.5
    if error >= 1 or top <= 0:
        silent = solve(MultitaskLasso(moments, top, unit_costs), solver, tolerance=tolerance)
        return _with_tolerance_certificate(silent, moments, unit_costs, bound, tolerance)
    inner = min(1e-10, 1e-3 * tolerance)  # the error moves with the square root of the gap
    search = _LogRoot(math.log(_SMALLEST * top), math.log(top), aim=-0.1 * tolerance)
    search.high_value = -math.log(max(error, 1e-300))
    guess = search.high + math.log(max(error, 1e-6))
    best: Solution | None = None
    solution: Solution | None = None
    reached, iterations = math.inf, 0
    for _ in range(max_solves):
        start = None if solution is None else solution.coefficients
        problem = MultitaskLasso(moments, math.exp(guess), unit_costs)
        if search.width < 0.1 and solution is not None:  # near the root, to rounding: the error follows √gap
            solution = solve(problem, solver, tolerance=1e-15, start=start, max_iterations=_POLISH)
            solution = solution if solution.gap <= inner else solve(problem, solver, tolerance=inner, start=start)
        else:
            solution = solve(problem, solver, tolerance=inner, start=start)
        iterations += solution.iterations
        reached = min(reached, solution.error)
        if solution.error <= error:
            found = _with_tolerance_certificate(solution, moments, unit_costs, bound, tolerance)
            best = found if best is None or found.gap < best.gap else best
            if best.gap <= tolerance:
                break
        elif guess <= search.smallest + 1e-9:
            break
        search.add(guess, math.log(max(solution.error, 1e-300) / max(error, 1e-300)))
        if search.width < 1e-14:
            break
        guess = search.next()
    if best is None:
        failed = solution or solve(MultitaskLasso(moments, top, unit_costs), solver)
        failed = _with_tolerance_certificate(failed, moments, unit_costs, bound, tolerance)
        text = f"infeasible: the smallest relative error reached is {reached:.3e}, {error:.3e} was asked for"
        return replace(failed, status=text, iterations=iterations)
    return replace(best, iterations=iterations)


class _LogRoot:
    """Root of a rising f(log λ): secant steps (Illinois), bisection where they shrink the bracket too slowly."""

    def __init__(self, low: float, high: float, aim: float) -> None:
        self.smallest = low
        self.low, self.high = low, high
        self.low_value: float | None = None
        self.high_value = 1.0
        self.aim = aim
        self._last_side = 0
        self._slow = 0

    @property
    def width(self) -> float:
        return self.high - self.low

    def add(self, at: float, value: float) -> None:
        before = self.width
        if value <= 0:
            self.low, self.low_value = at, value
            if self._last_side < 0:
                self.high_value /= 2
            self._last_side = -1
        else:
            self.high, self.high_value = at, value
            if self._last_side > 0 and self.low_value is not None:
                self.low_value /= 2
            self._last_side = 1
        self._slow = self._slow + 1 if self.width > 0.5 * before else 0

    def next(self) -> float:
        if self.low_value is None:
            return max(self.smallest, self.high - max(0.5, 1.5 * self.high_value))
        a, b = self.low_value - self.aim, self.high_value - self.aim
        if self._slow >= 4 or a >= 0 or not math.isfinite(a):
            self._slow = 0
            return (self.low + self.high) / 2 if a < 0 else self.low + 0.1 * self.width
        return self.low + self.width * (-a / (b - a))


def _with_tolerance_certificate(
    solution: Solution, moments: Moments, unit_costs: Tensor | None, bound: float, tolerance: float
) -> Solution:
    """The solution with objective, gap and status of the tolerance form; `bound` is error·‖Ψ‖_F/√N."""
    problem = MultitaskLasso(moments, solution.penalty, unit_costs)
    v = solution.coefficients
    correlation = problem.correlation(v)
    energy = problem.residual_energy(v, correlation)
    primal = problem.weighted_norm(v)
    largest = float((unit_norms(correlation, moments.group_size) / problem.costs).max())
    alpha = 1 / largest if largest > 0 else 0.0
    # ⟨R, Ψ⟩/N = ‖R‖²/N + ⟨V, C⟩
    dual = alpha * (energy + float((v * correlation).sum()) - bound * energy**0.5)
    gap = relative_gap(primal - dual, primal)
    feasible = energy**0.5 <= bound * (1 + 1e-9)
    if not feasible:
        status = f"infeasible: relative error {solution.error:.3e} is above the one asked for"
    elif gap <= tolerance:
        status = f"certified: relative gap {gap:.1e} is within {tolerance:.0e}"
    else:
        status = f"stopped: λ is as close as float64 allows; relative gap {gap:.1e} is above {tolerance:.0e}"
    return replace(solution, objective=primal, gap=gap, status=status)


def solve_unit_count(
    moments: Moments,
    units: int,
    unit_costs: Tensor | None = None,
    *,
    solver: str = "newton",
    tolerance: float = 1e-6,
    max_solves: int = 60,
) -> Solution:
    """The penalised solution with exactly `units` active units: a search for its λ (THEORY §7).

    From a solution with too few units the candidates for λ are the sorted ‖r_k‖/c_k of its silent units, r = H − GV:
    the one that would let in as many units as are missing, or the median of those inside the bracket. Where a whole
    group of units enters at one λ the solution with the most units below `units` comes back and the status says so.
    """
    count = moments.unit_count
    if not 0 <= units <= count:
        raise ValueError(f"`units` must be between 0 and {count}, got {units}.")
    top = MultitaskLasso(moments, 0.0, unit_costs).silencing_penalty
    inner = min(1e-9, tolerance)  # the support settles later than the objective
    best = solve(MultitaskLasso(moments, top, unit_costs), solver, tolerance=tolerance)
    high, low, most = top, 0.0, count  # at `high` too few units (or just enough), at `low` too many: `most`
    candidates = _candidates(best, moments, unit_costs)
    solution, iterations, slow = best, 0, 0
    for _ in range(max_solves):
        found = best.active.numel()
        if found == units or high <= _SMALLEST * top or (low > 0 and high - low <= 1e-12 * high):
            break
        penalty = _next_penalty(candidates, units - found, most - found, low, high, top, bisect=slow >= 2)
        problem = MultitaskLasso(moments, penalty, unit_costs)
        solution = solve(problem, solver, tolerance=inner, start=solution.coefficients)
        iterations += solution.iterations
        before = math.log(high / max(low, _SMALLEST * top))
        if solution.active.numel() <= units:
            high, best, candidates = penalty, solution, _candidates(solution, moments, unit_costs)
        else:
            low, most = penalty, solution.active.numel()
        slow = slow + 1 if low > 0 and math.log(high / low) > 0.5 * before else 0
    if best.gap <= tolerance:
        best = replace(best, status=f"certified: relative gap {best.gap:.1e} is within {tolerance:.0e}")
    if best.active.numel() != units:
        text = f"stopped: no λ found between {best.active.numel()} units and {most}; relative gap {best.gap:.1e}"
        return replace(best, iterations=iterations, status=text)
    return replace(best, iterations=iterations)


def _candidates(solution: Solution, moments: Moments, unit_costs: Tensor | None) -> Tensor:
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

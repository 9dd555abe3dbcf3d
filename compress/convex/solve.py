"""Penalised solves: one catalogue of solvers, every answer with a certificate computed here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from compress.convex.lasso import MultitaskLasso, certificate
from compress.convex.reductions import reduce_problem
from compress.convex.refit import RIDGE, solve_ridged
from compress.convex.solution import Solution, Status
from compress.convex.solvers.conic import Conic
from compress.convex.solvers.newton import Newton
from compress.convex.solvers.proximal import Proximal
from compress.convex.solvers.scaled import Outcome, ScaledProblem, scale_problems
from compress.convex.statistics.sums import as_tensor
from compress.errors import MomentsError

Solver = Newton | Proximal | Conic

_NEARLY_NONE = 1e-7  # of λ_max: below it least squares is tried first
_NOTHING_SAID = 0.5  # a gap hidden by rounding from which on least squares is the answer

SOLVERS: Mapping[str, Solver] = {"newton": Newton(), "proximal": Proximal(), "conic": Conic()}
"""Every solver with its default options, by the name that `solve` takes for it."""


def solve(
    problem: MultitaskLasso,
    solver: Solver | str = "newton",
    *,
    tolerance: float = 1e-6,
    start: Any = None,
    max_iterations: int = 20_000,
    time_limit: float = math.inf,
) -> Solution:
    """Minimise the penalised form to a relative duality gap of `tolerance`.

    A solver that cannot reach it returns its best point with its true gap, and a reason.

    Args:
        solver: `Newton()`, `Proximal(…)`, `Conic(…)`, or a name in `SOLVERS`.
        start: V (K·s, D) to start from, a tensor or an array.
        time_limit: seconds after which the solver stops; with a limit the result may depend on the machine.
    """
    chosen = find_solver(solver)
    check_tolerance(tolerance)
    if problem.penalty == 0 and problem.lambda_max > 0:
        raise ValueError("`penalty` must be positive here; without one use `refit` (least squares) or `solve_exact`.")
    begun = None if start is None else as_tensor(start, "start").detach()
    if begun is not None and begun.shape != problem.moments.cross_covariance.shape:
        raise ValueError(
            f"`start` must have shape {tuple(problem.moments.cross_covariance.shape)}, got {tuple(begun.shape)}."
        )
    deadline = deadline_after(time_limit)
    reduction = reduce_problem(problem)
    first = None if begun is None else reduction.shrink(begun.to(problem.moments.covariance), problem)
    least, hidden = _least_squares(reduction.problem, tolerance)
    if least is not None and hidden >= _NOTHING_SAID:
        outcome = Outcome(least, 0, "")
    else:
        first = least if first is None else first
        outcome = _run(reduction.problem, chosen, max(tolerance, hidden), first, max_iterations, deadline)
    coefficients = reduction.restore(outcome.coefficients, problem)
    solution = certified_point(problem, coefficients, outcome, chosen.name, tolerance)
    if not (outcome.reason or solution.certified or solution.rounding >= tolerance):
        # rounding, in a reduction or in the moments, showed in the certificate of the whole problem: go on below it
        below = (tolerance - solution.rounding) / 2
        outcome = _run(problem, chosen, below, coefficients, max_iterations, deadline)
        solution = certified_point(problem, outcome.coefficients, outcome, chosen.name, tolerance)
    return solution


def solve_batch(
    problems: Sequence[MultitaskLasso],
    solver: Proximal | None = None,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 20_000,
    time_limit: float = math.inf,
) -> list[Solution]:
    """Penalised solutions of many problems at once: several λ of one layer, layers of unlike size, or both.

    Problems that hold the same `moments` object share its gram matrix and eigendecomposition. Certificates are
    computed in float64 on each problem's own moments, wherever and in whatever dtype the solver iterates.
    """
    solver = Proximal() if solver is None else solver
    check_tolerance(tolerance)
    scaled = scale_problems(problems)
    deadline = deadline_after(time_limit)
    outcomes = solver.minimise_all(scaled, tolerance, [None] * len(scaled), max_iterations, deadline)
    return [
        certified_point(problem, own.from_scaled(outcome.coefficients), outcome, solver.name, tolerance)
        for problem, own, outcome in zip(problems, scaled, outcomes, strict=True)
    ]


def _least_squares(problem: MultitaskLasso, tolerance: float) -> tuple[Tensor | None, float]:
    """Least squares, to start from where λ is so small that rounding hides gaps of `tolerance`; and how large.

    What rounding hides nobody can find, and a solver would spend all its iterations looking.
    """
    if problem.penalty >= _NEARLY_NONE * problem.lambda_max:
        return None, 0.0
    try:
        coefficients, _ = solve_ridged(problem.moments, RIDGE)
    except MomentsError:
        return None, 0.0
    rounding = certificate(problem, coefficients).rounding
    return (coefficients, rounding) if rounding > tolerance else (None, 0.0)


def find_solver(solver: Solver | str) -> Solver:
    """The solver of this name, or the one given."""
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    return SOLVERS[solver]


def deadline_after(time_limit: float) -> float:
    """When `time_limit` seconds from now are over. Raises ValueError where that is no number."""
    if time_limit != time_limit:
        raise ValueError(f"`time_limit` must be a number of seconds, got {time_limit}.")
    return time.monotonic() + time_limit


def check_tolerance(tolerance: float) -> None:
    """Raise ValueError unless a relative gap can be asked for like this."""
    if not 0 < tolerance < math.inf:
        raise ValueError(f"`tolerance` must be a positive relative gap, got {tolerance}.")


def _run(
    problem: MultitaskLasso,
    solver: Solver,
    tolerance: float,
    start: Tensor | None,
    max_iterations: int,
    deadline: float,
) -> Outcome:
    scaled = ScaledProblem.of(problem)
    outcome = solver.minimise(
        scaled,
        tolerance=tolerance,
        start=None if start is None else scaled.to_scaled(start),
        max_iterations=max_iterations,
        deadline=deadline,
    )
    return Outcome(scaled.from_scaled(outcome.coefficients), outcome.iterations, outcome.reason)


def certified_point(
    problem: MultitaskLasso, coefficients: Tensor, outcome: Outcome, solver: str, tolerance: float
) -> Solution:
    """The solution at this point, with the certificate recomputed on the whole problem."""
    recomputed = certificate(problem, coefficients)
    reason = outcome.reason or "the solver's own estimate was met, the recomputed certificate was not"
    if recomputed.rounding > tolerance and recomputed.gap <= 3 * recomputed.rounding:
        reason = f"rounding in the moments hides gaps below {recomputed.rounding:.0e}"
    energy = problem.moments.energy
    return Solution(
        coefficients=coefficients,
        intercept=problem.moments.intercept(coefficients),
        penalty=problem.penalty,
        objective=recomputed.objective,
        gap=recomputed.gap,
        active=recomputed.active,
        status=Status.CERTIFIED if recomputed.gap <= tolerance else Status.STOPPED,
        reason="" if recomputed.gap <= tolerance else reason,
        tolerance=tolerance,
        iterations=outcome.iterations,
        solver=solver,
        error=math.sqrt(recomputed.residual / energy) if energy > 0 else 0.0,
        rounding=recomputed.rounding,
    )

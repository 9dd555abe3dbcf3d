"""Penalised solves: one catalogue of solvers, every answer with a certificate computed here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, certificate, unit_norms
from compress.convex.reductions import reduce_problem
from compress.convex.solvers.conic import conic
from compress.convex.solvers.newton import newton
from compress.convex.solvers.proximal import proximal, proximal_batch
from compress.convex.solvers.solution import Outcome, ScaledProblem, Solution

SOLVERS: dict[str, Callable[..., Outcome]] = {"newton": newton, "proximal": proximal, "conic": conic}
"""Every solver, by the name that `solve` takes."""


def solve(
    problem: MultitaskLasso,
    solver: str = "newton",
    *,
    tolerance: float = 1e-6,
    start: Tensor | None = None,
    max_iterations: int = 20_000,
    time_limit: float = math.inf,
) -> Solution:
    """Minimise the penalised form to a relative duality gap of `tolerance`.

    A solver that cannot reach it returns its best point with its true gap, and a status that says why.

    Args:
        solver: a name in `SOLVERS`.
        start: V (K·s, D) to start from.
        time_limit: seconds after which the solver stops; with a limit the result may depend on the machine.
    """
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    if start is not None and start.shape != problem.moments.cross.shape:
        raise ValueError(f"`start` must have shape {tuple(problem.moments.cross.shape)}, got {tuple(start.shape)}.")
    deadline = time.monotonic() + time_limit
    reduction = reduce_problem(problem)
    first = None if start is None else reduction.shrink(start.to(problem.moments.cross), problem)
    outcome = _run(reduction.problem, solver, tolerance, first, max_iterations, deadline)
    coefficients = reduction.restore(outcome.coefficients, problem)
    solution = finished(problem, coefficients, outcome, solver, tolerance)
    if not (reduction.trivial or outcome.reason or solution.certified or solution.rounding > tolerance):
        # rounding in a reduction showed in the certificate of the whole problem: go on without it
        outcome = _run(problem, solver, tolerance, coefficients, max_iterations, deadline)
        solution = finished(problem, outcome.coefficients, outcome, solver, tolerance)
    return solution


def solve_batch(
    problems: Sequence[MultitaskLasso],
    *,
    tolerance: float = 1e-6,
    algorithm: str = "admm",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
    max_iterations: int = 20_000,
    time_limit: float = math.inf,
) -> list[Solution]:
    """Penalised solutions of many problems at once: several λ of one layer, layers of unlike size, or both.

    Problems that hold the same `moments` object share its gram matrix and eigendecomposition. Certificates are
    computed in float64 on each problem's own moments, whatever `device` and `dtype` iterate.
    """
    if not problems:
        return []
    scaled: list[ScaledProblem] = [ScaledProblem(problem) for problem in problems]
    outcomes = proximal_batch(
        scaled,
        tolerance=tolerance,
        algorithm=algorithm,
        device=device,
        dtype=dtype,
        max_iterations=max_iterations,
        deadline=time.monotonic() + time_limit,
    )
    return [
        finished(problem, own.from_scaled(outcome.coefficients), outcome, "proximal", tolerance)
        for problem, own, outcome in zip(problems, scaled, outcomes, strict=True)
    ]


def _run(
    problem: MultitaskLasso,
    solver: str,
    tolerance: float,
    start: Tensor | None,
    max_iterations: int,
    deadline: float,
) -> Outcome:
    scaled = ScaledProblem(problem)
    outcome = SOLVERS[solver](
        scaled,
        tolerance=tolerance,
        start=None if start is None else scaled.to_scaled(start),
        max_iterations=max_iterations,
        deadline=deadline,
    )
    return Outcome(scaled.from_scaled(outcome.coefficients), outcome.iterations, outcome.reason)


def finished(
    problem: MultitaskLasso, coefficients: Tensor, outcome: Outcome, solver: str, tolerance: float
) -> Solution:
    """The solution at this point, with the certificate recomputed on the whole problem."""
    found = certificate(problem, coefficients)
    if found.gap <= tolerance:
        status = f"certified: relative gap {found.gap:.1e} is within {tolerance:.0e}"
    else:
        reason = outcome.reason or "the solver's own estimate was met, the recomputed certificate was not"
        if found.rounding > tolerance:
            reason = f"rounding in the moments hides gaps below {found.rounding:.0e}"
        status = f"stopped: {reason}; relative gap {found.gap:.1e} is above {tolerance:.0e}"
    energy = problem.moments.energy
    return Solution(
        coefficients=coefficients,
        penalty=problem.penalty,
        objective=found.objective,
        gap=found.gap,
        active=(unit_norms(coefficients, problem.moments.group_size) > 0).nonzero()[:, 0],
        status=status,
        iterations=outcome.iterations,
        solver=solver,
        error=math.sqrt(found.residual / energy) if energy > 0 else 0.0,
        rounding=found.rounding,
    )

"""The referee: the penalised form as a second-order cone programme for cvxpy, solved by Clarabel or SCS."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from compress.convex.lasso import unit_norms
from compress.convex.solvers.scaled import Outcome, ScaledProblem, expand
from compress.errors import first_line

LARGEST = 400_000
"""K·s·D beyond which a conic programme is refused: interior-point memory grows with its square."""


BACKENDS = ("auto", "clarabel", "scs")


@dataclass(frozen=True)
class Conic:
    """A second-order cone programme for cvxpy.

    The cone solver's rows are thresholded: rows it leaves at rounding level become zero where that lowers the gap.

    Attributes:
        backend: "clarabel", "scs", or "auto" (Clarabel, then SCS where Clarabel gives no point).
    """

    backend: str = "auto"

    name = "conic"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {self.backend!r}.")

    def minimise(
        self, problem: ScaledProblem, *, tolerance: float, start: Tensor | None, max_iterations: int, deadline: float
    ) -> Outcome:
        """Solve; see `solve`. `start` is not used, and `max_iterations` limits the cone solver's own iterations."""
        n, d = problem.cross.shape
        if n * d > LARGEST:
            zero = torch.zeros_like(problem.cross)
            return Outcome(zero, 0, f"{n * d} unknowns are more than the {LARGEST} the conic solver takes")
        if time.monotonic() > deadline:
            return Outcome(torch.zeros_like(problem.cross), 0, "the time limit was reached")
        reasons = []
        for name in ("clarabel", "scs") if self.backend == "auto" else (self.backend,):
            point, iterations, reason = _cone_solve(problem, name, tolerance, max_iterations, deadline)
            if point is not None:
                return Outcome(_thresholded(problem, point), iterations, reason)
            reasons.append(reason)
        return Outcome(torch.zeros_like(problem.cross), 0, "; ".join(reasons))


def _cone_solve(
    problem: ScaledProblem, backend: str, tolerance: float, max_iterations: int, deadline: float
) -> tuple[Tensor | None, int, str]:
    import cvxpy  # two seconds to import, and only this solver needs it

    s = problem.group_size
    units = problem.candidates.cpu()
    gram = problem.block(problem.candidates).cpu().numpy()
    index = (units[:, None] * s + torch.arange(s)).reshape(-1)
    if not index.numel():
        return torch.zeros_like(problem.cross), 0, ""
    values, vectors = numpy.linalg.eigh((gram + gram.T) / 2)
    kept = values > 1e-14 * values[-1]
    design = numpy.sqrt(values[kept])[:, None] * vectors[:, kept].T  # (r, n), the K-row compressed design
    cross = problem.cross[index.to(problem.cross.device)].cpu().numpy()
    target = (vectors[:, kept].T @ cross) / numpy.sqrt(values[kept])[:, None]
    thresholds = problem.thresholds[problem.candidates].cpu().numpy()
    unknown = cvxpy.Variable(cross.shape)
    rows = cvxpy.reshape(unknown, (len(units), s * cross.shape[1]), order="C")
    fit = cvxpy.sum_squares(design @ unknown - target) / 2
    programme = cvxpy.Problem(cvxpy.Minimize(fit + thresholds @ cvxpy.norm(rows, 2, axis=1)))
    seconds = deadline - time.monotonic()
    options: dict[str, object] = {}
    if backend == "clarabel":
        accuracy = max(1e-12, 1e-2 * tolerance)
        options = {"tol_gap_abs": accuracy * 1e-2, "tol_gap_rel": accuracy, "tol_feas": accuracy}
        options["max_iter"] = min(max_iterations, 500)
        if seconds < 1e9:
            options["time_limit"] = max(0.01, seconds)
    else:
        options = {"eps_abs": 1e-2 * tolerance, "eps_rel": 1e-2 * tolerance, "max_iters": max(1, 5 * max_iterations)}
        if seconds < 1e9:
            options["time_limit_secs"] = max(0.01, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cvxpy warns of inaccurate points; our own gap says how inaccurate
            programme.solve(solver=backend.upper(), **options)
    except cvxpy.error.SolverError as error:
        return None, 0, f"{backend}: {first_line(error)}"
    if unknown.value is None or not numpy.isfinite(unknown.value).all():
        return None, 0, f"{backend}: no point came back ({programme.status})"
    full = torch.zeros_like(problem.cross)
    full[index.to(full.device)] = torch.as_tensor(unknown.value, dtype=torch.float64, device=full.device)
    iterations = programme.solver_stats.num_iters or 0
    reason = "" if programme.status == "optimal" else f"{backend} ended as {programme.status}"
    return full, int(iterations), reason or f"{backend} met its own tolerance"


def _thresholded(problem: ScaledProblem, point: Tensor) -> Tensor:
    """The point with its smallest rows set to zero, at the level (of a few) that has the least gap."""
    norms = unit_norms(point, problem.group_size)
    largest = float(norms.max()) if norms.numel() else 0.0
    best, best_gap = point, problem.gap_at(point)
    for level in (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 2.0):
        trial = point * expand((norms > level * largest).to(point), problem.group_size)[:, None]
        gap = problem.gap_at(trial)
        if gap <= best_gap:
            best, best_gap = trial, gap
    return best

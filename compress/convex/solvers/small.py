"""Small problems in NumPy: ADMM rounds until the support shows, then semismooth Newton steps.

The iterations are those of `restricted` without what guards them where λ is tiny or Φ dependent. A problem of a few
thousand unknowns takes hundreds of calls on arrays so short that the price of a call is all there is to pay, and a
call of NumPy costs a third of one of torch.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from compress.convex.lasso import dual_gap, relative_gap, row_products
from compress.convex.solvers.restricted import Restricted
from compress.convex.solvers.scaled import Outcome, ScaledProblem

Array = NDArray[numpy.float64]
Index = NDArray[numpy.intp]

_PRODUCT = 2**18  # most multiplications (K·s)²·D: with more the price of a call matters less, and threads help
_FEW = 32  # columns
_ROUNDS = 8  # of ADMM before Newton steps are tried
_PATIENCE = 3  # tries in a row that do not halve the gap
_RELAXATION = 1.6
_STEPS = 8  # Newton steps of one try
_PROGRESS = 0.7  # of a gap: what a Newton step must leave at most
_KNOWN = 0.1  # gap of a starting point whose support is taken to be nearly right
_ENOUGH = 0.3  # of the tolerance: what a working set is solved to


def is_small(cross: Tensor, unknowns: int) -> bool:
    """Whether a problem with this T (K·s, D) is on the CPU with few enough unknowns K·s·D, and short products."""
    n, d = cross.shape
    return 0 < n * d <= unknowns and n * n * d <= _PRODUCT and cross.is_cpu


def minimise_small(
    problem: ScaledProblem, tolerance: float, start: Tensor | None, max_iterations: int, deadline: float
) -> Outcome:
    """Solve to a relative gap of `tolerance` where these iterations get there; else the best point, and a reason.

    The working set grows by the units that violate their optimality condition, at first that at zero.
    """
    with numpy.errstate(all="ignore"):  # what overflows ends as a gap of infinity
        whole = SmallProblem.of(problem)
        point = numpy.zeros_like(whole.cross) if start is None else start.numpy()
        support = numpy.zeros(whole.thresholds.shape, dtype=bool) if start is None else whole.norms(point) > 0
        best, best_gap, iterations, working = point, math.inf, 0, support
        while True:
            correlation = whole.correlation(point, support)
            gap, ratios = whole.gap(point, correlation)
            entering = (ratios > 1) & ~working
            reason = "" if entering.any() or gap < 0.5 * best_gap else "no further progress"
            if gap < best_gap:
                best, best_gap = point, gap
            if gap <= tolerance:
                return Outcome(torch.from_numpy(point), iterations, "")
            if iterations >= max_iterations:
                reason = f"{max_iterations} iterations were not enough"
            elif time.monotonic() > deadline:
                reason = "the time limit was reached"
            if reason:
                return Outcome(torch.from_numpy(best), iterations, reason)
            working = working | entering
            index = whole.columns(working.nonzero()[0])
            part = whole.part(working, index)
            inside, used = part.minimise(
                point[index], correlation[index], gap, _ENOUGH * tolerance, max_iterations - iterations, deadline
            )
            iterations += used
            point = numpy.zeros_like(point)
            point[index] = inside
            support = whole.norms(point) > 0


def minimise_restricted(
    problem: Restricted, point: Tensor, tolerance: float, max_iterations: int, deadline: float
) -> tuple[Tensor, int]:
    """The best point that these iterations come by on a working set, and their number; see `Restricted.minimise`."""
    with numpy.errstate(all="ignore"):
        part = SmallProblem(
            gram=problem.gram.numpy(),
            cross=problem.cross.numpy(),
            thresholds=problem.thresholds.numpy(),
            energy=problem.energy,
            group_size=problem.group_size,
        )
        start = point.numpy()
        correlation = part.cross - part.gram @ start
        gap, _ = part.gap(start, correlation)
        best, used = part.minimise(start, correlation, gap, tolerance, max_iterations, deadline)
    return torch.from_numpy(best), used


@dataclass(frozen=True, eq=False)
class SmallProblem:
    """The scaled problem, dense.

    Attributes:
        gram: C (n, n), n = K·s. cross: T (n, D). thresholds: w (K,). energy: of the outputs. group_size: s.
    """

    gram: Array
    cross: Array
    thresholds: Array
    energy: float
    group_size: int

    @classmethod
    def of(cls, problem: ScaledProblem) -> SmallProblem:
        """The arrays of this problem."""
        scale = problem.scale.numpy()
        return cls(
            gram=problem.raw_gram.numpy() / scale[:, None] / scale,
            cross=problem.cross.numpy(),
            thresholds=problem.thresholds.numpy(),
            energy=problem.energy,
            group_size=problem.group_size,
        )

    def part(self, units: NDArray[numpy.bool_], columns: Index) -> SmallProblem:
        """The same with these units, and their `columns`, alone."""
        if columns.size == self.cross.shape[0]:
            return self
        return SmallProblem(
            gram=self.gram[columns[:, None], columns],
            cross=self.cross[columns],
            thresholds=self.thresholds[units],
            energy=self.energy,
            group_size=self.group_size,
        )

    def columns(self, units: Index) -> Index:
        """Column numbers of these units."""
        s = self.group_size
        return units if s == 1 else (units[:, None] * s + numpy.arange(s)).reshape(-1)

    def expand(self, per_unit: Array) -> Array:
        """(K,) repeated for every column of a unit, as a column (K·s, 1)."""
        return (per_unit if self.group_size == 1 else per_unit.repeat(self.group_size))[:, None]

    def inner(self, left: Array, right: Array) -> Array:
        """⟨left_k, right_k⟩ (K,) of the rows of every unit."""
        if self.group_size > 1:
            width = self.group_size * left.shape[1]
            left, right = left.reshape(-1, width), right.reshape(-1, width)
        return row_products(left, right)

    def norms(self, rows: Array) -> Array:
        """Frobenius norm (K,) of every unit's rows."""
        norms: Array = numpy.sqrt(self.inner(rows, rows))
        return norms

    def correlation(self, point: Array, support: NDArray[numpy.bool_]) -> Array:
        """T − CX of an X whose units outside of `support` are zero."""
        if not support.any():
            return self.cross
        index = self.columns(support.nonzero()[0])
        return self.cross - self.gram[index].T @ point[index]

    def gap(self, point: Array, correlation: Array) -> tuple[float, Array]:
        """Relative duality gap of X, and ‖C_k‖/w_k (K,); see `scaled_gap`."""
        inner = float(numpy.vdot(point, correlation))
        fit = max(0.0, self.energy - float(numpy.vdot(point, self.cross)) - inner)
        penalised = float(self.thresholds @ self.norms(point))
        ratios = self.norms(correlation) / self.thresholds
        gap = dual_gap(fit, penalised, inner, 1 / max(1.0, float(ratios.max())))
        return relative_gap(gap, fit / 2 + penalised), ratios

    def minimise(
        self, point: Array, correlation: Array, gap: float, tolerance: float, max_iterations: int, deadline: float
    ) -> tuple[Array, int]:
        """The best point that ADMM rounds, with Newton steps after every few of them, come by, and the iterations.

        `correlation` and `gap` are those of the `point` to start from.
        """
        n, d = self.cross.shape
        if n < 0.7 * d:  # rows of an optimal X lie in the row space of T
            rotation, upper = numpy.linalg.qr(self.cross.T)  # (D, n), (n, n)
            fewer = replace(self, cross=numpy.ascontiguousarray(upper.T))
            inside, used = fewer.minimise(
                point @ rotation, correlation @ rotation, gap, tolerance, max_iterations, deadline
            )
            return inside @ rotation.T, used
        best, best_gap, iterations, admm = point, gap, 0, None
        rough, stale = gap > _KNOWN or not point.any(), 0
        while stale < _PATIENCE:
            if rough:
                admm = admm or _Admm.of(self, point, correlation)
                if admm is None:
                    break
                point = admm.run()
                iterations += _ROUNDS
                correlation = self.cross - self.gram @ point
                gap, _ = self.gap(point, correlation)
            for _ in range(_STEPS):
                step = self._newton_step(point, correlation) if gap > tolerance else None
                if step is None:
                    break
                iterations += 1
                moved = point + step
                residual = self.cross - self.gram @ moved
                reached, _ = self.gap(moved, residual)
                if not reached < _PROGRESS * gap:
                    break
                point, correlation, gap = moved, residual, reached
            rough, stale = True, 0 if gap < 0.5 * best_gap else stale + 1
            if gap < best_gap:
                best, best_gap = point, gap
            if gap <= tolerance or iterations >= max_iterations or time.monotonic() > deadline:
                break
        return best, iterations

    def _newton_step(self, point: Array, correlation: Array) -> Array | None:
        """Semismooth Newton direction of X = prox(X + τ(T − CX)); see `Restricted`."""
        lengths, thresholds = self._steps  # τ, τw
        z = point + self.expand(lengths) * correlation
        norms = self.norms(z)
        inside = norms > thresholds
        active = inside.nonzero()[0]
        step = -point
        if not active.size:
            return step
        index = self.columns(active)
        rows, w, norms = self.gram[index], self.thresholds[active], norms[active]
        d = w / (norms - thresholds[active])
        direction, x = z[index] / self.expand(norms), point[index]  # b̂
        across = x - self.expand(self.inner(direction, x)) * direction
        right = correlation[index] - self.expand(w) * direction - self.expand(d) * across
        if active.size < inside.size:
            leaving = self.columns((~inside).nonzero()[0])
            right += rows[:, leaving] @ point[leaving]
        solved = self._woodbury(rows[:, index], d, direction, right)
        if solved is None:
            return None
        step[index] = solved
        return step

    def _woodbury(self, gram: Array, d: Array, direction: Array, right: Array) -> Array | None:
        """Solve (C + diag d)Δ − Σ_k d_k e_ke_kᵀ ⊗ b̂_kb̂_kᵀ Δ = right (n, D); see `restricted`."""
        s, a = self.group_size, d.shape[0]
        root = self.expand(1 / numpy.sqrt(d))
        scaled = gram * root * root.T
        _diagonal(scaled)[:] += 1 + 1e-12 * root[:, 0] ** 2
        inverse = _inverse(scaled)
        if inverse is None:
            return None
        coupling = inverse * (direction @ direction.T)
        if s > 1:
            coupling = coupling.reshape(a, s, a, s).sum((1, 3))
        numpy.negative(coupling, out=coupling)
        _diagonal(coupling)[:] += 1
        solved: Array = inverse @ (root * right)
        beta = _solve_definite(coupling, self.inner(direction, solved)[:, None])
        if beta is None:
            return None
        solved += inverse @ (self.expand(beta[:, 0]) * direction)
        solved *= root
        return solved

    @cached_property
    def _steps(self) -> tuple[Array, Array]:
        """A proximal step length τ (K,) of every unit, at most 1/λ_max of its block, and τw."""
        s = self.group_size
        blocks = self.gram.reshape(-1, s, self.gram.shape[0] // s, s).diagonal(axis1=0, axis2=2)  # (s, s, K)
        lengths: Array = 1 / numpy.sqrt(numpy.einsum("ijk,ijk->k", blocks, blocks))
        return lengths, lengths * self.thresholds


class _Admm:
    """Over-relaxed ADMM on a small problem; see `restricted`."""

    def __init__(self, problem: SmallProblem, inverse: Array, rho: float, start: Array) -> None:
        self.problem = problem
        # q ← q + α(x − z), x = (C + ρI)⁻¹(T + ρy), y = 2z − q, z = prox(q): with z = (y + q)/2 three terms are left
        self.map = (_RELAXATION * rho) * inverse
        _diagonal(self.map)[:] -= _RELAXATION / 2
        self.constant = (_RELAXATION * inverse) @ problem.cross
        self.limits = (2 / rho) * problem.thresholds
        self.both = start  # q

    @classmethod
    def of(cls, problem: SmallProblem, point: Array, correlation: Array) -> _Admm | None:
        """Rounds that start from a point; None where the gram matrix is none."""
        violation = float((problem.norms(problem.cross) / problem.thresholds).max())
        rho = min(1.0, max(0.1, math.sqrt(10 / violation)))  # the larger λ, the larger ρ
        shifted = problem.gram.copy()
        _diagonal(shifted)[:] += rho
        inverse = _inverse(shifted)
        return None if inverse is None else cls(problem, inverse, rho, correlation / rho + point)

    def run(self) -> Array:
        """A few more rounds; the point (n, D) after them."""
        both, reflected = self.both, self._reflected()
        for _ in range(_ROUNDS):
            both = (1 - _RELAXATION / 2) * both
            both += self.map @ reflected
            both += self.constant
            self.both = both
            reflected = self._reflected()
        return (both + reflected) / 2

    def _reflected(self) -> Array:
        """y = 2·prox(q) − q."""
        factor = numpy.maximum(1 - self.limits / self.problem.norms(self.both), -1)
        return self.problem.expand(factor) * self.both


def _inverse(matrix: Array) -> Array | None:
    """The inverse of a positive definite matrix; None of another."""
    if matrix.shape[0] <= _FEW:
        return _solve_definite(matrix, numpy.eye(matrix.shape[0]))
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    inverse: Array = torch.cholesky_inverse(factor).numpy()
    return None if int(info) else inverse


def _solve_definite(matrix: Array, right: Array) -> Array | None:
    """matrix⁻¹·right (n, m) of a positive definite matrix; None of another.

    Of more than a few columns by torch: the LAPACK of SciPy would start threads.
    """
    if matrix.shape[0] <= _FEW:
        _, solved, info = lapack.dposv(matrix, right, lower=1)
        return None if info else solved
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    return None if int(info) else torch.cholesky_solve(torch.from_numpy(right), factor).numpy()


def _diagonal(matrix: Array) -> Array:
    """The diagonal (n,) of a square matrix, to write to."""
    diagonal: Array = numpy.einsum("ii->i", matrix)
    return diagonal

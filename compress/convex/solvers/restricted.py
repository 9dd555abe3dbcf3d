"""A working set of the multitask lasso, dense: exact semismooth Newton steps, and ADMM rounds where they do not pay.

The Newton system of a working set with a active units has a·s·D unknowns but, by the Woodbury identity, needs only
factorisations of size a·s and a for any number D of outputs (block form for s columns a unit).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from compress.convex.lasso import unit_norms
from compress.convex.solvers.scaled import ScaledProblem, expand, scaled_gap, soft_threshold
from compress.convex.statistics.moments import unit_columns
from compress.errors import MomentsError

_ADMM_ROUNDS = 32
_NEWTON_GAP = 1e-2  # above it the support is far off and ADMM rounds do more
_RELAXATION = 1.6


@dataclass(frozen=True, eq=False)
class Restricted:
    """The scaled problem on a working set: all arrays dense and small."""

    gram: Tensor
    cross: Tensor
    thresholds: Tensor
    energy: float
    group_size: int

    @classmethod
    def of(cls, problem: ScaledProblem, working: Tensor) -> Restricted:
        return cls(
            gram=problem.block(working),
            cross=problem.cross.index_select(0, unit_columns(working, problem.group_size)),
            thresholds=problem.thresholds[working],
            energy=problem.energy,
            group_size=problem.group_size,
        )

    def use_fewer_outputs(self) -> tuple[Restricted, Tensor | None]:
        """Turn D > |W|·s outputs to the |W|·s that H_W spans: rows of an optimal X lie in the row space of T."""
        if self.cross.shape[0] >= self.cross.shape[1]:
            return self, None
        rotation, upper = torch.linalg.qr(self.cross.T)  # (D, n), (n, n)
        return replace(self, cross=upper.T.contiguous()), rotation

    @cached_property
    def step(self) -> Tensor:
        """A proximal step length (w,) of every unit, at most 1/λ_max of its block."""
        s = self.group_size
        blocks = self.gram.reshape(-1, s, self.gram.shape[0] // s, s).diagonal(dim1=0, dim2=2)  # (s, s, w)
        lengths: Tensor = 1 / torch.linalg.vector_norm(blocks, dim=(0, 1))
        return lengths

    def gap(self, point: Tensor, correlation: Tensor) -> tuple[float, float, Tensor]:
        return scaled_gap(point, correlation, self.cross, self.thresholds, self.energy, self.group_size)

    def minimise(self, point: Tensor, tolerance: float, max_iterations: int, deadline: float) -> tuple[Tensor, int]:
        """Newton steps while they pay, ADMM rounds where they do not."""
        correlation = self.cross - self.gram @ point
        objective, gap, _ = self.gap(point, correlation)
        iterations, short_steps, admm = 0, 0, None
        newton_next, stalled_at = gap < _NEWTON_GAP, float("inf")
        best, best_gap = point, gap
        while gap > tolerance and iterations < max_iterations and time.monotonic() < deadline:
            moved = self._newton_move(point, correlation, objective, gap) if newton_next else None
            if moved is None:
                admm = admm or _Admm(self)
                resume = abs(objective - stalled_at) <= 1e-9 * objective  # Newton came back to where it stalled before
                stalled_at = objective
                point, correlation = admm.run(point, correlation, _ADMM_ROUNDS, resume=resume)
                iterations += _ADMM_ROUNDS
                newton_next, short_steps = True, 0
            else:
                iterations += 1
                point, correlation, length = moved
                short_steps = short_steps + 1 if length < 0.3 else 0
                newton_next = short_steps < 2
            objective, gap, _ = self.gap(point, correlation)
            if gap < best_gap:
                best, best_gap = point, gap
        return best, iterations

    def _newton_move(
        self, point: Tensor, correlation: Tensor, objective: float, gap: float
    ) -> tuple[Tensor, Tensor, float] | None:
        """The point after a Newton step that lowers the objective, its correlation, and the step's length."""
        norms = unit_norms(point, self.group_size)
        square = norms.square()
        ratios = torch.where(norms > 0, 0.0, unit_norms(correlation, self.group_size) / self.thresholds)
        for entering in ("all", "worst", "none"):
            at_prox = entering != "none"
            out = torch.zeros_like(norms, dtype=torch.bool)
            if entering == "worst":
                worst = int(ratios.argmax())
                if ratios[worst] <= 1:
                    continue
                out = norms == 0
                out[worst] = False
            never, turning = out, None
            for attempt in range(4):
                step = self._newton_step(point, correlation, at_prox, out)
                if step is None:
                    break
                inner = self._along(point, step)  # below −‖v‖²: the full step turns the unit round
                turned = (inner < -square) & ~out & (norms > 0)
                if attempt == 0:
                    plain = step
                    turning, crossing = turned, torch.where(turned, -square / inner, torch.inf)
                if not bool(turned.any()):
                    break
                if attempt < 3:
                    out = out | turned
            if step is None:
                continue
            lengths = (1.0, 0.5, 0.25) if at_prox else (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)
            moved = self._search(point, correlation, step, objective, gap, lengths)
            if moved is not None:
                return moved
            if turning is None or not bool(turning.any()):
                continue
            first = crossing.sort().values  # up to the first unit that reaches zero, or a few of them
            for number in (int(turning.sum()) // 4, 0):
                reached = crossing <= first[number]
                step = self._newton_step(point, correlation, at_prox, reached | never)
                if step is not None:
                    moved = self._search(point, correlation, step, objective, gap, (1.0, float(first[number])))
                    if moved is not None:
                        return moved
            trial = point + float(first[0]) * plain
            trial[expand(crossing <= first[0], self.group_size)] = 0
            moved = self._search(point, correlation, trial - point, objective, gap, (1.0, 0.1))
            if moved is not None:
                return moved
        return None

    def _search(
        self,
        point: Tensor,
        correlation: Tensor,
        step: Tensor,
        objective: float,
        gap: float,
        lengths: tuple[float, ...],
    ) -> tuple[Tensor, Tensor, float] | None:
        s, w = self.group_size, self.thresholds
        image = self.gram @ step
        slope, curvature = float((step * correlation).sum()), float((step * image).sum())
        penalised = float((w * unit_norms(point, s)).sum())
        for length in lengths:
            trial = point + length * step
            change = length * (length * curvature / 2 - slope)
            change += float((w * unit_norms(trial, s)).sum()) - penalised
            if change < -1e-14 * objective:
                return trial, correlation - length * image, length
            if length == 1.0 and change < 1e-10 * objective:
                moved = correlation - image
                if self.gap(trial, moved)[1] < 0.5 * gap:
                    return trial, moved, 1.0
        return None

    def _newton_step(self, point: Tensor, correlation: Tensor, at_prox: bool, out: Tensor) -> Tensor | None:
        """Semismooth Newton direction of X = prox(X + τ(T − CX)), with the units in `out` sent to zero.

        On the rows that the prox leaves nonzero, with b their values after it, b̂ = b/‖b‖ and d = w/‖b‖:
        (C_AA + diag d)Δ − d·b̂⟨b̂, Δ⟩ = right-hand side; the other rows go to zero. Without `at_prox`, τ = 0: the
        Newton direction on the nonzero rows, which is one of descent when `out` is empty.
        """
        s, w = self.group_size, self.thresholds
        tau = self.step if at_prox else torch.zeros_like(self.step)
        z = point + expand(tau, s)[:, None] * correlation if at_prox else point
        norms = unit_norms(z, s)
        active = ((norms > tau * w) & ~out).nonzero()[:, 0]
        step = -point
        if not active.numel():
            return step
        index = unit_columns(active, s)
        norm_a, tau_a, w_a = norms[active], tau[active], w[active]
        shrunk = norm_a - tau_a * w_a  # ‖b‖
        direction = z[index] / expand(norm_a, s)[:, None]  # b̂
        # −F M⁻¹/τ with F = X − b and M = (1 − ρ)I + ρ b̂b̂ᵀ, ρ = τw/‖z‖:  C − w b̂ + the part of X across b̂ that is lost
        x_a = point[index]
        along = self._along(direction, x_a)
        across = x_a - expand(along, s)[:, None] * direction
        d = w_a / shrunk
        right = correlation[index] - expand(w_a, s)[:, None] * direction - expand(d, s)[:, None] * across
        leaving = ((unit_norms(point, s) > 0) & ~((norms > tau * w) & ~out)).nonzero()[:, 0]
        if leaving.numel():
            gone = unit_columns(leaving, s)
            right = right + self.gram[index[:, None], gone] @ point[gone]
        solved = _woodbury(self.gram[index[:, None], index], d, direction, right, s)
        if solved is None:
            return None
        step[index] = solved
        return step

    def _along(self, direction: Tensor, rows: Tensor) -> Tensor:
        product = (direction * rows).sum(1)
        return product if self.group_size == 1 else product.reshape(-1, self.group_size).sum(1)


def _woodbury(gram: Tensor, d: Tensor, direction: Tensor, right: Tensor, s: int) -> Tensor | None:
    """Solve (C + diag d)Δ − Σ_k d_k e_ke_kᵀ ⊗ b̂_kb̂_kᵀ Δ = right (a·s, D) by two factorisations (a·s and a).

    Everything is scaled by d^(−1/2): Q = I + d^(−1/2) C d^(−1/2), then S = I − blocksum(Q⁻¹ ∘ B̂B̂ᵀ), which is
    singular where C is (twins, N < K·s): C gets the smallest of a few tiny diagonals that makes S factorisable.
    """
    root = expand(d.rsqrt(), s)
    base = gram * root[:, None] * root
    a = d.shape[0]
    outer = direction @ direction.T
    for shift in (1e-12, 1e-10, 1e-8):
        q = base.clone()
        q.diagonal().add_(1 + shift * root.square())
        factor, info = torch.linalg.cholesky_ex(q)
        if int(info):
            continue
        inverse = torch.cholesky_inverse(factor)
        coupling = inverse * outer
        if s > 1:
            coupling = coupling.reshape(a, s, a, s).sum((1, 3))
        coupling.neg_().diagonal().add_(1)
        second, info = torch.linalg.cholesky_ex(coupling)
        if int(info):
            continue
        y = inverse @ (root[:, None] * right)  # (a·s, D)
        projected = (direction * y).sum(1)
        if s > 1:
            projected = projected.reshape(a, s).sum(1)
        beta = torch.cholesky_solve(projected[:, None], second)[:, 0]
        y = torch.addmm(y, inverse, expand(beta, s)[:, None] * direction)
        return y.mul_(root[:, None])
    return None


class _Admm:
    """Over-relaxed ADMM on a restricted problem with residual balancing; keeps its factorisation between rounds."""

    def __init__(self, problem: Restricted) -> None:
        self.problem = problem
        self.rho = 0.0
        self.inverse = problem.gram
        self.thresholds = problem.thresholds  # w/ρ
        self.solved = problem.cross  # inverse · cross
        self.point: Tensor | None = None
        self.dual = problem.cross

    def run(self, point: Tensor, correlation: Tensor, rounds: int, *, resume: bool = False) -> tuple[Tensor, Tensor]:
        """`rounds` iterations from this point, or, with `resume`, from where the last run ended."""
        problem = self.problem
        s, w = problem.group_size, problem.thresholds
        if self.rho == 0.0:
            norms = unit_norms(point, s)
            known = norms > 0
            guess = float((w[known] / norms[known]).median()) if bool(known.any()) else 0.1
            self._factor(guess)
        resume = self.point is not None and (resume or point is self.point)
        z = self.point if resume and self.point is not None else point
        # one array q = z + u; z is its shrinkage, and q ← q + α(x − z) with x the minimiser at 2z − q
        q = (self.dual if resume else correlation) / self.rho + z
        for round_ in range(1, rounds + 1):
            x = torch.addmm(self.solved, self.inverse, torch.lerp(q, z, 2.0), alpha=self.rho)
            check = round_ % 8 == 0
            moved = x.sub_(z)
            q.add_(moved, alpha=_RELAXATION)
            new = soft_threshold(q, self.thresholds, s)
            if check:
                self._balance(z, moved, new, q)
            z = new
        self.point, self.dual = z, (q - z) * self.rho
        return z, problem.cross - problem.gram @ z

    def _balance(self, old: Tensor, moved: Tensor, new: Tensor, q: Tensor) -> None:
        """Another ρ where primal and dual residuals are far apart; q = z + u is changed to match."""
        step = new - old
        x_norm = torch.linalg.vector_norm(old + moved)
        parts = (torch.linalg.vector_norm(moved - step), x_norm, torch.linalg.vector_norm(step))
        u = q - new
        primal, size, dual, scale = torch.stack([*parts, torch.linalg.vector_norm(u)]).tolist()
        primal, dual = primal / max(size, 1e-300), dual / max(scale, 1e-300)
        if not (primal > 0 and dual > 0):
            return
        factor = min(10.0, max(0.1, (primal / dual) ** 0.5))
        if 0.4 < factor < 2.5:
            return
        before = self.rho
        self._factor(before * factor)
        q.copy_(new).add_(u, alpha=before / self.rho)

    def _factor(self, rho: float) -> None:
        self.rho = min(max(rho, 1e-7), 1e3)
        while True:
            shifted = self.problem.gram.clone()
            shifted.diagonal().add_(self.rho)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if not int(info):
                break
            if self.rho > 1e6:
                raise MomentsError("the gram matrix is not positive semidefinite: these are moments of no samples.")
            self.rho *= 10
        self.inverse = torch.cholesky_inverse(factor)
        self.solved = self.inverse @ self.problem.cross
        self.thresholds = self.problem.thresholds / self.rho

"""Exact reductions before a solve: dead units, multiples of a unit, outputs beyond the rank. Each maps back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, on_host, unit_norms
from compress.convex.statistics.eigen import eigen_decomposition
from compress.convex.statistics.moments import Moments, unit_columns

_FEW_OUTPUTS, _MANY_OUTPUTS = 32, 1024  # outside of these a rotation saves nothing, or costs more than it saves


@dataclass(frozen=True, eq=False)
class Reduction:
    """A smaller problem with the same minimum, and the way back.

    Attributes:
        problem: the reduced problem.
        units: units of the whole problem that are left (k,), sorted; None: all.
        rotation: Q (D, d) with ΨQ in place of Ψ; None: all outputs.
        dead: number of units dropped because their feature is zero.
        merged: number of units dropped because they are a multiple of a unit that costs no more.
    """

    problem: MultitaskLasso
    units: Tensor | None
    rotation: Tensor | None
    dead: int
    merged: int

    def shrink(self, coefficients: Tensor, whole: MultitaskLasso) -> Tensor:
        """V of the whole problem as a starting point of the reduced one."""
        if self.units is not None:
            coefficients = coefficients[unit_columns(self.units, whole.moments.group_size)]
        return coefficients if self.rotation is None else coefficients @ self.rotation

    def restore(self, coefficients: Tensor, whole: MultitaskLasso) -> Tensor:
        """V of the whole problem, with the same objective; dropped units get zero rows."""
        if self.rotation is not None:
            coefficients = coefficients @ self.rotation.T
        if self.units is None:
            return coefficients
        full = torch.zeros_like(whole.moments.cross)
        full[unit_columns(self.units, whole.moments.group_size)] = coefficients
        return full


def reduce_problem(problem: MultitaskLasso) -> Reduction:
    """Drop dead units, merge exact multiples (the one with the least c_k/‖φ_k‖ stays), rotate to rank(H) outputs.

    Why nothing changes: a zero feature earns nothing; φ_j = aφ_i can do no more than φ_i, at c_j/|a| instead of c_i;
    and projecting V on the row space of H = ΦᵀΨ/N raises no term of the objective.
    """
    moments = problem.moments
    energies = on_host(moments.unit_energies)
    alive = energies > 0
    keep = alive.copy()
    for i, j in moments.multiples:
        if keep[i] and keep[j]:
            prices = on_host(problem.costs)[[i, j]] / numpy.sqrt(energies[[i, j]])
            keep[j if prices[0] <= prices[1] else i] = False
    everything = bool(keep.all()) or not keep.any()
    units = None if everything else torch.from_numpy(keep.nonzero()[0]).to(moments.covariance.device)
    reduced = moments if units is None else moments.subset(units)
    costs = problem.costs if units is None else problem.costs[units]
    rotation = _row_space(reduced, problem.penalty, costs)
    if rotation is not None:
        reduced = reduced.rotated(rotation)
    dead = alive.size - int(alive.sum())
    merged = 0 if units is None else moments.unit_count - units.numel() - dead
    small = problem if units is None and rotation is None else MultitaskLasso(reduced, problem.penalty, costs)
    return Reduction(small, units, rotation, dead, merged)


def _row_space(moments: Moments, penalty: float, costs: Tensor) -> Tensor | None:
    """Q (D, d), d ≤ 0.7·D, such that what H loses is below 1e-4 of every unit's threshold; None if there is none."""
    cross = moments.cross
    n, d = cross.shape
    if not _FEW_OUTPUTS <= d <= _MANY_OUTPUTS or not bool(cross.any()):
        return None
    if d > n:
        if n > 2048:
            return None if n > 0.7 * d else torch.as_tensor(torch.linalg.qr(cross.T)[0])
        values, left = eigen_decomposition(cross @ cross.T)
        kept = values > 1e-15 * float(values[-1])
        vectors = torch.linalg.qr(cross.T @ left[:, kept])[0] if bool(kept.any()) else cross.T[:, :0]
        kept = torch.ones(vectors.shape[1], dtype=torch.bool, device=cross.device)
    else:
        square = cross.T @ cross
        square.diagonal().mul_(1 + 1e-15)
        factor, info = torch.linalg.cholesky_ex(square)
        pivots = factor.diagonal()
        if not int(info) and float(pivots.min()) > 1e-6 * float(pivots.max()):
            return None  # full rank, at a third of the price of its eigenvalues
        values, vectors = eigen_decomposition(square)
        kept = values > 1e-15 * float(values[-1])
    if int(kept.sum()) > 0.7 * d or not bool(kept.any()):
        return None
    rotation = vectors[:, kept]
    lost = unit_norms(cross - (cross @ rotation) @ rotation.T, moments.group_size)
    return rotation if bool((lost <= 1e-4 * penalty * costs).all()) else None

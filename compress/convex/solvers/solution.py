"""What a solver is given and what it gives back."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, relative_gap, unit_norms
from compress.convex.moments import unit_columns


@dataclass(frozen=True, eq=False)
class Solution:
    """A point, and a certificate that was computed from it and the moments alone.

    Attributes:
        coefficients: V (K·s, D).
        penalty: λ of the penalised problem that V solves; 0 for the exact form.
        objective: ½‖Ψ − ΦV‖²_F/N + λΣc_k‖v_k‖ (penalised), Σc_k‖v_k‖ (tolerance and exact form).
        gap: relative duality gap; the objective is at most objective·gap above its minimum.
        active: units (n,) with v_k ≠ 0, sorted.
        status: why the solver stopped, in words; starts with "certified" where `gap` is within the tolerance.
        iterations: of the solver's inner loop.
        solver: its name in `SOLVERS`.
        error: ‖Ψ − ΦV‖_F/‖Ψ‖_F.
        rounding: part of `gap` that rounding in the moments may hide: no solver gets below it.
    """

    coefficients: Tensor
    penalty: float
    objective: float
    gap: float
    active: Tensor
    status: str
    iterations: int
    solver: str = "newton"
    error: float = 0.0
    rounding: float = 0.0

    @property
    def certified(self) -> bool:
        """Whether the gap is within the tolerance that was asked for."""
        return self.status.startswith("certified")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver's core returns: scaled coefficients, iterations, and why it stopped."""

    coefficients: Tensor
    iterations: int
    reason: str


class ScaledProblem:
    """min ½⟨X, CX⟩ − ⟨X, T⟩ + ½ + Σ_k w_k‖x_k‖: the lasso with columns and outputs of energy one.

    X = diag(g)·V/√E, C_ij = G_ij/(g_i g_j), T = H/(g√E), w_k = λc_k/(g_k√E) with g_k² the mean second moment of unit
    k's columns and E = ‖Ψ‖²_F/N. Every solver works here, so none sees the scale of Φ, Ψ or a unit. `gram` is not
    copied; rows are scaled as they are read.
    """

    def __init__(self, problem: MultitaskLasso) -> None:
        moments = problem.moments
        s = moments.group_size
        self.group_size = s
        self.raw_gram = moments.gram
        energies = moments.gram.diagonal().reshape(-1, s).mean(1)  # (K,)
        self.unit_scale = energies.clamp_min(0).sqrt()
        dead = ~(self.unit_scale > 0)
        self.unit_scale = torch.where(dead, 1.0, self.unit_scale)
        self.scale = self.unit_scale.repeat_interleave(s)  # (K·s,)
        self.root_energy = moments.energy**0.5 if moments.energy > 0 else 1.0
        self.energy = 1.0 if moments.energy > 0 else 0.0
        self.cross = moments.cross / (self.scale[:, None] * self.root_energy)
        self.thresholds = problem.penalty * problem.costs / (self.unit_scale * self.root_energy)  # (K,)
        # ‖Φ_kᵀR‖ ≤ ‖Φ_k‖‖Ψ‖ at any V no worse than 0: such units are zero in every solution (safe screening)
        self.dead = dead
        self.candidates = self._candidates()

    def _candidates(self) -> Tensor:
        return (~self.dead & (math.sqrt(self.group_size) * self.energy * (1 + 1e-9) >= self.thresholds)).nonzero()[:, 0]

    def with_penalty_times(self, factor: float) -> ScaledProblem:
        """The same problem for another λ; arrays are shared."""
        other = copy(self)
        other.thresholds = self.thresholds * factor
        other.candidates = other._candidates()
        return other

    def gap_at(self, coefficients: Tensor) -> float:
        """Relative duality gap of X."""
        correlation = self.cross.clone()
        support = (unit_norms(coefficients, self.group_size) > 0).nonzero()[:, 0]
        if support.numel():
            correlation.addmm_(self.rows(support).T, coefficients[unit_columns(support, self.group_size)], alpha=-1)
        return self.gap(coefficients, correlation)[1]

    @property
    def unit_count(self) -> int:
        return self.thresholds.shape[0]

    def rows(self, units: Tensor) -> Tensor:
        """C[units] (|units|·s, K·s)."""
        index = unit_columns(units, self.group_size)
        rows: Tensor = self.raw_gram.index_select(0, index).div_(self.scale[index, None]).div_(self.scale)
        return rows

    def block(self, units: Tensor) -> Tensor:
        """C[units, units]."""
        index = unit_columns(units, self.group_size)
        part = self.raw_gram.index_select(0, index).index_select(1, index)
        part.div_(self.scale[index, None]).div_(self.scale[index])
        return part

    def to_scaled(self, coefficients: Tensor) -> Tensor:
        return coefficients.to(self.cross) * (self.scale[:, None] / self.root_energy)

    def from_scaled(self, coefficients: Tensor) -> Tensor:
        return coefficients * (self.root_energy / self.scale[:, None])

    def gap(self, coefficients: Tensor, correlation: Tensor) -> tuple[float, float, Tensor]:
        """Objective, relative duality gap and ratios ‖C_k‖/w_k (K,), for X and its T − CX."""
        return scaled_gap(coefficients, correlation, self.cross, self.thresholds, self.energy, self.group_size)


def scaled_gap(
    coefficients: Tensor, correlation: Tensor, cross: Tensor, thresholds: Tensor, energy: float, group_size: int
) -> tuple[float, float, Tensor]:
    """The certificate of `lasso.certificate` for thresholds w_k = λc_k; works on a subset of units as well."""
    inner = float((coefficients * correlation).sum())
    fit = energy - float((coefficients * cross).sum()) - inner
    fit = 0.0 if fit < 0 else fit
    penalised = float((thresholds * unit_norms(coefficients, group_size)).sum())
    ratios = unit_norms(correlation, group_size) / thresholds.clamp_min(torch.finfo(torch.float64).tiny)
    largest = float(ratios.max()) if ratios.numel() else 0.0
    t = 1.0 if largest <= 1 else 1 / largest
    objective = fit / 2 + penalised
    gap = (1 - t) ** 2 * fit / 2 + penalised - t * inner
    return objective, relative_gap(gap, objective), ratios


def soft_threshold(points: Tensor, thresholds: Tensor, group_size: int) -> Tensor:
    """Row-block shrinkage: z_k·max(0, 1 − w_k/‖z_k‖)."""
    norms = unit_norms(points, group_size)
    factor = torch.where(norms > thresholds, 1 - thresholds / norms, 0.0)
    return points * expand(factor, group_size)[:, None]


def expand(per_unit: Tensor, group_size: int) -> Tensor:
    """(K,) repeated for every column of a unit (K·s,)."""
    return per_unit if group_size == 1 else per_unit.repeat_interleave(group_size)

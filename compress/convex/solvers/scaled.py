"""The problem as every solver sees it: columns and outputs of energy one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, dual_gap, on_host, relative_gap, unit_norms
from compress.convex.statistics.moments import unit_columns

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a solver's core returns: scaled coefficients, iterations, and why it stopped short; empty if it did not."""

    coefficients: Tensor
    iterations: int
    reason: str


@dataclass(frozen=True, eq=False)
class ScaledProblem:
    """min ½⟨X, CX⟩ − ⟨X, T⟩ + ½E + Σ_k w_k‖x_k‖: the lasso with columns and outputs of energy one.

    X = diag(g)·V/√E_Ψ, C_ij = G_ij/(g_i g_j), T = H/(g√E_Ψ), w_k = λc_k/(g_k√E_Ψ) with g_k² the mean second moment of
    unit k's columns and E_Ψ = ‖Ψ‖²_F/N. Every solver works here, so none sees the scale of Φ, Ψ or a unit. `raw_gram`
    is not copied; rows are scaled as they are read.

    Attributes:
        raw_gram: G (K·s, K·s).
        scale: g (K·s,), one for dead units.
        root_energy: √E_Ψ.
        cross: T (K·s, D).
        thresholds: w (K,).
        dead: units (K,) whose features are zero.
        energy: E, of the scaled outputs: 1, or 0 where Ψ = 0.
        group_size: s.
    """

    raw_gram: Tensor
    scale: Tensor
    root_energy: float
    cross: Tensor
    thresholds: Tensor
    dead: Tensor
    energy: float
    group_size: int

    @classmethod
    def of(cls, problem: MultitaskLasso) -> ScaledProblem:
        """The scaled form of a problem."""
        moments = problem.moments
        s = moments.group_size
        sizes = moments.unit_sizes[0] / math.sqrt(s)  # (K,)
        dead = sizes <= 0
        sizes[dead] = 1.0
        root_energy = math.sqrt(moments.energy) if moments.energy > 0 else 1.0
        device = moments.gram.device
        scale = expand(torch.from_numpy(sizes).to(device), s)
        return cls(
            raw_gram=moments.gram,
            scale=scale,
            root_energy=root_energy,
            cross=(moments.cross / scale[:, None]).div_(root_energy),
            thresholds=torch.from_numpy(problem.penalty * on_host(problem.costs) / (sizes * root_energy)).to(device),
            dead=torch.from_numpy(dead).to(device),
            energy=1.0 if moments.energy > 0 else 0.0,
            group_size=s,
        )

    @cached_property
    def candidates(self) -> Tensor:
        """Units that may be active: ‖Φ_kᵀR‖ ≤ ‖Φ_k‖‖Ψ‖ at any V no worse than 0 (safe screening)."""
        most = math.sqrt(self.group_size * max(0.0, self.energy)) * (1 + 1e-9)
        return (~self.dead & (most >= self.thresholds)).nonzero()[:, 0]

    @property
    def unit_count(self) -> int:
        """K."""
        return self.thresholds.shape[0]

    def correlation(self, coefficients: Tensor, support: Tensor) -> Tensor:
        """T − CX (K·s, D) of an X whose units outside of `support` are zero."""
        if not support.numel():
            return self.cross
        index = unit_columns(support, self.group_size)
        return torch.addmm(self.cross, self.rows(support).T, coefficients[index], alpha=-1)

    def gap_at(self, coefficients: Tensor) -> float:
        """Relative duality gap of X."""
        support = (unit_norms(coefficients, self.group_size) > 0).nonzero()[:, 0]
        return self.gap(coefficients, self.correlation(coefficients, support))[1]

    def gap(self, coefficients: Tensor, correlation: Tensor) -> tuple[float, float, Tensor]:
        """Objective, relative duality gap and ratios ‖C_k‖/w_k (K,), for X and its T − CX."""
        return scaled_gap(coefficients, correlation, self.cross, self.thresholds, self.energy, self.group_size)

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
        """X of a V."""
        return coefficients.to(self.cross) * (self.scale[:, None] / self.root_energy)

    def from_scaled(self, coefficients: Tensor) -> Tensor:
        """V of an X."""
        return (coefficients / self.scale[:, None]).mul_(self.root_energy)


def scale_problems(problems: Sequence[MultitaskLasso]) -> list[ScaledProblem]:
    """The scaled form of every problem; those of the same moments share all arrays but the thresholds."""
    firsts: dict[int, ScaledProblem] = {}
    scaled = []
    for problem in problems:
        first = firsts.get(id(problem.moments))
        if first is None:
            first = firsts[id(problem.moments)] = ScaledProblem.of(problem)
        unit_scale = first.scale[:: first.group_size]
        scaled.append(replace(first, thresholds=problem.penalty * problem.costs / (unit_scale * first.root_energy)))
    return scaled


def scaled_gap(
    coefficients: Tensor, correlation: Tensor, cross: Tensor, thresholds: Tensor, energy: float, group_size: int
) -> tuple[float, float, Tensor]:
    """The certificate of `lasso.certificate` for thresholds w_k = λc_k; works on a subset of units as well."""
    inner = (coefficients * correlation).sum()
    fit = (energy - (coefficients * cross).sum() - inner).clamp_min(0)
    penalised = (thresholds * unit_norms(coefficients, group_size)).sum()
    ratios = unit_norms(correlation, group_size) / thresholds.clamp_min(_TINY)
    largest = ratios.max() if ratios.numel() else fit.new_zeros(())
    gap, objective = torch.stack(
        [dual_gap(fit, penalised, inner, 1 / largest.clamp_min(1)), fit / 2 + penalised]
    ).tolist()
    return objective, relative_gap(gap, objective), ratios


def soft_threshold(points: Tensor, thresholds: Tensor, group_size: int) -> Tensor:
    """Row-block shrinkage: z_k·max(0, 1 − w_k/‖z_k‖)."""
    norms = unit_norms(points, group_size)
    factor = torch.addcdiv(torch.ones_like(norms), thresholds, norms, value=-1).clamp_min_(0)  # −∞, so 0, where z_k = 0
    return points * expand(factor, group_size)[:, None]


def expand(per_unit: Tensor, group_size: int) -> Tensor:
    """(K,) repeated for every column of a unit (K·s,)."""
    return per_unit if group_size == 1 else per_unit.repeat_interleave(group_size)

"""Held-back errors after a refit for every width of a nested order: each ridge is factored once for all widths.

The first columns of a Cholesky factor are the factor of the first columns. With the ridge pulling to the weights as
they are, (G + ρD)V = H + ρDV₀ for the kept columns alone, whose right side is nested too: a width costs a triangular
solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.convex import Moments
from compress.convex.refit import factored_with, relative

TINY = torch.finfo(torch.float64).tiny
CONSTANT = 1e-20  # squared spread, relative to the second moment, that is rounding
OVERFIT = 1.02  # held-back over fitting error, above which a refit fits noise


@dataclass(frozen=True)
class Errors:
    """Relative errors of one refit, on the samples that it was fitted to and on held-back ones."""

    fitting: float
    held_back: float

    @property
    def fits_noise(self) -> bool:
        """Whether held-back samples err clearly more."""
        return not self.held_back <= OVERFIT * self.fitting


def best_ridge(errors_at: Callable[[int], Errors], count: int, start: int = 0, *, scarce: bool = False) -> int:
    """Place of the ridge, of `count` rising ones, around `start` whose held-back error is the smallest.

    Stronger ones are tried as long as the refit fits noise and the error falls; weaker ones than the start as long as
    it falls.

    Args:
        scarce: rows are few, so that the fitting error says nothing.
    """
    place, best = start, errors_at(start)
    while place > 0 and (weaker := errors_at(place - 1)).held_back < best.held_back:
        place, best = place - 1, weaker
    while place + 1 < count and place >= start and (scarce or best.fits_noise):
        stronger = errors_at(place + 1)
        if not stronger.held_back < best.held_back:
            break
        place, start, best = place + 1, place + 1, stronger
    return place


def about_the_mean(moments: Moments, *, intercept: bool) -> bool:
    """Whether errors are relative to Ψ's spread: a constant is free, and Ψ is not nothing but one."""
    return intercept and moments.centred_energy > CONSTANT * moments.energy


def total_energy(moments: Moments, *, intercept: bool) -> float:
    """What errors are relative to: ‖Ψ − mean Ψ‖²/N or ‖Ψ‖²/N."""
    return moments.centred_energy if about_the_mean(moments, intercept=intercept) else moments.energy


@dataclass(frozen=True, eq=False)
class Halfway:
    """What all widths share at one ridge: L (n, n), L⁻¹S(H + ρDV₀) (n, D), and the ridge ρ that L took."""

    factor: Tensor
    solved: Tensor
    ridge: float


@dataclass(eq=False)
class NestedRefits:
    """Refits of one reading to the first units of an order.

    Attributes:
        part, check: fitting and held-back moments as they were recorded.
        columns: (K·s,) of the units in the order.
        before: weights V₀ (K·s, D) as they are, rows in the order.
        ridges: rising, relative to each column's second moment.
        intercept: a constant is free.
        scarce: rows are few.
        spare: matrices of all columns are so large that one factor is held, and the ridge that was best at the first
            width below all units is that of the others.
    """

    part: Moments
    check: Moments
    columns: Tensor
    before: Tensor
    ridges: tuple[float, ...]
    intercept: bool
    scarce: bool
    spare: bool = False
    place: int = 0
    _settled: bool = False
    _solved: dict[int, Halfway] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fitted = self.part.centred() if self.intercept else self.part
        self._energy = fitted.energy
        self._squares = fitted.gram.diagonal()[self.columns]
        self._scale = torch.where(self._squares > 0, self._squares.clamp_min(TINY).rsqrt(), 0.0)
        self._gram = fitted.gram[self.columns[:, None], self.columns]
        self._gram.mul_(self._scale[:, None]).mul_(self._scale)
        self._cross = fitted.cross[self.columns]
        self._checked = None if self.spare else self.check.covariance[self.columns[:, None], self.columns]

    def held_back_error(self, width: int, enough: float = 0.0) -> float:
        """The relative error with so many units, at the best ridge near the last one; at that, where it is `enough`."""
        known: dict[int, Errors] = {}

        def errors_at(place: int) -> Errors:
            if place not in known:
                known[place] = self.errors(width, place)
            return known[place]

        if self._settled or errors_at(self.place).held_back <= enough:
            return errors_at(self.place).held_back
        self._settled = self.spare and width < self.part.unit_count
        self.place = best_ridge(errors_at, len(self.ridges), self.place, scarce=self.scarce)
        return known[self.place].held_back

    def errors(self, width: int, place: int) -> Errors:
        """Those with so many units at one ridge."""
        last, halfway = width * self.part.group_size, self._halfway(place)
        triangle, scale, before = halfway.factor[:last, :last], self._scale[:last, None], self.before[:last]
        weights = torch.linalg.solve_triangular(triangle.mT, halfway.solved[:last], upper=True).mul_(scale)
        weights = torch.where(scale > 0, weights, before)  # constant columns keep theirs
        penalty = halfway.ridge * (weights * (before - weights)).mul_(self._squares[:last, None]).sum()
        left = self._energy - float((weights * self._cross[:last]).sum() - penalty)
        bias = None
        if self.intercept:
            bias = self.part.output_mean - weights.T @ self.part.feature_mean[self.columns[:last]]
        fitting = relative(left, total_energy(self.part, intercept=self.intercept))
        return Errors(fitting, self._held_back_error(weights, bias))

    def _halfway(self, place: int) -> Halfway:
        if place not in self._solved:
            if self.spare:
                self._solved.clear()
            factor, ridge = factored_with(self._gram, self.ridges[place])
            pulled = self.before * (ridge * self._scale * self._squares)[:, None]
            pulled.addcmul_(self._cross, self._scale[:, None])
            solved = torch.linalg.solve_triangular(factor, pulled, upper=False)
            self._solved[place] = Halfway(factor, solved, ridge)
        return self._solved[place]

    def _held_back_error(self, weights: Tensor, bias: Tensor | None) -> float:
        """Relative error of weights V (m, D) of the first columns alone, and of a constant b (D,)."""
        check, last = self.check, len(weights)
        first = self.columns[:last]
        if self._checked is None:
            whole = weights.new_zeros(len(self.columns), weights.shape[1]).index_copy_(0, first, weights)
            product = (check.covariance @ whole)[first]
        else:
            product = self._checked[:last, :last] @ weights
        fitted = (product.neg_().add_(check.cross_covariance[first], alpha=2)).mul_(weights).sum()
        moved = check.output_mean - weights.T @ check.feature_mean[first]
        moved = moved if bias is None else moved - bias
        left = max(0.0, check.centred_energy - float(fitted)) + float(moved.square().sum())
        return relative(left, total_energy(check, intercept=bias is not None))

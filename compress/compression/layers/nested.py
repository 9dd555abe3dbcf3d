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
WORTH = 2.0  # widths tried one by one whose work one that serves all down to a width may take
MARGIN = 32  # part of the units further down that it serves too
FAR = 1.1  # times an error that is enough, above which no other ridge than that of another width leads to it
WHOLES = 3  # ridges whose weights of all units are held, the last ones


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


@dataclass(frozen=True, eq=False)
class Energies:
    """What the errors of a refit are made of, per width where they are of several.

    Attributes:
        left: ‖Ψ − ΦV‖² on the fitting samples.
        checked: ‖Ψ − ΦV‖² about its mean on the held-back ones.
        moved: the mean (…, D) of it there.
    """

    left: Tensor
    checked: Tensor
    moved: Tensor


@dataclass(frozen=True, eq=False)
class Whole:
    """The refit to all units at one ridge: V (n, D), CV (n, D) with C of the held-back samples, and its energies."""

    weights: Tensor
    product: Tensor
    energies: Energies


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
    _sought: bool = False
    _solved: dict[int, Halfway] = field(default_factory=dict)
    _wholes: dict[int, Whole] = field(default_factory=dict)
    _tails: dict[int, list[Errors]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fitted = self.part.centred() if self.intercept else self.part
        self._energy = fitted.energy
        self._squares = fitted.gram.diagonal()[self.columns]
        self._scale = torch.where(self._squares > 0, self._squares.clamp_min(TINY).rsqrt(), 0.0)
        self._gram = fitted.gram[self.columns[:, None], self.columns]
        self._gram.mul_(self._scale[:, None]).mul_(self._scale)
        self._cross = fitted.cross[self.columns]
        self._checked = None if self.spare else self.check.covariance[self.columns[:, None], self.columns]
        self._mean, self._shifts = self.check.output_mean, self.check.feature_mean[self.columns]
        if self.intercept:  # of what is left once the constant is fitted
            self._mean = self._mean - self.part.output_mean
            self._shifts = self._shifts - self.part.feature_mean[self.columns]

    def held_back_error(self, width: int, enough: float = 0.0) -> float:
        """The relative error with so many units, at the best ridge near the last one.

        At the last one, where it is `enough` there or, if that one was best at another width, far more.
        """
        known: dict[int, Errors] = {}

        def errors_at(place: int) -> Errors:
            if place not in known:
                known[place] = self.errors(width, place)
            return known[place]

        if self._settled or errors_at(self.place).held_back <= enough:
            return errors_at(self.place).held_back
        if self._sought and errors_at(self.place).held_back > FAR * enough > 0:
            return errors_at(self.place).held_back
        self._settled, self._sought = self.spare and width < self.part.unit_count, True
        self.place = best_ridge(errors_at, len(self.ridges), self.place, scarce=self.scarce)
        return known[self.place].held_back

    def best_place(self, width: int) -> int:
        """Of the ridge at which so many units err least on held-back samples."""
        self.held_back_error(width, -1.0)
        return self.place

    def errors(self, width: int, place: int) -> Errors:
        """Those with so many units at one ridge."""
        units = len(self.columns) // self.part.group_size
        if width < units and self._is_tail(width):
            if len(self._tails.get(place, ())) < units - width:
                self._tails[place] = self._tail_errors(max(1, width - units // MARGIN), place)
            return self._tails[place][units - 1 - width]
        weights, product = self._refit(width, place)
        energies = self._energies(weights, product, place)
        if width == units and not self.spare:
            self._wholes[place] = Whole(weights, product, energies)
            for earlier in list(self._wholes)[:-WHOLES]:
                del self._wholes[earlier]
        return self._errors(float(energies.left), float(energies.checked), float(energies.moved.square().sum()))

    def _is_tail(self, width: int) -> bool:
        """Whether all widths down to this one together cost little more than this one."""
        columns, kept, outputs = len(self.columns), width * self.part.group_size, self.before.shape[1]
        gone = columns - kept
        together = gone * (1.5 * columns**2 + columns * gone + 2.0 * columns * outputs + gone * outputs)
        return not self.spare and together <= WORTH * 1.5 * kept**2 * outputs

    def _refit(self, width: int, place: int) -> tuple[Tensor, Tensor]:
        """V (m, D) of the first columns, and CV (m, D)."""
        last = width * self.part.group_size
        halfway, scale = self._halfway(place), self._scale[:last, None]
        weights = torch.linalg.solve_triangular(halfway.factor[:last, :last].mT, halfway.solved[:last], upper=True)
        weights = torch.where(scale > 0, weights.mul_(scale), self.before[:last])  # constant columns keep theirs
        if self._checked is not None:
            return weights, self._checked[:last, :last] @ weights
        first = self.columns[:last]
        whole = weights.new_zeros(len(self.columns), weights.shape[1]).index_copy_(0, first, weights)
        return weights, (self.check.covariance @ whole)[first]

    def _energies(self, weights: Tensor, product: Tensor, place: int) -> Energies:
        """Of weights V (m, D) of the first columns alone."""
        last, ridge = len(weights), self._halfway(place).ridge
        before, first = self.before[:last], self.columns[:last]
        penalty = ridge * (weights * (before - weights)).mul_(self._squares[:last, None]).sum()
        left = self._energy - ((weights * self._cross[:last]).sum() - penalty)
        fitted = (2 * self.check.cross_covariance[first] - product).mul_(weights).sum()
        moved = self._mean - weights.T @ self._shifts[:last]
        return Energies(left, (self.check.centred_energy - fitted).clamp_min(0), moved)

    def _tail_errors(self, width: int, place: int) -> list[Errors]:
        """Those at every width from one less than all units down to `width`."""
        assert self._checked is not None, "memory is not spared"
        s, first = self.part.group_size, width * self.part.group_size
        whole = self._wholes.get(place)
        if whole is None:
            weights, product = self._refit(len(self.columns) // s, place)
            whole = Whole(weights, product, self._energies(weights, product, place))
        halfway, count = self._halfway(place), len(self.columns) - first
        units = halfway.factor.new_zeros(len(self.columns), count)
        units[first:].fill_diagonal_(1.0)
        ends = torch.linalg.solve_triangular(halfway.factor.mT, units, upper=True).mul_(self._scale[:, None])  # U
        constant = self._scale[first:] <= 0
        ends = torch.where(constant, units, ends)
        given = torch.where(constant[:, None], self.before[first:], halfway.solved[first:])  # Z (|T|, D)
        ridge, squares = halfway.ridge, self._squares[:, None]
        alike = given @ given.T
        pulled = (2 * whole.weights - self.before).mul_(ridge * squares).add_(self._cross)
        left = (ends.T @ pulled).mul_(given).sum(1) - _trailing((ends.T @ (ends * (ridge * squares))).mul_(alike))
        unexplained = self.check.cross_covariance[self.columns] - whole.product
        checked = 2 * (ends.T @ unexplained).mul_(given).sum(1)
        checked += _trailing((ends.T @ (self._checked @ ends)).mul_(alike))
        moved = (ends.T @ self._shifts)[:, None] * given
        sums = [_from_the_end(each)[s - 1 :: s] for each in (left, checked, moved)]
        lefts, checks = whole.energies.left + sums[0], (whole.energies.checked + sums[1]).clamp_min(0)
        means = (whole.energies.moved + sums[2]).square().sum(1)
        return [self._errors(*each) for each in zip(lefts.tolist(), checks.tolist(), means.tolist(), strict=True)]

    def _errors(self, left: float, checked: float, moved: float) -> Errors:
        """From the energies that are left, the last of the mean."""
        fitting = relative(left, total_energy(self.part, intercept=self.intercept))
        return Errors(fitting, relative(checked + moved, total_energy(self.check, intercept=self.intercept)))

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


def _trailing(matrix: Tensor) -> Tensor:
    """What row and column i add to the sum over the square behind them (n,), of a symmetric matrix (n, n)."""
    return 2 * matrix.triu(1).sum(1) + matrix.diagonal()


def _from_the_end(values: Tensor) -> Tensor:
    """Sums (n, …) of the last one, the last two, … of values (n, …)."""
    return values.flip(0).cumsum(0)

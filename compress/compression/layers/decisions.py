"""What is decided about one layer: how wide it stays and, where that is known already, which units.

A plan gives every group of units its decision, by the group's name. For `Sequential(Linear(6, 16), ReLU(),
Linear(16, 8), ReLU(), Linear(8, 3))`, whose groups are "0" and "2":

    {"0": Width(5), "2": Within(0.1)}  # five of 16 units; of 8 as few as add a tenth to the held-back error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from compress.units.groups import UnitGroup


@dataclass(frozen=True)
class Keep:
    """So many units, from 1 up, or such a fraction of them, below 1."""

    amount: float

    def __str__(self) -> str:
        return f"keep {self.amount:g}" + (" units" if self.amount >= 1 else " of the units")


@dataclass(frozen=True)
class Within:
    """As few units as add at most the relative error ‖Ψ − Ψ̂‖/‖Ψ − mean Ψ‖ on held-back samples; 0: exactly."""

    error: float

    def __str__(self) -> str:
        return f"held-back error at most {self.error:g}"


@dataclass(frozen=True)
class LassoSupport:
    """As many units as the lasso keeps at `penalty`, a fraction of λ_max."""

    penalty: float

    def __str__(self) -> str:
        return f"lasso support at {self.penalty:g} of λ_max"


@dataclass(frozen=True, eq=False)
class Width:
    """So many units, as a search found; `among`: unit numbers (m,), sorted, of the only ones in question, or None."""

    count: int
    among: Tensor | None = None

    def __str__(self) -> str:
        return f"{self.count} units"


@dataclass(frozen=True, eq=False)
class Given:
    """These units (m,), by whatever means they were chosen; only the refit is left to do."""

    units: Tensor

    def __str__(self) -> str:
        return f"units {self.units.tolist()}"


@dataclass(frozen=True)
class Leave:
    """The layer stays as it is, for a reason that the report gives."""

    reason: str

    def __str__(self) -> str:
        return f"left as it is: {self.reason}"


Decision = Keep | Within | LassoSupport | Width | Given | Leave
Plan = Mapping[str, Decision]


def same_for_all(groups: Iterable[UnitGroup], decision: Decision) -> Plan:
    """The plan that decides alike for every group."""
    return {group.name: decision for group in groups}


@dataclass(frozen=True)
class Ingredients:
    """What a sweep makes use of besides least squares; all of it by default, less of it to see what each is worth.

    Attributes:
        shortcuts: targets take back the error that a shortcut carries into the addition behind a consumer.
        readers: consumers are refitted again once their input has moved, also where none of their units goes.
        swaps: chosen units are exchanged for others as long as the error falls.
        rectified: sweeps after the first ask only for what comes through the next ReLU.
    """

    shortcuts: bool = True
    readers: bool = True
    swaps: bool = True
    rectified: bool = True


def count_to_keep(keep: float, units: int) -> int:
    """Units that `keep` asks for, between 1 and `units`; a fraction is rounded to the nearest count."""
    wanted = int(keep) if keep >= 1 else round(keep * units)
    return max(1, min(units, wanted))


def round_up(width: int, multiple: int, units: int) -> int:
    """The next multiple of `multiple`, but at most all `units`."""
    return min(units, math.ceil(width / multiple) * multiple)


def largest_error(allowed: float, floor: float) -> float:
    """The error √(floor² + allowed²·(1 − floor²)) that passes: `allowed` is a share of what all units explain.

    Where earlier cuts leave little to explain, a few units do nearly as well as all in error, and not in what they say.
    """
    return math.sqrt(floor**2 + allowed**2 * max(0.0, 1 - floor**2))


def smallest_width(
    held_back_error: Callable[[int], float], units: int, allowed: float, floor: float, guess: int | None = None
) -> int:
    """Smallest width whose held-back error stays within what `allowed` adds to the unavoidable error.

    When earlier layers were cut, even all units leave an error `floor`; a width passes when its error is at most
    `largest_error`. The error is taken to fall with the width, about geometrically between two of them. Where all units
    fit far worse than fewer do (one that hardly any fitting sample reaches can throw held-back ones off), theirs is no
    unavoidable error: the search starts again from the lowest one of some smaller widths.

    Args:
        held_back_error: width -> relative error after the refit.
        guess: a width to look around first, in growing steps.
    """
    limit = largest_error(allowed, floor) * (1 + 1e-9)
    fails, passes, lowest = 0, units, floor
    errors = {units: floor}
    middle, step = units // 2 if guess is None else guess, max(1, units // 32)
    slow = False  # whether the last width, not the middle one, left most of what lay between
    while passes - fails > 1:
        middle = min(max(middle, fails + 1), passes - 1)
        left = passes - fails
        errors[middle] = error = held_back_error(middle)
        lowest = min(lowest, error)
        if error <= limit:
            passes, middle = middle, middle - step
        else:
            fails, middle = middle, middle + step
        step *= 2
        if guess is None or (fails > 0 and passes < units):
            slow = not slow and 2 * (passes - fails) > left
            middle = (fails + passes) // 2 if slow else between(fails, passes, errors, limit)
    if lowest >= floor / 2:
        return passes
    others = (held_back_error(units * part // 8) for part in (4, 6, 7))
    return smallest_width(held_back_error, units, allowed, min(lowest, *others))


def between(low: int, high: int, errors: Mapping[int, float], limit: float) -> int:
    """The width at which an error that falls geometrically from one width to another is the limit; else the middle."""
    first, last = errors.get(low, 0.0), errors.get(high, 0.0)
    if not first > limit >= last > 0:
        return (low + high) // 2
    share = math.log(first / limit) / math.log(first / last)
    return low + round(share * (high - low))

"""How wide one layer stays: a count, a fraction, an error on held-back samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class WidthRule:
    """One way to say how wide every layer stays; exactly one field is not None.

    Attributes:
        keep: units (from 1 up) or a fraction of them (below 1).
        error: relative error ‖Ψ − Ψ̂‖/‖Ψ − mean Ψ‖ that removing units may add, on held-back samples.
        penalty: lasso penalty as a fraction of the silencing one; its support is kept.
    """

    keep: float | None = None
    error: float | None = None
    penalty: float | None = None

    def __str__(self) -> str:
        if self.keep is not None:
            return f"keep {self.keep:g}" + (" units" if self.keep >= 1 else " of the units")
        if self.error is not None:
            return f"held-back error at most {self.error:g}"
        return f"lasso support at {self.penalty:g} of the silencing penalty"


def count_to_keep(keep: float, units: int) -> int:
    """Units that `keep` asks for, between 1 and `units`; a fraction is rounded to the nearest count."""
    wanted = int(keep) if keep >= 1 else round(keep * units)
    return max(1, min(units, wanted))


def round_up(width: int, multiple: int, units: int) -> int:
    """The next multiple of `multiple`, but at most all `units`."""
    return min(units, math.ceil(width / multiple) * multiple)


def smallest_width(held_back_error: Callable[[int], float], units: int, allowed: float, floor: float) -> int:
    """Smallest width whose held-back error stays within what `allowed` adds to the unavoidable error, by bisection.

    When earlier layers were cut, even all units leave an error `floor`; a width passes when its squared error is at
    most floor² + allowed². The error is taken to fall with the width. Where all units fit far worse than fewer do (one
    that hardly any fitting sample reaches can throw held-back ones off), theirs is no unavoidable error: the search
    starts again from the lowest one of some smaller widths.

    Args:
        held_back_error: width -> relative error after the refit.
    """
    limit = math.sqrt(allowed**2 + floor**2) * (1 + 1e-9)
    fails, passes, lowest = 0, units, floor
    while passes - fails > 1:
        middle = (fails + passes) // 2
        error = held_back_error(middle)
        lowest = min(lowest, error)
        if error <= limit:
            passes = middle
        else:
            fails = middle
    if lowest >= floor / 2:
        return passes
    others = (held_back_error(units * part // 8) for part in (4, 6, 7))
    return smallest_width(held_back_error, units, allowed, min(lowest, *others))

"""Axes: from values to places in a drawing, and where their ticks stand."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to places between `start` and `stop`; logarithmic where `log` is set.

    Values outside are moved to the nearer end.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            inside, low, high = math.log10(inside), math.log10(low), math.log10(high)
        share = (inside - low) / (high - low) if high > low else 0.0
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values on the axis, at most `most` + 1 of them."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / most))
            return [10.0**power for power in range(last, first - 1, -step)]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        size = 10.0 ** math.floor(math.log10(span / most))
        spacing = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= most)
        bottom = math.ceil(self.low / spacing - 1e-9)
        return [spacing * place for place in range(bottom, math.floor(self.high / spacing + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """A tick in few characters: 0.001, 20, 1e-6."""
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 1e5:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:g}"

"""How much of a measure may be lost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """What `--max-drop` allows.

    Attributes:
        most: points of a share, else in the measure's own unit; where `relative`, a share of the original's value.
        confidence: one-sided, with which no more is lost; None: the estimate decides.
    """

    most: float
    relative: bool = False
    confidence: float | None = None

    def allowed(self, before: float) -> float:
        """What may be lost of a measure that is `before` in the original, in the measure's unit."""
        return self.most * abs(before) if self.relative else self.most

    def __str__(self) -> str:
        return f"{100 * self.most:g} %" if self.relative else f"{self.most:g}"

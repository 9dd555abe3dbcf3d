"""Which units to keep: nested orders with their whole error curve, for a width or an error (EVIDENCE §3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from compress.convex.elimination import backward_order, nested_errors
from compress.convex.moments import Moments
from compress.convex.refit import RIDGE


@dataclass(frozen=True, eq=False)
class SelectionCurve:
    """Relative refit error by width, and the units that reach it.

    Attributes:
        order: a nested order (K,): its first m units are a good choice for every m.
        errors: smallest relative error (K + 1,) reached with m units; never rising.
        methods: the method (K + 1,) that reaches it.
        orders: nested order of every method that ran.
        polished: units of the widths that were improved by swaps.
    """

    order: Tensor
    errors: Tensor
    methods: tuple[str, ...]
    orders: Mapping[str, Tensor]
    polished: Mapping[int, Tensor] = field(default_factory=dict)

    def units(self, width: int) -> Tensor:
        """The `width` units (width,) to keep, sorted."""
        if not 0 <= width < len(self.methods):
            raise ValueError(f"`width` must be between 0 and {len(self.methods) - 1}, got {width}.")
        if width in self.polished:
            return self.polished[width]
        return self.orders[self.methods[width]][:width].sort().values

    def width_for(self, error: float) -> int:
        """The smallest width whose relative error is at most `error`; all units if there is none."""
        fits = (self.errors <= error).nonzero()
        return int(fits[0]) if fits.numel() else len(self.methods) - 1


def select_units(
    moments: Moments,
    *,
    method: str = "best",
    unit_costs: Tensor | None = None,
    ridge: float = RIDGE,
    intercept: bool = True,
) -> SelectionCurve:
    """The whole curve error(width) of a selection method, from one run.

    Args:
        method: "backward" or "best".
        unit_costs: c (K,) of the lasso-based methods; default 1.
    """
    if method not in ("best", "backward"):
        raise ValueError(f"`method` must be one of best, backward, got {method!r}.")
    order = backward_order(moments, ridge=ridge, intercept=intercept)
    errors = nested_errors(moments, order, ridge=ridge, intercept=intercept)
    count = moments.unit_count + 1
    return SelectionCurve(order=order, errors=errors, methods=("backward",) * count, orders={"backward": order})

"""What the outputs make of a layer's cut while a sweep goes on, and smaller errors where that is too much."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from compress.compression.layers.decisions import Decision, Width, Within
from compress.compression.layers.result import LayerResult, Watched
from compress.units.groups import UnitGroup

MOST_SHARES = 4.0  # equal shares of what is left that one layer may add
FEWER_SHARES = 2.0  # that it is to add where it adds more
SMALLEST = 0.1  # of a tolerance, that it falls to at once, at least

Look = Callable[[LayerResult, int], float]  # what a turn comes to, samples -> distance of the outputs then


@dataclass(eq=False)
class Watch:
    """How far the outputs may move, and how far they did.

    A layer may add a few equal shares of what is left to those behind it. What adds more is settled again within a
    smaller error, a distance growing as the square of a small one, and is left whole where that is still too much.

    Attributes:
        allowed: distance of the held-back outputs from the original's.
        left: layers to come.
        samples: of the held-back ones that are looked at.
        reached: distance behind the last layer that was cut.
        stricter: group name -> what was decided instead of the plan.
    """

    allowed: float
    left: int
    samples: int
    reached: float = 0.0
    stricter: dict[str, Decision] = field(default_factory=dict)

    def settle(
        self, group: UnitGroup, decision: Within, solve: Callable[[Decision], LayerResult], look: Look
    ) -> LayerResult:
        """The layer at its decision, or at a stricter one; `solve`: what comes of a decision."""
        share = max(0.0, self.allowed - self.reached) / max(1, self.left)
        layer = solve(decision)
        for attempt in range(2):
            distance = look(layer, self.samples) if layer.is_cut else self.reached
            added = distance - self.reached
            if not added > MOST_SHARES * share:  # nor where it is no number
                self.reached = distance if math.isfinite(distance) else self.reached
                break
            part = max(SMALLEST, math.sqrt(FEWER_SHARES * share / added))
            within = Within(float(f"{part * decision.error:.4g}"))
            self.stricter[group.name] = Width(group.unit_count) if attempt else within
            layer = solve(self.stricter[group.name])
        return layer

    def decided(self, group: UnitGroup, decision: Decision) -> Decision:
        """What holds for a group in the end, where the plan says `decision`."""
        return self.stricter.get(group.name, decision)

    def go_on(self, group: UnitGroup, watched: Watched | None) -> None:
        """A layer is done, by this run or by an earlier one that was watched alike."""
        self.left -= 1
        if watched is not None:
            self.reached = watched.reached
            if watched.error is not None:
                self.stricter[group.name] = Within(watched.error) if watched.error else Width(group.unit_count)

    def watched(self, group: UnitGroup) -> Watched:
        """What a resumed run needs to know of a layer that was settled."""
        decision = self.stricter.get(group.name)
        error = decision.error if isinstance(decision, Within) else None if decision is None else 0.0
        return Watched(self.reached, error)

"""The recorded moments of one group of units, and what they say before anything is solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex import FactoredMoments, Moments, stack_consumers
from compress.network.readings import Reading
from compress.network.units import UnitGroup

DEAD = 1e-12  # second moment, relative to the layer's largest, below which a unit never fires


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Moments of one group, one part per reading, on the fitting and on the held-back samples.

    Attributes:
        targets: Ψ was recorded from the original network while Φ came from the compressed one.
        rows: rows of Φ in the fitting moments.
        positions: what the plan took, in words.
        candidates: the units (m,) that the moments are about, where all of them did not fit the memory; else None.
    """

    group: UnitGroup
    readings: tuple[Reading, ...]
    fitting: tuple[Moments, ...]
    held_back: tuple[Moments, ...]
    targets: bool
    rows: int
    positions: str = ""
    candidates: Tensor | None = None

    @property
    def units(self) -> Tensor:
        """Unit numbers (K,) that the moments hold, sorted."""
        return torch.arange(self.group.unit_count) if self.candidates is None else self.candidates

    @property
    def intercepts(self) -> tuple[bool, ...]:
        """For each reading: can all its consumers take a new constant."""
        return tuple(reading.takes_constant for reading in self.readings)

    def joint(self) -> Moments:
        """Fitting moments of all readings together, centred where a constant is free; each one's error counts alike."""
        parts = [part.centred() if own else part for part, own in zip(self.fitting, self.intercepts, strict=True)]
        return parts[0] if len(parts) == 1 else stack_consumers(parts, intercept=False)


def make_layer_moments(
    group: UnitGroup,
    readings: tuple[Reading, ...],
    fitting: Sequence[Moments | FactoredMoments],
    held_back: Sequence[Moments | FactoredMoments],
    *,
    targets: bool,
    rows: int,
    positions: str,
) -> LayerMoments:
    """Moments of one group as recorded; a factor is reduced to the units that its memory bound allows a matrix for."""
    candidates: Tensor | None = None
    for part in fitting:
        if isinstance(part, FactoredMoments):
            positions = f"{positions}; {part.message}"
            listed = part.shortlist()
            if len(listed) < group.unit_count:
                candidates = listed if candidates is None else candidates[torch.isin(candidates, listed)]

    def dense(part: Moments | FactoredMoments) -> Moments:
        if isinstance(part, FactoredMoments) or candidates is not None:
            return part.subset(torch.arange(group.unit_count) if candidates is None else candidates)
        return part

    return LayerMoments(
        group=group,
        readings=readings,
        fitting=tuple(dense(part) for part in fitting),
        held_back=tuple(dense(part) for part in held_back),
        targets=targets,
        rows=rows,
        positions=positions,
        candidates=candidates,
    )


def dead_units(moments: Moments) -> Tensor:
    """Which units (K,) never differ from zero (from their mean, in centred moments)."""
    own = moments.gram.diagonal().reshape(moments.unit_count, -1).sum(1)
    return own <= DEAD * own.max().clamp_min(torch.finfo(own.dtype).tiny)


def count_duplicates(moments: Moments, tolerance: float = 1e-9) -> int:
    """Units that are positive multiples of an earlier one, by the cosine of their (s = 1) features."""
    if moments.group_size != 1:
        return 0
    diagonal = moments.gram.diagonal()
    alive = ~dead_units(moments)
    scale = torch.where(alive, diagonal.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    cosine = moments.gram * scale[:, None] * scale
    return int((cosine.tril(-1) > 1 - tolerance).any(1).sum())

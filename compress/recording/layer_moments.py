"""The recorded moments of one group of units, and what they say before anything is solved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex import FactoredMoments, Moments, contributions, relative_error, shrink_moments, stack_consumers
from compress.convex.statistics.moments import unit_columns
from compress.recording.readings import Reading
from compress.units.groups import ReadUnits

ROWS_PER_COLUMN = 8  # rows of Φ wanted for each of its K·s columns, so that a refit does not fit noise
WIDE = 2048  # columns of a reading, above which units of many columns are chosen by what they give to the outputs
DEAD = 1e-12  # second moment, relative to the layer's largest, below which a unit never fires


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Moments of one group, one part per reading, on the fitting and on the held-back samples.

    Attributes:
        targets: Ψ was recorded from the original network while Φ came from the compressed one.
        rows: rows of Φ in the fitting moments.
        positions: what the plan took, in words.
        candidates: the units (m,) that the moments are about, where not all were wanted or fit the memory; else None.
        unchanged: with `candidates`, relative errors (fitting, held-back) of the weights as they are, with all units;
            nan where the other units were not recorded.
    """

    group: ReadUnits
    readings: tuple[Reading, ...]
    fitting: tuple[Moments, ...]
    held_back: tuple[Moments, ...]
    targets: bool
    rows: int
    positions: str = ""
    candidates: Tensor | None = None
    unchanged: tuple[float, float] | None = None

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
        return stacked(self._centred())

    def for_selection(self, original: Mapping[str, Tensor]) -> Moments:
        """As `joint`, from which units are chosen: readings of few rows are shrunk towards uncorrelated features.

        Where a reading has many columns, of more taps than outputs, each unit stands there by its contributions.

        Args:
            original: state of the original network.
        """
        parts = []
        for reading, part in zip(self.readings, self._centred(), strict=True):
            scarce = part.count < ROWS_PER_COLUMN * part.covariance.shape[0]
            reducible = part.covariance.shape[0] > WIDE and 2 * part.output_count <= part.group_size
            if scarce or reducible:
                rows = unit_columns(self.units.to(part.covariance.device), reading.group_size)
                weights = reading.weights(original).to(part.covariance)[rows]
                if reducible:
                    part, weights = contributions(part, weights), unit_identities(part.unit_count, weights)
                if part.count < ROWS_PER_COLUMN * part.covariance.shape[0]:
                    part = shrink_moments(part, weights)
            parts.append(part)
        return stacked(parts)

    def _centred(self) -> list[Moments]:
        return [part.centred() if own else part for part, own in zip(self.fitting, self.intercepts, strict=True)]


def unit_identities(units: int, weights: Tensor) -> Tensor:
    """V (K·D, D) of contributions: each unit's own, as they are."""
    return torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device).repeat(units, 1)


def stacked(parts: Sequence[Moments]) -> Moments:
    """Several readings' moments as one problem, each one's relative error counting alike."""
    return parts[0] if len(parts) == 1 else stack_consumers(parts, intercept=False)


def make_layer_moments(
    group: ReadUnits,
    readings: tuple[Reading, ...],
    fitting: Sequence[Moments | FactoredMoments],
    held_back: Sequence[Moments | FactoredMoments],
    *,
    state: Mapping[str, Tensor],
    targets: bool,
    rows: int,
    positions: str,
    units: Tensor | None = None,
) -> LayerMoments:
    """Moments of one group as recorded; factors are reduced to the units that the memory bound allows a matrix for.

    Args:
        readings: of all units.
        state: of the original network.
        units: unit numbers (m,), sorted, that were recorded; None: all.
    """
    recorded = group.unit_count if units is None else len(units)
    votes = torch.zeros(recorded, dtype=torch.int64)
    listed = recorded
    for part in fitting:
        if isinstance(part, FactoredMoments):
            positions = f"{positions}; {part.message}"
            chosen = part.shortlist()
            votes[chosen] += 1
            listed = min(listed, len(chosen))
    places: Tensor | None = None  # of the units that most readings list, among those recorded
    unchanged: tuple[float, float] | None = None
    if listed < recorded:
        places = votes.argsort(descending=True, stable=True)[:listed].sort().values
        positions = f"{positions}; {listed} of {group.unit_count} units considered"
    if units is not None:
        unchanged = math.nan, math.nan
    elif places is not None:
        errors = [
            root_mean_square(
                [
                    unchanged_error(part, reading.weights(state), intercept=reading.takes_constant)
                    for part, reading in zip(parts, readings, strict=True)
                ]
            )
            for parts in (fitting, held_back)
        ]
        unchanged = errors[0], errors[1]

    def dense(part: Moments | FactoredMoments) -> Moments:
        if isinstance(part, FactoredMoments) or places is not None:
            return part.subset(torch.arange(recorded) if places is None else places)
        return part

    return LayerMoments(
        group=group,
        readings=readings,
        fitting=tuple(dense(part) for part in fitting),
        held_back=tuple(dense(part) for part in held_back),
        targets=targets,
        rows=rows,
        positions=positions,
        candidates=units if places is None else places if units is None else units[places],
        unchanged=unchanged,
    )


def unchanged_error(part: Moments | FactoredMoments, weights: Tensor, *, intercept: bool) -> float:
    """‖Ψ − ΦV‖/‖Ψ − mean Ψ‖ (over ‖Ψ‖ without an intercept) of output weights V (K·s, D) for all units."""
    if isinstance(part, Moments):
        return relative_error(part, None, weights, intercept=intercept)
    weights = weights.to(part.factor)
    left = float((part.targets - part.factor @ weights).square().sum())
    left += float((part.output_mean - weights.T @ part.feature_mean).square().sum())
    energy = float(part.targets.square().sum())
    if not intercept:
        energy += float(part.output_mean.square().sum())
    return (left / energy) ** 0.5 if energy > 0 else 0.0


def root_mean_square(errors: Sequence[float]) -> float:
    """Root mean square of several readings' relative errors."""
    return float((sum(error**2 for error in errors) / len(errors)) ** 0.5)


def dead_units(moments: Moments) -> Tensor:
    """Which units (K,) never differ from zero (from their mean, in centred moments)."""
    energies = moments.gram.diagonal().reshape(moments.unit_count, -1).sum(1)
    return energies <= DEAD * energies.max().clamp_min(torch.finfo(energies.dtype).tiny)


def count_duplicates(moments: Moments, tolerance: float = 1e-9) -> int:
    """Units that are positive multiples of an earlier one, by the cosine of their (s = 1) features."""
    if moments.group_size != 1:
        return 0
    diagonal = moments.gram.diagonal()
    alive = ~dead_units(moments)
    scale = torch.where(alive, diagonal.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    cosine = moments.gram * scale[:, None] * scale
    return int((cosine.tril(-1) > 1 - tolerance).any(1).sum())

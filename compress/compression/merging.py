"""Merging units that are positive multiples of one another: fewer units, the same outputs (docs/theory.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.compression.layers.layer import LayerFacts
from compress.compression.layers.refit import held_back_error
from compress.compression.layers.result import LayerResult, report_fit, report_widths
from compress.compression.problem import Problem, record_all
from compress.compression.sweep import Compressed
from compress.convex import Moments
from compress.convex.statistics.moments import unit_columns
from compress.diagnostics.forces import aligned_units
from compress.errors import NothingToCompressError, SurgeryError
from compress.measures.outputs import named_outputs
from compress.progress import Progress
from compress.recording.layer_moments import LayerMoments
from compress.report.model import LayerReport
from compress.units.groups import UnitGroup
from compress.units.surgery import relative_deviation

ALIGNED = (1e-9, 1e-11, 1e-13)  # tried in turn: how far a cosine may lie below 1
OUTPUT_TOLERANCE = 1e-5  # relative to the largest output, in the precision that the network computes in


def merge_layers(problem: Problem, rank_tolerance: float, progress: Progress) -> Compressed:
    """Every group of aligned units as its first unit, which takes over the others' output weights.

    With φ_j = αφ_i on the samples, v_i ← v_i + αv_j and unit j goes: ΦV stays. Alignment is looked for on the fitting
    samples, for every reader of the units; the network's outputs are compared on the held-back ones. Where they moved,
    alignment is taken more strictly.

    Raises:
        NothingToCompressError: no two units are aligned.
        SurgeryError: what looks aligned on the fitting samples is not on the held-back ones.
    """
    recorded = record_all(problem, progress)
    moments = recorded.moments
    groups = {group.name: group for group in problem.groups}
    deviation = math.inf
    for tolerance in ALIGNED:
        mergeable = {name: aligned_groups(groups[name], each, tolerance) for name, each in moments.items()}
        if not any(mergeable.values()):
            break
        state = dict(problem.state)
        for name, aligned in mergeable.items():
            state.update(merged_weights(moments[name], aligned, state))
        progress.stage("comparing outputs")
        deviation = output_deviation(problem, state)
        if deviation <= OUTPUT_TOLERANCE:
            merged = sum(len(units) - 1 for aligned in mergeable.values() for units in aligned)
            progress.note(f"{merged} aligned units merged; held-back outputs moved by {deviation:.1e} of the largest")
            results = [
                describe(moments[group.name], mergeable[group.name], problem.state, state, rank_tolerance)
                for group in problem.groups
                if group.name in moments
            ]
            return Compressed(list(results), state, None, None, recorded.skipped)
    if deviation < math.inf:
        raise SurgeryError(
            "Units that are aligned on the fitting samples are not on the held-back ones: merging moved the outputs "
            f"by {deviation:.1e} of the largest, more than {OUTPUT_TOLERANCE:.0e}. Give more calibration samples."
        )
    raise NothingToCompressError("No two units of a selected layer are positive multiples of one another.")


def aligned_groups(group: UnitGroup, moments: LayerMoments, tolerance: float) -> list[list[int]]:
    """Groups of units aligned for every reader; none where not all units were recorded or positions must stay equal."""
    if moments.candidates is not None or group.blocks != 1 or group.statistics:
        return []
    parts = [aligned_units(unit_gram(part).cpu(), tolerance) for part in moments.fitting]
    aligned = parts[0]
    for other in parts[1:]:
        aligned = [sorted(set(one) & set(two)) for one in aligned for two in other]
    return [units for units in aligned if len(units) > 1]


def unit_gram(part: Moments) -> Tensor:
    """Σ over a unit's columns of ΦᵀΦ (K, K): inner products of whole units."""
    units = part.unit_count
    return part.gram.reshape(units, part.group_size, units, part.group_size).diagonal(dim1=1, dim2=3).sum(-1)


def merged_weights(
    moments: LayerMoments, groups: Sequence[Sequence[int]], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New consumer weights by state name, in the original shapes; the columns of merged units are zero."""
    weights: dict[str, Tensor] = {}
    for reading, part in zip(moments.readings, moments.fitting, strict=True):
        gram = unit_gram(part).cpu()
        for applied in reading.places:
            consumer = applied[0]
            weight = weights.get(consumer.weight, state[consumer.weight])
            matrix = reading.matrix(consumer, weight).clone()  # (K·s, D)
            for first, *others in groups:
                target = unit_columns(torch.tensor([first]), reading.group_size).to(matrix.device)
                for other in others:
                    source = unit_columns(torch.tensor([other]), reading.group_size).to(matrix.device)
                    matrix[target] += float(gram[first, other] / gram[first, first]) * matrix[source]
                    matrix[source] = 0
            if groups:
                weights[consumer.weight] = reading.with_matrix(consumer, weight, matrix)
    return weights


def output_deviation(problem: Problem, state: Mapping[str, Tensor]) -> float:
    """Largest deviation of the network's outputs under `state` from the original's, on the held-back samples."""
    network, largest = problem.network, 0.0
    changed = {name: tensor for name, tensor in state.items() if tensor is not problem.state[name]}
    changed.update({name: changed[first] for name, first in network.aliases.items() if first in changed})
    with torch.inference_mode():
        for number in range(len(problem.held_back.sizes())):
            inputs = tuple(tensor.to(network.device) for tensor in problem.held_back.read(number))
            before = named_outputs(network.module(*inputs))
            after = named_outputs(torch.func.functional_call(network.module, changed, inputs))
            largest = max(largest, relative_deviation(list(before.values()), list(after.values())))
    return largest


def describe(
    moments: LayerMoments,
    groups: Sequence[Sequence[int]],
    original: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    rank_tolerance: float,
) -> LayerResult:
    """What was done to one layer: no lasso, no refit."""
    gone = {unit for _, *others in groups for unit in others}
    units = moments.group.unit_count
    kept = torch.tensor([unit for unit in range(units) if unit not in gone])
    joint = moments.joint()
    complete = moments.candidates is None
    after = held_back_error(moments, kept, original, merged) if complete else math.nan
    report = LayerReport(
        moments.group.name,
        units,
        len(kept),
        LayerFacts.of(joint, rank_tolerance).report(),
        report_widths(None, {}),
        report_fit(moments, math.nan, after, math.nan),
    )
    return LayerResult(report, kept)

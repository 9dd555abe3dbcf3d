"""One layer's weight at a low rank: the least squares fit of its turn, cut off behind the first principal outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.compression.layers.refit import held_back_error, refit_layer
from compress.compression.layers.result import Settled
from compress.convex.low_rank import truncated
from compress.convex.statistics.moments import unit_columns
from compress.errors import SolverError
from compress.recording.layer_moments import LayerMoments
from compress.recording.readings import constant_of
from compress.units.groups import UnitGroup


def lower_layer(
    moments: LayerMoments,
    inputs: Tensor,
    outputs: Tensor,
    rank: int,
    ridge: float,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
) -> Settled:
    """A consumer at a low rank: its refit cut off, or its weights as they are, whichever held-back samples like better.

    Args:
        moments: of all its input channels, or of those in `inputs`.
        inputs, outputs: channels (m,) that are left, sorted; what belongs to others becomes zero.
        ridge: relative to each column's second moment.
        original, current: states of the original network and of the one compressed so far.

    Raises:
        SolverError: memory was short, and not all inputs' moments are known.
    """
    if not bool(torch.isin(inputs.cpu(), moments.units).all()):
        raise SolverError("the moments of all its input channels need more memory than was allowed")
    places = torch.searchsorted(moments.units, inputs.cpu())
    refit = {**current, **refit_layer(moments, places, ridge, original, current).weights}
    candidates = [cut_off(moments, places, outputs, rank, ridge, state) for state in (refit, current)]
    errors = [held_back_error(moments, places, original, {**current, **weights}) for weights in candidates]
    best = candidates[0] if errors[0] < errors[1] else candidates[1]
    return Settled(best, whole={name: refit[name] for name in best})


def cut_off(
    moments: LayerMoments, places: Tensor, outputs: Tensor, rank: int, ridge: float, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New tensors of a consumer: the nearest outputs of the rank; a constant that is free takes their mean back.

    Args:
        places: of the input channels (m,) among `moments.units`.
    """
    (reading,), (fitting,) = moments.readings, moments.fitting
    (consumer,) = reading.consumers
    weight = state[consumer.weight]
    matrix = reading.matrix(consumer, weight).to(fitting.covariance)  # (K·s, D)
    part = fitting.subset(places).centred() if reading.takes_constant else fitting.subset(places)
    rows = unit_columns(moments.units[places].to(matrix.device), reading.group_size)
    columns = outputs.to(matrix.device)
    before = matrix[rows][:, columns]
    after = truncated(part, before, rank, ridge=ridge)
    full = torch.zeros_like(matrix)
    full[rows[:, None], columns] = after
    lowered = {consumer.weight: reading.with_matrix(consumer, weight, full)}
    if reading.takes_constant:
        name, sign = constant_of(consumer)
        shift = (before - after).T @ part.feature_mean
        lowered[name] = state[name].index_add(0, columns, (sign * shift).to(state[name]))
    return lowered


def channels_left(weight: str, dim: int, count: int, kept: Mapping[str, Tensor], cut: Sequence[UnitGroup]) -> Tensor:
    """Output channels (m,) of a weight that no group has lost, sorted.

    Args:
        dim: of its output channels, of which it has `count`.
        kept: group name -> units that stay, of the groups settled so far.
    """
    left = torch.ones(count, dtype=torch.bool)
    for group in cut:
        for part in group.slices if group.name in kept else ():
            if part.name == weight and part.dim == dim:
                gone = torch.ones(group.unit_count, dtype=torch.bool)
                gone[kept[group.name]] = False
                left[part.positions[gone].flatten()] = False
    return left.nonzero().flatten()

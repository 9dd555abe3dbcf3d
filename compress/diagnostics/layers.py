"""What each layer's moments and weights say before anything is solved: dead units, ranks, bound, balance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress.convex import width_bound
from compress.diagnostics.balance import balance_ratio, input_norms, output_norms, path_norm
from compress.recording.layer_moments import LayerMoments, count_duplicates, dead_units
from compress.recording.readings import find_readings
from compress.units.groups import UnitGroup


def describe_group(group: UnitGroup, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the structure and the weights alone say about a group; plain data."""
    facts: dict[str, Any] = {
        "name": group.name,
        "units": group.unit_count,
        "together_with": list(group.producers[1:]),
        "activation": group.activation,
        "homogeneous": group.homogeneous,
        "consumers": [consumer.weight.removesuffix(".weight") for consumer in group.consumers],
        "skipped": group.skip_reason,
    }
    if group.prunable:
        inputs, outputs = input_norms(group, state), output_norms(find_readings(group, state), state)
        facts["balance"] = balance_ratio(inputs, outputs)
        facts["path_norm"] = path_norm(inputs, outputs)
    return facts


def describe_moments(moments: LayerMoments, rank_tolerance: float) -> dict[str, Any]:
    """What a group's features and outputs say: dead and duplicate units, numerical ranks, the width bound."""
    joint = moments.joint()
    bound = width_bound(joint, tolerance=rank_tolerance)
    return {
        "dead": int(dead_units(joint).sum()),
        "duplicates": count_duplicates(joint),
        "rank_features": bound.rank_features,
        "rank_outputs": bound.rank_outputs,
        "bound": bound.bound,
        "bound_text": bound.message,
        "ranks": [
            {
                "tolerance": ranks.tolerance,
                "features": ranks.rank_features,
                "outputs": ranks.rank_outputs,
                "bound": ranks.bound,
            }
            for ranks in bound.grid()
        ],
        "rows": moments.rows,
    }

"""What a layer has learned: spectra, representation cost, attraction and repulsion, aligned units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.convex import width_bound
from compress.diagnostics.balance import input_norms
from compress.diagnostics.forces import aligned_units, representation_cost
from compress.recording.layer_moments import LayerMoments
from compress.units.groups import UnitGroup

LISTED = 64


def describe_depth(
    group: UnitGroup, moments: LayerMoments, state: Mapping[str, Tensor], rank_tolerance: float
) -> dict[str, Any]:
    """Plain data about one group, from its moments on the data and its weights.

    `spectrum_features`, `spectrum_outputs`: singular values over the largest, at most 64. `data_bound`: N(N + 1), rows
    of Φ being N. `attraction`, `repulsion`: Σ_k‖w_k‖² and the representation cost Σ_k‖v_k‖² of the least weights that
    give the same outputs; for a homogeneous unit these are the two forces' components along its own activations, equal
    at a minimum of a weight-decay loss. `force_residual`: Σ|‖w_k‖² − ‖v_k‖²| / Σ(‖w_k‖² + ‖v_k‖²), between 0 and 1.
    `aligned`: groups of units whose features are positive multiples of one another. None where not all units were
    recorded.
    """
    ranks = width_bound(moments.joint(), tolerance=rank_tolerance)
    facts: dict[str, Any] = {
        "spectrum_features": ranks.feature_spectrum[:LISTED].tolist(),
        "spectrum_outputs": ranks.output_spectrum[:LISTED].tolist(),
        "rank_product": ranks.bound,
        "data_bound": moments.rows * (moments.rows + 1),
    }
    if moments.candidates is not None:
        return facts | dict.fromkeys(
            ("representation_cost", "output_squares", "attraction", "repulsion", "force_residual", "aligned")
        )
    least = torch.zeros(moments.group.unit_count, dtype=torch.float64)
    squares = 0.0
    for reading, part, free in zip(moments.readings, moments.fitting, moments.intercepts, strict=True):
        weights = reading.weights(state).cpu()
        least += representation_cost((part.centred() if free else part).to("cpu"), weights)
        squares += float(weights.square().sum())
    pull = input_norms(group, state).square()
    together = float((pull + least).sum())
    first = moments.fitting[0]
    units = first.unit_count
    gram = first.gram.reshape(units, first.group_size, units, first.group_size).diagonal(dim1=1, dim2=3).sum(-1)
    return facts | {
        "representation_cost": float(least.sum()),
        "output_squares": squares,
        "attraction": float(pull.sum()),
        "repulsion": float(least.sum()),
        "force_residual": float((pull - least).abs().sum()) / together if together > 0 else 0.0,
        "aligned": aligned_units(gram.cpu()),
    }

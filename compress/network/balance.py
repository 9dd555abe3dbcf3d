"""Neural balance: input and output norms of units (THEORY §2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.network.readings import Reading
from compress.network.units import UnitGroup


def input_norms(group: UnitGroup, state: Mapping[str, Tensor]) -> Tensor:
    """‖w_k‖ (K,) over all weights that produce unit k, BatchNorm's scale folded in, in float64.

    A producer's weight is every tensor of two or more dimensions that the units cut along its first one. The
    per-channel scale γ/√(σ² + ε) of a BatchNorm between producer and activation multiplies it.
    """
    squares = torch.zeros(group.unit_count, dtype=torch.float64)
    scale = torch.ones(group.unit_count, dtype=torch.float64)
    for part in group.slices:
        tensor = state[part.name].detach()
        if part.dim == 0 and tensor.ndim >= 2:
            rows = tensor.double().cpu().flatten(1).square().sum(1)
            squares += rows[part.positions].sum(1)
        elif part.name.endswith("running_var") and part.positions.shape[1] == 1:
            prefix = part.name.removesuffix("running_var")
            factor = (tensor.double().cpu() + 1e-5).rsqrt()
            if f"{prefix}weight" in state:
                factor = factor * state[f"{prefix}weight"].detach().double().cpu().abs()
            scale *= factor[part.positions[:, 0]]
    return squares.sqrt() * scale


def output_norms(readings: tuple[Reading, ...], state: Mapping[str, Tensor]) -> Tensor:
    """‖v_k‖ (K,) over the output weights of all consumers, in float64."""
    squares: Tensor | None = None
    for reading in readings:
        weights = reading.weights(state)
        rows = weights.square().reshape(-1, reading.group_size * weights.shape[1]).sum(1).cpu()
        squares = rows if squares is None else squares + rows
    assert squares is not None, "a group has at least one consumer"
    return squares.sqrt()


def path_norm(inputs: Tensor, outputs: Tensor) -> float:
    """Σ_k ‖w_k‖‖v_k‖ of one layer."""
    return float((inputs * outputs).sum())


def balance_ratio(inputs: Tensor, outputs: Tensor) -> float | None:
    """Median ‖w_k‖/‖v_k‖ over the units where both are positive; 1 in a balanced layer, None without such units."""
    both = (inputs > 0) & (outputs > 0)
    return float((inputs[both] / outputs[both]).median()) if bool(both.any()) else None

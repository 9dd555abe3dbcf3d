"""Neural balance: input and output norms of units, and rescaling to ‖w_k‖ = ‖v_k‖ (docs/theory.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.recording.readings import Reading
from compress.units.groups import UnitGroup
from compress.units.scaling import Scaling

SETTLED = 1e-9


def input_norms(group: UnitGroup, state: Mapping[str, Tensor]) -> Tensor:
    """‖w_k‖ (K,) over all weights that produce unit k, BatchNorm's scale folded in, in float64.

    A producer's weight is every tensor of two or more dimensions that the units cut along its first one, but for those
    of transposed consumers, whose inputs come first. The
    per-channel scale γ/√(σ² + ε) of a BatchNorm between producer and activation multiplies it.
    """
    squares = torch.zeros(group.unit_count, dtype=torch.float64)
    scale = torch.ones(group.unit_count, dtype=torch.float64)
    reading = {consumer.weight for consumer in group.consumers if consumer.layout.input_dim == 0}
    for part in group.slices:
        tensor = state[part.name].detach()
        if part.dim == 0 and tensor.ndim >= 2 and part.name not in reading:
            rows = tensor.double().cpu().flatten(1).square().sum(1)
            squares += rows[part.positions].sum(1)
        for norm in group.norms:
            if norm.variance == part.name and part.positions.shape[1] == 1:
                factor = (tensor.double().cpu() + norm.eps).rsqrt()
                if norm.scale is not None:
                    factor = factor * state[norm.scale].detach().double().cpu().abs()
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


@dataclass(frozen=True, eq=False)
class Balanced:
    """A rescaled state dict and what the rescaling did.

    Attributes:
        state: every tensor of the network by name, those that changed new, in their dtypes.
        sweeps: passes over the layers until the sum of squares settled.
        squares: Σ of squares before and after over the weights: tensors of two or more dimensions, and the batch norm
            scales that stand for w_k; never larger after.
        parameters: the same over all floating-point parameters given, biases too.
        layers: for each group its name, units, median ‖w_k‖/‖v_k‖ before and after, path norm before and after.
    """

    state: dict[str, Tensor]
    sweeps: int
    squares: tuple[float, float]
    parameters: tuple[float, float]
    layers: tuple[dict[str, object], ...]

    @property
    def factor(self) -> float:
        """Sum of squares of the weights after ÷ before, at most 1."""
        return self.squares[1] / self.squares[0] if self.squares[0] > 0 else 1.0


def balance_units(
    state: Mapping[str, Tensor],
    scalings: Sequence[Scaling],
    parameters: Iterable[str],
    *,
    per: Literal["unit", "layer"] = "unit",
    sweeps: int = 1000,
) -> Balanced:
    """Rescale units until ‖w_k‖ = ‖v_k‖ in every layer, which is the least sum of squares that rescaling can reach.

    Minimises Σ_k (γ_k²‖w_k‖² + ‖v_k‖²/γ_k²), layer after layer: γ_k = √(‖v_k‖/‖w_k‖), or one γ for a whole layer
    (`per="layer"`). A weight belongs to two layers (its rows to one, its columns to the other), so sweeps repeat until
    no factor moves by more than 1e-9; each lowers the sum. Units with w_k = 0 or v_k = 0 stay as they are.

    Args:
        state: tensors by name, aliases of tied tensors under every name.
        parameters: names that count as parameters, each tensor once.
    """
    names = tuple(parameters)
    wide = {
        name: value.detach().to(torch.float64, copy=True) for name, value in state.items() if value.is_floating_point()
    }
    counted = {part.name for scaling in scalings for part in scaling.weights}
    weights = [name for name in names if name in wide and (wide[name].ndim >= 2 or name in counted)]
    before = sum_of_squares(wide, weights), sum_of_squares(wide, names)
    described = [_norms(scaling, wide) for scaling in scalings]
    done = 0
    moved = math.inf if scalings else 0.0
    while done < sweeps and moved > SETTLED:
        moved = 0.0
        for scaling in scalings if done % 2 == 0 else scalings[::-1]:
            factors = balancing_factors(scaling, wide, per=per)
            moved = max(moved, float((factors - 1).abs().max()))
            scaling.apply_(wide, factors)
        done += 1
    after = sum_of_squares(wide, weights), sum_of_squares(wide, names)
    changed = {part.name for scaling in scalings for part in (*scaling.weights, *scaling.shifts, *scaling.outputs)}
    rescaled = {
        name: wide[name].to(value.dtype) if name in changed else value.detach() for name, value in state.items()
    }
    layers = []
    for scaling, (ratio, path) in zip(scalings, described, strict=True):
        new_ratio, new_path = _norms(scaling, wide)
        layers.append(
            {
                "name": scaling.group.name,
                "units": scaling.group.unit_count,
                "balance": [ratio, new_ratio],
                "path_norm": [path, new_path],
            }
        )
    return Balanced(rescaled, done, (before[0], after[0]), (before[1], after[1]), tuple(layers))


def balancing_factors(
    scaling: Scaling, state: Mapping[str, Tensor], *, per: Literal["unit", "layer"] = "unit"
) -> Tensor:
    """γ (K,) with γ_k‖w_k‖ = ‖v_k‖/γ_k, for each unit or for the layer as a whole; 1 where a norm is zero."""
    inputs, outputs = scaling.input_squares(state), scaling.output_squares(state)
    if per == "layer":
        inputs, outputs = (value.sum().expand(scaling.group.unit_count) for value in (inputs, outputs))
    both = (inputs > 0) & (outputs > 0)
    safe = torch.where(both, outputs, 1.0) / torch.where(both, inputs, 1.0)
    return safe.sqrt().sqrt()


def sum_of_squares(state: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Σ of squares of the named floating-point tensors."""
    return sum(float(state[name].double().square().sum()) for name in names if name in state)


def _norms(scaling: Scaling, state: Mapping[str, Tensor]) -> tuple[float | None, float]:
    inputs, outputs = scaling.input_squares(state).sqrt(), scaling.output_squares(state).sqrt()
    return balance_ratio(inputs, outputs), path_norm(inputs, outputs)

"""What a step of each parameter is relative to: to what it does to the values that the parameter helps to make.

A matrix is moved relative to the size of its rows, which suits a layer whatever its scale. For a shift that is no
measure: where normalisations are folded away, shifts make up for large means, and a hundredth of one may be all that a
channel varies by. The same holds for the few weights of a map that leaves channels apart, when its input has a mean far
above its spread. Both are moved relative to the spread of the values that they make, as if a normalisation followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.graph.meaning import meaning_of_step
from compress.graph.ops import BatchNorm, Layout, LinearMap, Meaning, traced_shape
from compress.graph.program import Program, iterate
from compress.graph.steps import Value
from compress.training.mimic import input_of

FLOOR = 1e-2  # of the mean over a layer's channels, that a channel's spread counts at least


def measure_units(program: Program, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameter -> the unit of its steps, shaped to multiply it: of shifts, and of maps that leave channels apart.

    Args:
        program: of the network whose tensors are `state`; `inputs`: one batch, on which values are measured.
    """
    meanings = {step.name: meaning_of_step(program, step.name) for step in program.steps}
    shifts = {name: shift for name, meaning in meanings.items() if (shift := shift_of(meaning)) in state}
    apart = {
        name: meaning for name, meaning in meanings.items() if isinstance(meaning, LinearMap) and is_apart(meaning)
    }
    read = {name: input_of(program.by_name[name], meaning) for name, meaning in apart.items()}
    spreads: dict[str, Tensor] = {}  # (C,) of each value
    sizes: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, (value,) in iterate(program, (state,), inputs, {*shifts, *read, *read.values()}):
            rows = by_channel(value, meanings.get(name))
            spread = rows.std(1, correction=min(1, rows.shape[1] - 1))
            spreads[name], sizes[name] = floored(spread), floored(rows.square().mean(1).sqrt())
    units: dict[str, Tensor] = {}
    for name, shift in shifts.items():
        if spreads[name].shape == state[str(shift)].shape:
            units.setdefault(str(shift), spreads[name])
    for name, meaning in apart.items():
        weight = state[str(meaning.weight)]
        size = sizes[read[name]].repeat_interleave(len(weight) // meaning.groups)
        unit = spreads[name] / (math.sqrt(meaning.taps) * size)
        units.setdefault(str(meaning.weight), unit.reshape(-1, *[1] * (weight.ndim - 1)))
    return units


def shift_of(meaning: Meaning | None) -> str | None:
    """The state name of what a map or a batch normalisation adds at last."""
    if isinstance(meaning, LinearMap):
        return None if meaning.indexed else meaning.bias
    return meaning.shift if isinstance(meaning, BatchNorm) else None


def is_apart(meaning: LinearMap) -> bool:
    """Whether it is a convolution with one input for each output."""
    convolves = meaning.layout is Layout.CONVOLUTION and meaning.weight is not None
    return convolves and meaning.groups > 1 and traced_shape(meaning.matrix)[1] == 1


def by_channel(value: Value, meaning: Meaning | None) -> Tensor:
    """A value as rows (C, …): its channels are the last dimension behind a map without a window, else the second."""
    last = isinstance(meaning, LinearMap) and not meaning.layout.spatial
    rows: Tensor = value.detach().movedim(-1 if last or value.ndim < 2 else 1, 0)
    rows = rows.reshape(len(rows), -1)
    rows = rows.abs() if rows.is_complex() else rows
    return rows if rows.dtype == torch.float64 else rows.float()


def floored(numbers: Tensor) -> Tensor:
    """Numbers (C,) of at least `FLOOR` of their mean; ones where these are all zero or not finite."""
    mean = numbers.nan_to_num(0.0, 0.0).mean()
    return torch.where(mean > 0, numbers.nan_to_num(1.0, 1.0).maximum(FLOOR * mean), 1.0)

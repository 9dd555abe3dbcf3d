"""Latency by the widths: a table of every linear map's time, measured here at a few widths and interpolated between.

What the maps do not explain of the whole network's time (normalisations, activations, copies) is spread over them by
the elements they put out, and shrinks with those. The prediction is then checked on the network cut to the widths in
question, and corrected by what was measured.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.compression.costs import SizedTensor
from compress.graph.cost import batch_of, measure_latency
from compress.graph.meaning import linear_maps
from compress.graph.ops import LinearMap
from compress.graph.program import Program
from compress.units.network import Network

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)  # of a map's input and output channels
PASSES = 7
MOST_SECONDS = 0.15  # of measuring one shape


def one_sample(network: Network) -> tuple[Tensor, ...]:
    """The inputs that latency is measured on: one sample, or the one batch that the network runs on."""
    return batch_of(network.examples, 1 if network.batch_size is None else None)


def time_network(network: Network) -> float:
    """Measured milliseconds of the whole network on one sample."""
    return measure_latency((network.module,), one_sample(network))[0].milliseconds


@dataclass(frozen=True)
class TimedMap:
    """Milliseconds of one linear map.

    Attributes:
        sides: for output and input channels the full extent and the groups that cut it, as (group, channels per unit).
        times: [output fraction][input fraction] -> milliseconds, at `FRACTIONS`.
        rest: milliseconds of what follows it, at full width; shrinks with the output channels.
    """

    sides: tuple[tuple[int, tuple[tuple[str, int], ...]], tuple[int, tuple[tuple[str, int], ...]]]
    times: tuple[tuple[float, ...], ...]
    rest: float = 0.0

    def depends_on(self, group: str) -> bool:
        """Whether the group cuts the map."""
        return any(name == group for _, cuts in self.sides for name, _ in cuts)

    def milliseconds(self, removed: Mapping[str, int]) -> float:
        """Time when so many units of each group are removed."""
        out, into = (
            1 - sum(each * removed.get(group, 0) for group, each in cuts) / extent for extent, cuts in self.sides
        )
        if out <= 0 or into <= 0:
            return 0.0  # the block that it is in is gone, with what follows it
        rows = [interpolate(row, into) for row in self.times]
        return interpolate(rows, out) + self.rest * out


def interpolate(values: Sequence[float], at: float) -> float:
    """Piecewise linear through `values` at `FRACTIONS`; proportional to nothing below the first, which it keeps."""
    if at <= FRACTIONS[0]:
        return values[0]
    place = min(bisect_right(FRACTIONS, at), len(FRACTIONS) - 1)
    low, high = FRACTIONS[place - 1], FRACTIONS[place]
    share = (at - low) / (high - low)
    return values[place - 1] + share * (values[place] - values[place - 1])


@dataclass(frozen=True)
class LatencyModel:
    """Predicted latency of one sample, or of the only batch that the network runs on.

    Attributes:
        fixed: milliseconds that no width changes.
        scale: measured over predicted time of the cut network last looked at.
    """

    maps: tuple[TimedMap, ...]
    fixed: float
    scale: float = 1.0

    def milliseconds(self, removed: Mapping[str, int], group: str | None = None) -> float:
        """Time when so many units of each group are removed; with `group`, of the maps alone that it cuts."""
        own = self.maps if group is None else tuple(each for each in self.maps if each.depends_on(group))
        found = self.fixed + sum(each.milliseconds(removed) for each in own)
        return found * (self.scale if any(removed.values()) else 1.0)


def measure_latency_model(
    program: Program, tensors: Sequence[SizedTensor], state: Mapping[str, Tensor], whole: float
) -> LatencyModel:
    """Time every linear map at the widths of the table.

    Args:
        tensors: the cost model's tensors, with the groups that cut them.
        whole: milliseconds of the whole network, measured on one sample, or on the batch that alone it runs on.
    """
    sized = {tensor.name: tensor for tensor in tensors}
    measured: dict[tuple[Any, ...], tuple[tuple[float, ...], ...]] = {}
    found: list[tuple[TimedMap, int]] = []
    for each in linear_maps(program.network):
        if each.weight not in sized:
            continue
        shape = program.shape(each.input.name)
        if program.network.batch_size is None:
            shape = (1, *shape[1:])
        key = (each.node.target, shape, tuple(state[each.weight].shape), each.groups, each.window)
        if key not in measured:
            measured[key] = time_map(each, shape, state[each.weight])
        own = sized[each.weight]
        out, into = each.layout.output_dim, each.layout.input_dim
        sides = ((own.shape[out], own.cuts[out]), (own.shape[into], own.cuts[into]))
        elements = math.prod(program.shape(each.node.name)[1:])
        found.append((TimedMap(sides, measured[key]), elements))
    explained = sum(timed.times[-1][-1] for timed, _ in found)
    rest = max(0.0, whole - explained)
    total = max(1, sum(elements for _, elements in found))
    shrink = min(1.0, whole / explained) if explained > 0 else 1.0  # maps alone never take more than the network
    maps = tuple(
        TimedMap(
            timed.sides, tuple(tuple(shrink * value for value in row) for row in timed.times), rest * elements / total
        )
        for timed, elements in found
    )
    return LatencyModel(maps, 0.0 if found else whole)


def time_map(each: LinearMap, shape: tuple[int, ...], weight: Tensor) -> tuple[tuple[float, ...], ...]:
    """Milliseconds of one map at every pair of output and input fractions; grouped maps are scaled from full width."""
    layout = each.layout
    at = 1 if layout.spatial else len(shape) - 1
    whole = time_once(each, shape, weight)
    if each.groups > 1:
        return tuple(tuple(whole * out for _ in FRACTIONS) for out in FRACTIONS)
    rows = []
    for out in FRACTIONS:
        row = []
        outputs = max(1, round(out * weight.shape[layout.output_dim]))
        for into in FRACTIONS:
            size = max(1, round(into * shape[at]))
            part = weight.narrow(layout.output_dim, 0, outputs).narrow(layout.input_dim, 0, size).contiguous()
            narrow = (*shape[:at], size, *shape[at + 1 :])
            row.append(whole if out == into == 1 else time_once(each, narrow, part))
        rows.append(tuple(row))
    return tuple(rows)


def time_once(each: LinearMap, shape: tuple[int, ...], weight: Tensor) -> float:
    """Median milliseconds of one map on inputs of `shape`."""
    inputs = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    times: list[float] = []
    began = time.perf_counter()
    with torch.inference_mode():
        for attempt in range(PASSES + 1):
            start = time.perf_counter()
            each.apply(inputs, weight)
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            if attempt:
                times.append(1e3 * (time.perf_counter() - start))
            if len(times) >= 3 and time.perf_counter() - began > MOST_SECONDS:
                break
    return statistics.median(times)

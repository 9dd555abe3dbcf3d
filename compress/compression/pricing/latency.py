"""Latency by the widths: every linear map's time, measured here along its output and along its input channels.

Kernels work in blocks of channels, so that time rises in steps and odd widths can be slower than wider even ones: a map
is timed at all widths where it has few channels, and at blocks and beside them where it has many. What the maps do not
explain of the whole network's time (normalisations, activations, copies, the calls themselves) is theirs in two parts:
one that shrinks with the elements they put out, and one that every call costs, which goes only where its block goes as
a whole. The two are told apart by timing a copy cut to half its widths. The prediction is then checked on the network
cut to the widths in question, and corrected by what was measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.execution import with_channels_last
from compress.compression.pricing.costs import SizedTensor
from compress.graph.cost import batch_of, measure_latency
from compress.graph.meaning import linear_maps
from compress.graph.ops import LinearMap
from compress.graph.program import Program
from compress.report.model import MapTime
from compress.units.forms import Form
from compress.units.groups import UnitGroup
from compress.units.network import Network
from compress.units.surgery import narrow

ALL_WIDTHS = 24  # channels up to which every width is timed
BLOCKS = 12  # of channels, at whose ends and beside them wider maps are timed
PASSES = 5  # of one map at one width
MOST_PASSES = 200  # of a network, in three seconds at most
MOST_SECONDS = 0.7  # of timing one map along one side

Cuts = tuple[tuple[str, int], ...]  # (group, channels that each of its units takes)


@dataclass(frozen=True)
class Timing:
    """On what latency is measured.

    Attributes:
        batch: samples; a network that runs on one batch size only is timed on that.
        threads: of torch; None: as many as it has.
        channels_last: whether convolutions are timed with their channels last.
    """

    batch: int = 1
    threads: int | None = None
    channels_last: bool = False

    def inputs(self, network: Network) -> tuple[Tensor, ...]:
        """The batch that the network is timed on."""
        return batch_of(network.examples, self.batch if network.batch_size is None else None)

    def laid_out(self, value: Tensor) -> Tensor:
        """Feature maps or the weight of a convolution, as they are timed."""
        return with_channels_last(value) if self.channels_last else value

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it torch runs on the threads asked for."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class TimedMap:
    """Milliseconds of one linear map.

    Attributes:
        name: of the weight's module.
        sides: for output and input channels the full extent and the groups that cut it.
        outputs, inputs: times by output channels (D + 1,) with all inputs, and by input channels (I + 1,) with all
            outputs; at 0 nothing is left. A map cut on both sides takes their product over the whole time.
        shrinking: milliseconds of what follows it, at full width, that shrink with the output channels.
        fixed: milliseconds of what follows it that it takes at any width.
        pairs: rank -> time of two layers of that rank in its place, as a fraction of its own.
    """

    name: str
    sides: tuple[tuple[int, Cuts], tuple[int, Cuts]]
    outputs: Tensor
    inputs: Tensor
    shrinking: float = 0.0
    fixed: float = 0.0
    pairs: Mapping[int, float] = field(default_factory=dict)

    @property
    def weight(self) -> str:
        """State name of its weight."""
        return f"{self.name}.weight"

    def depends_on(self, group: str) -> bool:
        """Whether the group cuts the map."""
        return any(name == group for _, cuts in self.sides for name, _ in cuts)

    @cached_property
    def _numbers(self) -> tuple[list[float], list[float]]:
        """The times as plain numbers, for one width at a time."""
        return self.outputs.tolist(), self.inputs.tolist()

    def milliseconds(self, removed: Mapping[str, int], rank: int = 0) -> float:
        """Time when so many units of each group are removed; without channels its block is gone, and all of it."""
        out, into = (extent - sum(each * removed.get(name, 0) for name, each in cuts) for extent, cuts in self.sides)
        if out <= 0 or into <= 0:
            return 0.0
        outputs, inputs = self._numbers
        map_time = self.pairs.get(rank, 1.0) * outputs[out] * inputs[into] / max(outputs[-1], 1e-12)
        return map_time + self.shrinking * out / self.sides[0][0] + self.fixed

    def profile(self, removed: Mapping[str, int], group: str, counts: Sequence[int], rank: int = 0) -> Tensor:
        """Times (n,) when so many units of each group are removed, of `group` each of `counts`."""
        varied = torch.tensor(counts, dtype=torch.int64)
        out, into = (
            extent - sum(each * (varied if name == group else removed.get(name, 0)) for name, each in cuts)
            for extent, cuts in self.sides
        )
        out, into = (torch.as_tensor(side).clamp_min(0).expand(len(varied)) for side in (out, into))
        whole = max(float(self.outputs[-1]), 1e-12)
        map_times = self.pairs.get(rank, 1.0) * self.outputs[out] * self.inputs[into] / whole
        times = map_times + self.shrinking * out / self.sides[0][0] + self.fixed
        return torch.where((out > 0) & (into > 0), times, 0.0)


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicted latency of one batch.

    Attributes:
        fixed: milliseconds that no width changes.
        scale: measured over predicted time of the cut network last looked at.
        given: milliseconds of the network as it was given; None: what is predicted for it.
    """

    maps: tuple[TimedMap, ...]
    fixed: float
    scale: float = 1.0
    given: float | None = None

    @property
    def original(self) -> float:
        """Milliseconds of the network before anything was done to it."""
        return self.milliseconds({}) if self.given is None else self.given

    def milliseconds(self, removed: Mapping[str, int], ranks: Mapping[str, int] | None = None) -> float:
        """Time when so many units of each group are removed, and weights by their names have such ranks."""
        known = ranks or {}
        total = self.fixed + sum(each.milliseconds(removed, known.get(each.weight, 0)) for each in self.maps)
        return total * (self.scale if ranks or any(removed.values()) else 1.0)

    def profile(
        self,
        removed: Mapping[str, int],
        group: str,
        counts: Sequence[int],
        ranks: Mapping[str, int] | None = None,
    ) -> Tensor:
        """Times (n,) of the maps that a group cuts when `counts` of its units are removed."""
        known = ranks or {}
        profiles = [
            each.profile(removed, group, counts, known.get(each.weight, 0))
            for each in self.maps
            if each.depends_on(group)
        ]
        return self.scale * torch.stack(profiles).sum(0) if profiles else torch.zeros(len(counts), dtype=torch.float64)

    def of_map(self, removed: Mapping[str, int], weight: str, rank: int) -> float:
        """Time of the map of one weight at a rank (0: whole)."""
        return self.scale * sum(each.milliseconds(removed, rank) for each in self.maps if each.weight == weight)

    def with_pairs(self, pairs: Mapping[str, Mapping[int, float]]) -> LatencyModel:
        """The model that knows of two layers in the place of maps: weight -> rank -> fraction of the map's time."""
        return replace(self, maps=tuple(replace(each, pairs=pairs.get(each.weight, {})) for each in self.maps))


def measure_latency_model(
    network: Network, groups: Sequence[UnitGroup], tensors: Sequence[SizedTensor], timing: Timing, form: Form
) -> LatencyModel:
    """Time the network, a copy in its form, one of half its widths, and every linear map at several widths.

    Args:
        groups: those that may lose units.
        tensors: the cost model's tensors, with the groups that cut them.
    """
    sized = {tensor.name: tensor for tensor in tensors}
    inputs = timing.inputs(network)
    kept = half_of(groups)
    with timing.running():
        cuts = [*([{}] if form else []), *([kept] if kept else [])]
        copies = [form.of(narrow(network.module, units, groups)).module for units in cuts]
        times = [each.least for each in measure_latency((network.module, *copies), inputs, most=MOST_PASSES)]
        timed = time_maps(network.program, sized, network.state, timing, len(inputs[0]))
    removed = {group.name: group.unit_count - len(kept[group.name]) for group in groups if group.name in kept}
    return replace(spread_rest(timed, times[1:] if form else times, removed), given=times[0])


def half_of(groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
    """Group name -> every second unit, of the groups that have several in each of their blocks."""
    halves: dict[str, Tensor] = {}
    for group in groups:
        size = group.unit_count // group.blocks
        if size > 1:
            units = torch.arange(group.unit_count)
            halves[group.name] = units[units % size % 2 == 0]
    return halves


def spread_rest(
    timed: Sequence[tuple[TimedMap, int]], wholes: Sequence[float], removed: Mapping[str, int]
) -> LatencyModel:
    """The maps with what they do not explain of the whole time.

    With R milliseconds unexplained of the network and R' of its half, whose maps put out a share q of the elements, the
    part f that does not shrink follows from R' = R (f + (1 − f) q).

    Args:
        timed: maps, and the elements that each puts out.
        wholes: milliseconds of the network, and of a copy cut by `removed`, where there is one.
    """
    if not timed:
        return LatencyModel((), wholes[0])
    explained = sum(float(each.outputs[-1]) for each, _ in timed)
    shrink = min(1.0, wholes[0] / explained) if explained > 0 else 1.0  # maps alone never take more than the network
    maps = [replace(each, outputs=shrink * each.outputs, inputs=shrink * each.inputs) for each, _ in timed]
    elements = [count for _, count in timed]
    remainder, share = max(0.0, wholes[0] - shrink * explained), 0.0
    if len(wholes) > 1 and remainder > 0:
        left = sum(count * left_outputs(each, removed) for each, count in timed) / max(1, sum(elements))
        cut_time = sum(each.milliseconds(removed) for each in maps)
        share = min(1.0, max(0.0, ((wholes[1] - cut_time) / remainder - left) / max(1e-9, 1 - left)))
    return LatencyModel(
        tuple(
            replace(
                each,
                shrinking=remainder * (1 - share) * count / max(1, sum(elements)),
                fixed=remainder * share / len(maps),
            )
            for each, count in zip(maps, elements, strict=True)
        ),
        0.0,
    )


def left_outputs(timed: TimedMap, removed: Mapping[str, int]) -> float:
    """Share of a map's output channels that is left."""
    extent, cuts = timed.sides[0]
    return 1 - sum(each * removed.get(name, 0) for name, each in cuts) / extent


def time_maps(
    program: Program, sized: Mapping[str, SizedTensor], state: Mapping[str, Tensor], timing: Timing, batch: int
) -> list[tuple[TimedMap, int]]:
    """Every linear map timed along both sides, and the elements of a sample that it puts out."""
    measured: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    timed: list[tuple[TimedMap, int]] = []
    for linear in linear_maps(program.network):
        if linear.weight is None or linear.weight not in sized:
            continue
        shape = input_shape(program, linear, batch)
        key = (linear.node.target, shape, tuple(state[linear.weight].shape), linear.groups, linear.window)
        if key not in measured:
            measured[key] = time_map(linear, shape, state[linear.weight], timing)
        sized_weight = sized[linear.weight]
        out, into = linear.layout.output_dim, linear.layout.input_dim
        sides = ((sized_weight.shape[out], sized_weight.cuts[out]), (sized_weight.shape[into], sized_weight.cuts[into]))
        elements = math.prod(program.shape(linear.node.name)[1:])
        timed.append((TimedMap(linear.weight.rpartition(".")[0], sides, *measured[key]), elements))
    return timed


def input_shape(program: Program, linear: LinearMap, batch: int) -> tuple[int, ...]:
    """What a map is applied to when the network runs on a batch of so many samples."""
    first, *others = program.shape(linear.input.name)
    return max(1, first * batch // len(program.network.examples[0])), *others


def time_chosen(
    network: Network, model: LatencyModel, removed: Mapping[str, int], ranks: Mapping[str, int], timing: Timing
) -> list[MapTime]:
    """Each map by itself at the widths that were chosen: predicted, and measured again.

    Grouped ones are left out, and those whose weights have a low rank, which two layers compute.
    """
    maps = {each.name: each for each in model.maps}
    times: list[MapTime] = []
    batch = len(timing.inputs(network)[0])
    for linear in linear_maps(network.graph):
        name = "" if linear.weight is None else linear.weight.rpartition(".")[0]
        if linear.weight is None or name not in maps or linear.groups > 1 or linear.weight in ranks:
            continue
        timed, weight, layout = maps[name], network.state[linear.weight], linear.layout
        out, into = (extent - sum(own * removed.get(key, 0) for key, own in cuts) for extent, cuts in timed.sides)
        predicted, measured = 0.0, 0.0
        if out > 0 and into > 0:
            predicted = float(timed.outputs[out] * timed.inputs[into] / timed.outputs[-1])
            shape = list(input_shape(network.program, linear, batch))
            shape[1 if layout.spatial else -1] = into
            part = weight.narrow(layout.output_dim, 0, out).narrow(layout.input_dim, 0, into).contiguous()
            with timing.running():
                measured = time_once(linear, tuple(shape), part, timing)
        times.append(MapTime(name, float(timed.outputs[-1]), predicted, measured))
    return times


def time_map(each: LinearMap, shape: tuple[int, ...], weight: Tensor, timing: Timing) -> tuple[Tensor, Tensor]:
    """Milliseconds of one map by output (D + 1,) and by input channels (I + 1,); grouped ones go by the whole.

    Args:
        shape: of its input.
    """
    layout = each.layout
    at = 1 if layout.spatial else len(shape) - 1
    out, into = weight.shape[layout.output_dim], weight.shape[layout.input_dim]
    if each.groups > 1:
        whole = time_once(each, shape, weight, timing)
        falling = whole * torch.arange(out + 1, dtype=torch.float64) / out
        return falling, torch.full((into + 1,), whole, dtype=torch.float64)

    def along_outputs(count: int) -> float:
        return time_once(each, shape, weight.narrow(layout.output_dim, 0, count).contiguous(), timing)

    def along_inputs(count: int) -> float:
        narrow_shape = (*shape[:at], count, *shape[at + 1 :])
        return time_once(each, narrow_shape, weight.narrow(layout.input_dim, 0, count).contiguous(), timing)

    return time_widths(along_outputs, out), time_widths(along_inputs, into)


def time_widths(timed: Any, extent: int) -> Tensor:
    """Times (extent + 1,) at all widths, linear between those that were measured; 0 at no width.

    Args:
        timed: width -> milliseconds.
    """
    if not extent:
        return torch.zeros(1, dtype=torch.float64)
    began = time.perf_counter()
    known = {0: 0.0}
    for width in timed_widths(extent):
        known[width] = timed(width)
        if len(known) > 3 and time.perf_counter() - began > MOST_SECONDS:
            break
    places = torch.tensor(sorted(known), dtype=torch.float64)
    values = torch.tensor([known[width] for width in sorted(known)], dtype=torch.float64)
    values[0] = values[1]  # a call takes its time however little is left of it
    at = torch.arange(extent + 1, dtype=torch.float64)
    right = torch.searchsorted(places, at).clamp(1, len(places) - 1)
    share = (at - places[right - 1]) / (places[right] - places[right - 1])
    times = values[right - 1] + share * (values[right] - values[right - 1])
    times[0] = 0.0
    return times


def timed_widths(extent: int) -> list[int]:
    """Widths to time, the whole first, then the coarse ones and what lies between them."""
    if extent <= ALL_WIDTHS:
        inner = list(range(1, extent))
        order = sorted(inner, key=lambda width: (-(width & -width), width))
    else:
        block = max(8, 8 * round(extent / BLOCKS / 8))
        ends = list(range(block, extent, block))
        order = [*ends, *(end - 1 for end in ends), *(end - block // 2 for end in ends)]
    return list(dict.fromkeys([extent, *(width for width in order if 0 < width < extent)]))


def time_once(linear: LinearMap, shape: tuple[int, ...], weight: Tensor, timing: Timing) -> float:
    """The least of some milliseconds of one map on inputs of `shape`: what disturbs a measurement only adds."""
    inputs = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    if linear.layout.spatial:
        inputs, weight = timing.laid_out(inputs), timing.laid_out(weight)
    times: list[float] = []
    with torch.inference_mode():
        for attempt in range(PASSES + 1):
            start = time.perf_counter()
            linear.apply(inputs, weight)
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            if attempt:
                times.append(1e3 * (time.perf_counter() - start))
    return min(times)

"""Readings: where a group's features Φ are read, as rows of a matrix, and which weights multiply them there.

Consumers that read the same features through the same window form one reading, their outputs side by side along D. A
weight that is applied in several places is one reading with the rows of all of them. Each block of a grouped
convolution is a reading of its own. A transposed convolution is read as a convolution of stride 1 over its input with
zeros set between the pixels, its window mirrored; rows that `output_padding` adds are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compress.graph.ops import Layout
from compress.graph.program import Program
from compress.recording.positions import has_channels_last, picked_rows
from compress.units.groups import Consumer, ReadUnits


@dataclass(frozen=True, eq=False)
class Reading:
    """Consumers of one group that see the same Φ (N, K·s).

    Attributes:
        places: for each weight the consumers that apply it; all weights are applied to the same inputs alike.
        kernel: spatial extent of the window, () for a linear consumer.
        positions: (K, m) positions of the units among the input channels of the block.
        block: which block of a grouped convolution is read; 0 otherwise.
    """

    places: tuple[tuple[Consumer, ...], ...]
    kernel: tuple[int, ...]
    positions: Tensor
    block: int = 0

    @property
    def consumers(self) -> tuple[Consumer, ...]:
        """One consumer for each weight."""
        return tuple(applied[0] for applied in self.places)

    @property
    def sites(self) -> tuple[Consumer, ...]:
        """One consumer for each input: where rows are read."""
        return self.places[0]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes that carry the features."""
        return tuple(site.input for site in self.sites)

    @property
    def group_size(self) -> int:
        """s: columns of Φ per unit."""
        return self.positions.shape[1] * math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """K·s."""
        return self.positions.shape[0] * self.group_size

    @property
    def takes_constant(self) -> bool:
        """Whether all its consumers can take a new constant: in a bias, or in the batch norm behind them."""
        return all(
            consumer.bias is not None or consumer.shift is not None for applied in self.places for consumer in applied
        )

    def outputs(self, consumer: Consumer, state: Mapping[str, Tensor]) -> slice:
        """Which of the consumer's output channels the reading makes."""
        count = self._view(consumer, state[consumer.weight]).shape[0]
        return slice(self.block * count, (self.block + 1) * count)

    def weights(self, state: Mapping[str, Tensor]) -> Tensor:
        """Output weights V (K·s, D) of all consumers side by side, in float64."""
        return torch.cat([self.matrix(consumer, state[consumer.weight]) for consumer in self.consumers], 1)

    def matrix(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """Rows of one consumer's weight that read the group's units: V (K·s, D), unit-major, in float64."""
        picked = self._view(consumer, weight)[:, self.positions.flatten().to(weight.device)]  # (D, K·m, taps…)
        return self._mirrored(picked).reshape(picked.shape[0], self.columns).T.to(torch.float64)

    def whole_matrix(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """One consumer's weight for all input channels as a matrix (I·taps, D), in float64."""
        view = self._view(consumer, weight)
        return self._mirrored(view).reshape(view.shape[0], -1).T.to(torch.float64)

    def whole_columns(self, consumer: Consumer, state: Mapping[str, Tensor]) -> int:
        """I·taps: rows of `whole_matrix`."""
        return math.prod(self._view(consumer, state[consumer.weight]).shape[1:])

    def with_matrix(self, consumer: Consumer, weight: Tensor, coefficients: Tensor) -> Tensor:
        """A copy of the weight with V (K·s, D) put where `matrix` took it from, in the weight's dtype."""
        changed = weight.clone()
        view = self._view(consumer, changed)
        block = coefficients.T.reshape(view.shape[0], self.positions.numel(), *view.shape[2:])
        view[:, self.positions.flatten().to(weight.device)] = self._mirrored(block).to(weight)
        return changed

    def _view(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """The block's part (D, I, taps…) of a weight, as a view; the window not yet mirrored."""
        size = weight.shape[0] // consumer.groups
        part = weight[self.block * size : (self.block + 1) * size]
        return part if consumer.layout.input_dim == 1 else part.transpose(0, 1)

    def _mirrored(self, weight: Tensor) -> Tensor:
        if self.consumers[0].layout is not Layout.CONVOLUTION_TRANSPOSED:
            return weight
        return weight.flip(tuple(range(2, weight.ndim)))


def constant_of(consumer: Consumer) -> tuple[str, int]:
    """The tensor that takes a new constant and its sign there: a bias, or the mean of the batch norm behind."""
    if consumer.bias is not None:
        return consumer.bias, 1
    assert consumer.shift is not None, "only called where a constant is free"
    return consumer.shift, -1


def find_readings(group: ReadUnits, state: Mapping[str, Tensor]) -> tuple[Reading, ...]:
    """Readings of a group, in the order of its consumers."""
    applied: dict[str, list[Consumer]] = {}
    for consumer in group.consumers:
        applied.setdefault(consumer.weight, []).append(consumer)
    shared: dict[tuple[object, ...], list[list[Consumer]]] = {}
    for sites in applied.values():
        first = sites[0]
        key: tuple[object, ...] = (
            tuple((site.input, site.window) for site in sites),
            first.layout,
            first.groups,
            tuple(state[first.weight].shape[2:]),
            tuple(first.positions.flatten().tolist()),
        )
        shared.setdefault(key, []).append(sites)
    readings: list[Reading] = []
    for members in shared.values():
        first = members[0][0]
        kernel = tuple(state[first.weight].shape[2:])
        for block, positions in block_positions(first, state[first.weight]):
            readings.append(Reading(tuple(tuple(sites) for sites in members), kernel, positions, block))
    return tuple(readings)


def block_positions(consumer: Consumer, weight: Tensor) -> list[tuple[int, Tensor]]:
    """For each block of a grouped convolution that reads the units: its number, positions (K, m) inside the block.

    Raises:
        ValueError: a block reads some units more often than others.
    """
    if consumer.groups == 1:
        return [(0, consumer.positions)]
    inputs = weight.shape[1] if consumer.layout.input_dim == 1 else weight.shape[0] // consumer.groups
    blocks = []
    for block in range(consumer.groups):
        in_block = consumer.positions // inputs == block
        counts = in_block.sum(1)
        if int(counts.min()) != int(counts.max()):
            raise ValueError(f"block {block} of `{consumer.weight}` reads some units of the group and not others.")
        if int(counts.max()):
            inside = consumer.positions[in_block].reshape(len(counts), -1) - block * inputs
            blocks.append((block, inside))
    return blocks


def output_positions(reading: Reading, program: Program) -> int:
    """Output positions of a reading per sample, from the traced shapes; 1 for a linear one."""
    if not reading.kernel:
        return 1
    return max(math.prod(output_extent(reading, site, program.shape(site.input))) for site in reading.sites)


def output_extent(reading: Reading, site: Consumer, shape: Sequence[int]) -> tuple[int, ...]:
    """Output positions per spatial dimension where the site's input has `shape` (B, C, …)."""
    stuffing, stride = steps(site)
    return tuple(
        ((size - 1) * stuff + 1 + before + after - spread * (width - 1) - 1) // step + 1
        for size, stuff, (before, after), spread, width, step in zip(
            shape[2:], stuffing, margins(reading, site), site.window.dilation, reading.kernel, stride, strict=True
        )
    )


def steps(site: Consumer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Distance at which the input's pixels are set, and step of the window over the result."""
    stride, ones = site.window.stride, (1,) * len(site.window.stride)
    return (stride, ones) if site.layout is Layout.CONVOLUTION_TRANSPOSED else (ones, stride)


def margins(reading: Reading, site: Consumer) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each spatial dimension that the window sees; below zero, so many are cut off."""
    window = site.window
    if site.layout is not Layout.CONVOLUTION_TRANSPOSED:
        return tuple((pad, pad + more) for pad, more in zip(window.padding, window.trailing, strict=True))
    widths = [
        spread * (width - 1) - pad
        for spread, width, pad in zip(window.dilation, reading.kernel, window.padding, strict=True)
    ]
    return tuple((width, width) for width in widths)


def sample_positions(
    reading: Reading, site: Consumer, inputs: Tensor, count: int, generator: torch.Generator
) -> Tensor | None:
    """Output positions (B, P) to read, drawn without replacement for each sample; None where every one is read."""
    if not reading.kernel:
        return None
    available = math.prod(output_extent(reading, site, inputs.shape))
    if count >= available:
        return None
    draws = torch.rand(inputs.shape[0], available, generator=generator)
    return draws.topk(count, dim=1).indices.to(inputs.device)


def read_rows(reading: Reading, site: Consumer, inputs: Tensor, index: Tensor | None, *, own: bool = False) -> Tensor:
    """Rows (n, I·taps) that the consumers multiply, channel-major, from their input activations.

    Args:
        inputs: (…, I) for a linear reading, (B, I·blocks, …) for a conv one.
        index: output positions (B, P) in row-major order; None for all.
        own: only the columns (n, K·s) of the group's own units, unit-major.
    """
    if not reading.kernel:
        rows = inputs.reshape(-1, inputs.shape[-1])
        return own_columns(reading, rows) if own else rows
    extent = output_extent(reading, site, inputs.shape)
    if index is not None and all(step == 1 for step in steps(site)[0]):
        return drawn_rows(reading, site, inputs, torch.unravel_index(index, extent), own=own)
    padded = windowed_input(reading, site, inputs)
    if own and not takes_all(reading, padded.shape[1]):
        padded = padded.index_select(1, reading.positions.flatten().to(padded.device))
    if math.prod(reading.kernel) > 1:
        padded = padded.contiguous()
    batch, channels = padded.shape[:2]
    strides = padded.stride()
    windows = padded.as_strided(
        (batch, *extent, channels, *reading.kernel),
        (
            strides[0],
            *(step * size for step, size in zip(steps(site)[1], strides[2:], strict=True)),
            strides[1],
            *(step * size for step, size in zip(site.window.dilation, strides[2:], strict=True)),
        ),
    )
    columns = channels * math.prod(reading.kernel)
    if index is None:
        return windows.reshape(-1, columns)
    places = torch.unravel_index(index, extent)
    rows = torch.arange(batch, device=inputs.device)[:, None]
    return windows[(rows, *places)].reshape(-1, columns)


def drawn_rows(reading: Reading, site: Consumer, inputs: Tensor, places: tuple[Tensor, ...], *, own: bool) -> Tensor:
    """As `read_rows`, of output positions `places`, a (B, P) for each dimension, without a padded copy of inputs."""
    picked = drawn_windows(reading, site, inputs, places)  # (B, C, P, taps)
    if own and not takes_all(reading, picked.shape[1]):
        picked = picked.index_select(1, reading.positions.flatten().to(picked.device))
    return picked.transpose(1, 2).reshape(-1, picked.shape[1] * picked.shape[3])


def drawn_windows(reading: Reading, site: Consumer, inputs: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """What the window sees (B, C, P, taps) at output positions `places`, a (B, P) for each dimension; step 1 inside."""
    if site.groups > 1:
        size = inputs.shape[1] // site.groups
        inputs = inputs.narrow(1, reading.block * size, size)
    batch, channels, *sizes = inputs.shape
    dims = len(sizes)
    flat = torch.zeros((1,) * (2 + dims), dtype=torch.int64, device=inputs.device)  # to (B, P, taps…), row-major
    outside = torch.zeros_like(flat, dtype=torch.bool)
    geometry = zip(
        places, sizes, margins(reading, site), site.window.dilation, reading.kernel, steps(site)[1], strict=True
    )
    for dim, (place, size, (before, _), spread, width, step) in enumerate(geometry):
        taps = spread * torch.arange(width, device=inputs.device) - before
        at = (step * place[:, :, None] + taps).reshape(*place.shape, *(width if dim == d else 1 for d in range(dims)))
        flat = flat * size + at.clamp(0, size - 1)
        outside = outside | (at < 0) | (at >= size)
    count = flat[0, 0].numel()
    flat, outside = flat.reshape(batch, -1), outside.reshape(batch, -1)  # (B, P·taps)
    if has_channels_last(inputs) and flat.shape[1] < math.prod(sizes):  # else a copy in the other layout is cheaper
        rows = picked_rows(inputs, flat)  # (B·P·taps, C)
        if bool(outside.any()):
            rows.masked_fill_(outside.reshape(-1, 1), 0.0)
        if count == 1:
            return rows.reshape(batch, -1, 1, channels).permute(0, 3, 1, 2)
        return rows.T.contiguous().reshape(channels, batch, -1, count).transpose(0, 1)
    picked = inputs.flatten(2).gather(2, flat[:, None].expand(-1, channels, -1))  # (B, C, P·taps)
    if bool(outside.any()):
        picked.masked_fill_(outside[:, None], 0.0)
    return picked.reshape(batch, channels, -1, count)


def channel_windows(reading: Reading, site: Consumer, inputs: Tensor, index: Tensor | None) -> Tensor:
    """Each channel's rows (C, n, taps) of a reading that takes every channel through a window; `index` as ever."""
    channels = reading.positions.shape[0]
    if index is not None and all(step == 1 for step in steps(site)[0]):
        places = torch.unravel_index(index, output_extent(reading, site, inputs.shape))
        windows = drawn_windows(reading, site, inputs, places)
        return windows.transpose(0, 1).reshape(channels, -1, windows.shape[3])
    rows = read_rows(reading, site, inputs, index)
    return rows.reshape(len(rows), channels, -1).transpose(0, 1)


def windowed_input(reading: Reading, site: Consumer, inputs: Tensor) -> Tensor:
    """What the window slides over (B, I, …): the block's channels, zeros set between (transposed) and around them."""
    if site.groups > 1:
        size = inputs.shape[1] // site.groups
        inputs = inputs.narrow(1, reading.block * size, size)
    stuffing = steps(site)[0]
    if any(step > 1 for step in stuffing):
        sizes = [(size - 1) * step + 1 for size, step in zip(inputs.shape[2:], stuffing, strict=True)]
        spaced = inputs.new_zeros(*inputs.shape[:2], *sizes)
        places = tuple(slice(None, None, step) for step in stuffing)
        spaced[:, :, *places] = inputs
        inputs = spaced
    pads = [pad for sides in reversed(margins(reading, site)) for pad in sides]
    return functional.pad(inputs, pads) if any(pads) else inputs


def own_columns(reading: Reading, rows: Tensor) -> Tensor:
    """The columns (n, K·s) of the group's own units, unit-major, out of all input channels' (n, I·taps)."""
    positions = reading.positions.flatten()
    taps = math.prod(reading.kernel)
    if takes_all(reading, rows.shape[1] // taps):
        return rows
    blocks = rows.reshape(rows.shape[0], -1, taps)
    return blocks.index_select(1, positions.to(rows.device)).reshape(rows.shape[0], -1)


def takes_all(reading: Reading, channels: int) -> bool:
    """Whether the units are all of the block's input channels, in their order."""
    positions = reading.positions.flatten()
    return len(positions) == channels and torch.equal(positions.cpu(), torch.arange(channels))

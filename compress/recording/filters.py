"""Depthwise convolutions: the moments from which each channel's filter is refitted once its input has moved.

A depthwise convolution reads every unit by itself, so that cutting units asks nothing of it; but its input carries the
errors of what was cut in front of it, and the few taps of each channel can take a part of them back. Channels do not
mix: their moments are small matrices side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import NonFiniteError
from compress.graph.program import Program
from compress.recording.readings import Reading, constant_of, read_rows, sample_positions
from compress.recording.record import SamplePlan
from compress.recording.residuals import Rectifier
from compress.recording.sharing import Share
from compress.units.groups import Consumer

RIDGE_FLOOR = 1e-9  # of a channel's mean second moment, on every tap, so that dead taps have a solution
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class FilterMoments:
    """Second moments of each channel's patches x (with a one, where a constant is free) and its wanted output y.

    Attributes:
        gram: E xxᵀ (C, T, T); `cross`: E xy (C, T); `energy`: E y² (C,).
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    def errors(self, filters: Tensor) -> Tensor:
        """Squared error (C,) of filters (C, T)."""
        fitted = torch.einsum("ct,ctu,cu->c", filters, self.gram, filters)
        return (self.energy - 2 * (filters * self.cross).sum(1) + fitted).clamp_min(0)


class FilterRecorder:
    """Accumulates the moments of one depthwise convolution over batches; float64, streamed.

    Args:
        rectifier: the ReLU behind it. The targets then are what the channels give now, moved so that the rectified
            values become the original's.
    """

    def __init__(self, consumer: Consumer, plan: SamplePlan, *, seed: int, rectifier: Rectifier | None = None) -> None:
        self.consumer, self.plan, self.rectifier = consumer, plan, rectifier
        self.share = Share()  # the matrices are small: every process adds all batches
        self.fault: NonFiniteError | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: list[Tensor] = []
        self._count = 0

    @property
    def wanted(self) -> set[str]:
        """Names of the nodes whose values `add` reads."""
        return {self.consumer.input} if self.rectifier is None else {self.consumer.input, self.rectifier.source}

    def add(
        self,
        values: Mapping[str, tuple[Tensor, Tensor]],
        original: Mapping[str, Tensor],
        current: Mapping[str, Tensor],
    ) -> None:
        """Add one batch. `values` holds the `wanted` nodes in the original and the current network.

        Raises:
            NonFiniteError: an activation is NaN or Inf.
        """
        consumer = self.consumer
        reading = filter_reading(consumer, original[consumer.weight])
        (site,) = reading.sites
        first, second = values[consumer.input]
        index = sample_positions(reading, site, first, self.plan.positions[0], self._generator)
        channels = reading.positions.shape[0]
        rows = read_rows(reading, site, second, index).double().reshape(-1, channels, reading.group_size)  # (n, C, T)
        if not bool(torch.isfinite(rows.sum())):
            raise NonFiniteError(
                f"NaN or Inf in the activations that `{consumer.input}` hands on; check the weights up to there and "
                "the preprocessing."
            )
        if self.rectifier is None:
            source = rows if second is first else read_rows(reading, site, first, index).double().reshape(rows.shape)
            targets = torch.einsum("nct,ct->nc", source, filters_of(consumer, original))
        else:
            targets = torch.einsum("nct,ct->nc", rows, filters_of(consumer, current))
            targets += constants_of(consumer, original, current)
            wanted, now = values[self.rectifier.source]
            targets += self.rectifier.correction(wanted, now, current, index, linear=False)
        if takes_constant(consumer):
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        by_channel = rows.transpose(0, 1)  # (C, n, T)
        parts = [
            by_channel.mT @ by_channel,
            (by_channel.mT @ targets.T[:, :, None])[:, :, 0],
            targets.square().sum(0),
        ]
        self._sums = [total + part for total, part in zip(self._sums, parts, strict=True)] if self._sums else parts
        self._count += len(rows)

    def skip(self, size: int, program: Program) -> None:
        """Never asked: every process adds all batches."""

    def moments(self) -> FilterMoments:
        """What was added. Raises NonFiniteError: an activation was NaN or Inf."""
        if self.fault is not None:
            raise self.fault
        return FilterMoments(*(total / max(self._count, 1) for total in self._sums))


def filter_reading(consumer: Consumer, weight: Tensor) -> Reading:
    """Patches of all channels side by side: as if one output read them all."""
    kernel = tuple(weight.shape[2:])
    return Reading(((replace(consumer, groups=1),),), kernel, consumer.positions)


def filters_of(consumer: Consumer, state: Mapping[str, Tensor]) -> Tensor:
    """Each channel's filter (C, T), float64."""
    weight = state[consumer.weight]
    return weight.double().reshape(len(weight), -1)


def takes_constant(consumer: Consumer) -> bool:
    """Whether a constant is free, in a bias or in the batch norm behind."""
    return consumer.bias is not None or consumer.shift is not None


def constants_of(consumer: Consumer, original: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> Tensor:
    """The constants (C,) that were added to the original's so far."""
    if not takes_constant(consumer):
        return original[consumer.weight].new_zeros(len(original[consumer.weight]), dtype=torch.float64)
    name, sign = constant_of(consumer)
    return sign * (current[name].double() - original[name].double())


def refit_filters(
    consumer: Consumer,
    fitting: FilterMoments,
    held_back: FilterMoments,
    ridge: float,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """New tensors of a depthwise convolution: each channel's least squares, where its held-back samples gain.

    Args:
        ridge: on the change of a filter, relative to each tap's second moment.
    """
    before = filters_of(consumer, current)
    if takes_constant(consumer):
        before = torch.cat([before, constants_of(consumer, original, current)[:, None]], 1)
    taps = fitting.gram.diagonal(dim1=1, dim2=2)
    weighted = fitting.gram + torch.diag_embed(ridge * taps + RIDGE_FLOOR * taps.mean(1, keepdim=True).clamp_min(TINY))
    residual = fitting.cross - (fitting.gram @ before[:, :, None])[:, :, 0]
    change = torch.linalg.solve(weighted, residual)
    gains = held_back.errors(before + change) < held_back.errors(before)
    gains &= torch.isfinite(change).all(1)
    if not bool(gains.any()):
        return {}
    refitted = torch.where(gains[:, None], before + change, before)
    weight = current[consumer.weight]
    count = math.prod(weight.shape[1:])
    changed = {consumer.weight: refitted[:, :count].reshape(weight.shape).to(weight)}
    if takes_constant(consumer):
        name, sign = constant_of(consumer)
        changed[name] = (original[name].double() + sign * refitted[:, count]).to(original[name])
    return changed

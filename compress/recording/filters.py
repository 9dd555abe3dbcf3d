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

from compress.errors import MomentsError, NonFiniteError
from compress.graph.program import Program
from compress.recording.readings import Reading, channel_windows, constant_of, sample_positions
from compress.recording.record import OriginalRows, SamplePlan, given_rows, gives_rows
from compress.recording.residuals import WHOLE, Rectifier
from compress.recording.sharing import Share
from compress.units.groups import Consumer

RIDGE_FLOOR = 1e-9  # of a channel's mean second moment, on every tap, so that dead taps have a solution
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class FilterMoments:
    """Moments of each channel's patches x (with a one, where a constant is free), and of what its output lacks, y.

    Attributes:
        gram: E xxᵀ (C, T, T); `cross`: E xy (C, T); `energy`: E y² (C,).
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    def errors(self, changes: Tensor) -> Tensor:
        """Squared error (C,) that changes (C, T) of the filters leave."""
        fitted = torch.einsum("ct,ctu,cu->c", changes, self.gram, changes)
        return (self.energy - 2 * (changes * self.cross).sum(1) + fitted).clamp_min(0)


class FilterRecorder:
    """Accumulates the moments of one depthwise convolution over batches, each one's in its own precision, in float64.

    Args:
        rectifier: the ReLU behind it. The targets then are what the channels give now, moved so that the rectified
            values become the original's.
        kept: what the original network gave at these rows, where it does not run.
    """

    def __init__(
        self,
        consumer: Consumer,
        plan: SamplePlan,
        *,
        seed: int,
        rectifier: Rectifier | None = None,
        kept: OriginalRows | None = None,
    ) -> None:
        self.consumer, self.plan, self.rectifier = consumer, plan, rectifier
        self._kept = kept
        self._added = 0  # batches
        self.share = Share()  # the matrices are small: every process adds all batches
        self.fault: NonFiniteError | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: Tensor | None = None  # (C, T + 1, T + 1)
        self._count = 0

    @property
    def wanted(self) -> set[str]:
        """Names of the nodes whose values `add` reads."""
        return {self.consumer.input} if self.rectifier is None else {self.consumer.input, self.rectifier.source}

    @property
    def wanted_originals(self) -> set[str]:
        """Names of the nodes whose values `original_rows` reads."""
        return self.wanted | ({self.consumer.node} if self.rectifier is None and gives_rows(self.consumer) else set())

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
        second = values[consumer.input][1]
        index = sample_positions(reading, site, second, self.plan.positions[0], self._generator)
        windows = _windows(reading, second, index)  # (C, n, T)
        if self._kept is None:
            rows = self._given(reading, index, {name: values[name][0] for name in self.wanted}, original)
        else:
            ((rows,),) = self._kept.read(self._added)
        self._added += 1
        rows = rows.to(windows.device)
        if self.rectifier is None:
            missing = rows - _filtered(windows, consumer, current)
            missing -= constants_of(consumer, original, current)[:, None].to(missing)
        else:
            now = values[self.rectifier.source][1]
            missing = self.rectifier.correction(rows, now, current, index, linear=False).T.to(windows)
        others = [missing]
        if takes_constant(consumer):
            others.insert(0, torch.ones_like(missing))
        further = torch.stack(others, 2)
        products = products_of(windows, further)
        if not bool(torch.isfinite(products.sum())):
            products = products_of(windows.double(), further.double())
            if not bool(torch.isfinite(products.sum())):
                raise NonFiniteError(
                    f"NaN or Inf in the activations that `{consumer.input}` hands on; check the weights up to there "
                    "and the preprocessing."
                )
        self._sums = products if self._sums is None else self._sums.add_(products)
        self._count += windows.shape[1]

    def original_rows(self, values: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Of one batch, what `add` reads of the original network's `values`."""
        reading = filter_reading(self.consumer, original[self.consumer.weight])
        inputs = values[self.consumer.input]
        index = sample_positions(reading, reading.sites[0], inputs, self.plan.positions[0], self._generator)
        return [[self._given(reading, index, values, original)]]

    def bytes_of_rows(self, program: Program, state: Mapping[str, Tensor]) -> float:
        """What the original network's rows of all samples take, at four bytes a number."""
        return 4.0 * self.plan.samples * self.plan.positions[0] * len(state[self.consumer.weight])

    def _given(
        self, reading: Reading, index: Tensor | None, values: Mapping[str, Tensor], original: Mapping[str, Tensor]
    ) -> Tensor:
        """What the original's channels give (C, n), or what the ReLU sees (n, C)."""
        if self.rectifier is not None:
            return self.rectifier.path.rows(values[self.rectifier.source], index, linear=False)
        given = values.get(self.consumer.node) if gives_rows(self.consumer) else None
        if given is not None and given.dtype in (torch.float32, torch.float64):
            return given_rows(self.consumer, given, index, original, WHOLE).T.contiguous()
        return _filtered(_windows(reading, values[self.consumer.input], index), self.consumer, original)

    def skip(self, size: int, program: Program) -> None:
        """Never asked: every process adds all batches."""

    def moments(self) -> FilterMoments:
        """What was added. Raises NonFiniteError: an activation was NaN or Inf. MomentsError: nothing was added."""
        if self.fault is not None:
            raise self.fault
        if self._sums is None:
            raise MomentsError("no sample came, so there are no moments.")
        means = self._sums / max(self._count, 1)
        return FilterMoments(means[:, :-1, :-1], means[:, :-1, -1], means[:, -1, -1])


def products_of(windows: Tensor, further: Tensor) -> Tensor:
    """Products (C, T + m, T + m), float64, of windows (C, n, T) and further columns (C, n, m)."""
    right = windows.mT @ further
    upper = torch.cat([windows.mT @ windows, right], 2)
    lower = torch.cat([right.mT, further.mT @ further], 2)
    return torch.cat([upper, lower], 1).double()


def _windows(reading: Reading, inputs: Tensor, index: Tensor | None) -> Tensor:
    """Patches (C, n, T) in the input's precision, in float32 at least."""
    windows = channel_windows(reading, reading.sites[0], inputs, index)
    return windows.to(torch.promote_types(windows.dtype, torch.float32))


def _filtered(windows: Tensor, consumer: Consumer, state: Mapping[str, Tensor]) -> Tensor:
    """Each channel's output (C, n) of windows (C, n, T)."""
    return (windows @ filters_of(consumer, state)[:, :, None].to(windows))[:, :, 0]


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
    change = torch.linalg.solve(weighted, fitting.cross)
    gains = held_back.errors(change) < held_back.energy
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

"""record_moments(): streams calibration batches into the moments of every consumer of a group of units.

Consumers that read the same features through the same window form one *reading*: Φ is recorded once for them and their
outputs stand side by side along D. A conv consumer's rows are the patches under a seeded sample of output positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compress.convex import FactorAccumulator, FactoredMoments, MomentAccumulator, Moments
from compress.errors import NonFiniteError
from compress.network.execution import ActivationStore, Program, run_pair
from compress.network.units import Consumer, UnitGroup

ROWS_PER_COLUMN = 8  # rows of Φ wanted for each of its K·s columns, so that a refit does not fit noise
FEWEST_ROWS = 20_000
COST_SHARE = 0.02  # of a forward pass, what one layer's moments may cost before positions are sampled


@dataclass(frozen=True, eq=False)
class Reading:
    """Consumers of one group that see the same Φ (N, K·s).

    Attributes:
        consumers: at least one; equal input node, positions and window.
        kernel: spatial extent of the window, () for a linear consumer.
    """

    consumers: tuple[Consumer, ...]
    kernel: tuple[int, ...]

    @property
    def first(self) -> Consumer:
        """Any of the consumers, for what they have in common."""
        return self.consumers[0]

    @property
    def group_size(self) -> int:
        """s: columns of Φ per unit."""
        return self.first.positions.shape[1] * math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """K·s."""
        return self.first.positions.shape[0] * self.group_size

    def weights(self, state: Mapping[str, Tensor]) -> Tensor:
        """Output weights V (K·s, D) of all consumers side by side, in float64."""
        return torch.cat([consumer_matrix(consumer, state[consumer.weight]) for consumer in self.consumers], 1)


@dataclass(frozen=True)
class SamplePlan:
    """How much of the calibration data one group's moments see.

    Attributes:
        samples: the first so many samples of the shuffled calibration set.
        positions: output positions drawn per sample, for each reading; 0 for a linear one (all rows are taken).
    """

    samples: int
    positions: tuple[int, ...]

    def describe(self) -> str:
        """What is taken, in words."""
        drawn = sorted({count for count in self.positions if count})
        if not drawn:
            return f"all rows of {self.samples} samples"
        return f"{'/'.join(str(count) for count in drawn)} positions of each of {self.samples} samples"


def find_readings(group: UnitGroup, state: Mapping[str, Tensor]) -> tuple[Reading, ...]:
    """Readings of a group, in the order of its consumers."""
    found: dict[tuple[object, ...], list[Consumer]] = {}
    for consumer in group.consumers:
        kernel = tuple(state[consumer.weight].shape[2:]) if consumer.kind == "conv" else ()
        window = (consumer.stride, consumer.padding, consumer.dilation) if consumer.kind == "conv" else ()
        key: tuple[object, ...] = (
            consumer.input,
            kernel,
            window,
            consumer.groups,
            tuple(consumer.positions.flatten().tolist()),
        )
        if consumer.groups > 1:
            key = (*key, consumer.node)
        found.setdefault(key, []).append(consumer)
    return tuple(Reading(tuple(consumers), key[1]) for key, consumers in found.items())  # type: ignore[arg-type]


def consumer_matrix(consumer: Consumer, weight: Tensor) -> Tensor:
    """Rows of the consumer's weight that read the group's units: V (K·s, D), unit-major, in float64."""
    dense = dense_weight(weight, consumer)
    units, width = consumer.positions.shape
    picked = dense[:, consumer.positions.flatten().to(weight.device)]  # (D, K·m, taps…)
    return picked.reshape(dense.shape[0], units * width * consumer.taps).T.to(torch.float64)


def dense_weight(weight: Tensor, consumer: Consumer) -> Tensor:
    """Weight (D, inputs, taps…) of the consumer with the zero blocks of a grouped conv written out."""
    if consumer.kind == "linear_transposed":
        return weight.T
    if consumer.groups == 1:
        return weight
    outputs, inputs = weight.shape[0], weight.shape[1] * consumer.groups
    dense = weight.new_zeros(outputs, inputs, *weight.shape[2:])
    step_out, step_in = outputs // consumer.groups, weight.shape[1]
    for block in range(consumer.groups):
        rows = slice(block * step_out, (block + 1) * step_out)
        dense[rows, block * step_in : (block + 1) * step_in] = weight[rows]
    return dense


def with_consumer_matrix(consumer: Consumer, weight: Tensor, coefficients: Tensor) -> Tensor:
    """The consumer's weight with V (K·s, D) put where `consumer_matrix` took it from, in the weight's dtype."""
    dense = dense_weight(weight, consumer).clone()
    units, width = consumer.positions.shape
    block = coefficients.T.reshape(dense.shape[0], units * width, *dense.shape[2:])
    dense[:, consumer.positions.flatten().to(weight.device)] = block.to(weight)
    if consumer.kind == "linear_transposed":
        return dense.T.contiguous()
    if consumer.groups == 1:
        return dense
    step_out, step_in = weight.shape[0] // consumer.groups, weight.shape[1]
    blocks = [
        dense[block * step_out : (block + 1) * step_out, block * step_in : (block + 1) * step_in]
        for block in range(consumer.groups)
    ]
    return torch.cat(blocks)


def plan_samples(readings: Sequence[Reading], positions: Sequence[int], samples: int, forward_macs: int) -> SamplePlan:
    """How many samples, and positions per sample, a group's moments take.

    Every linear row is taken. A conv reading takes as many positions as cost at most `COST_SHARE` of a forward pass,
    but at least those that give `ROWS_PER_COLUMN`·K·s rows; and no more samples than that many rows need.

    Args:
        positions: output positions that each reading has per sample (1 for linear).
        samples: calibration samples there are.
        forward_macs: multiply-accumulates of the whole network for one sample.
    """
    needed = 1
    drawn: list[int] = []
    for reading, available in zip(readings, positions, strict=True):
        if not reading.kernel:
            needed = samples
            drawn.append(0)
            continue
        rows = max(ROWS_PER_COLUMN * reading.columns, FEWEST_ROWS)
        affordable = int(COST_SHARE * forward_macs / reading.columns**2)
        count = min(available, max(1, affordable, math.ceil(rows / samples)))
        needed = max(needed, min(samples, math.ceil(rows / count)))
        drawn.append(count)
    return SamplePlan(needed, tuple(drawn))


SQUARE_COPIES = 6  # matrices of the size of one square moment matrix that recording and solving hold at once


def make_accumulator(reading: Reading, memory: int, seed: int) -> MomentAccumulator | FactorAccumulator:
    """Square moments where they fit `memory` with everything made from them, else a thin factor of as many rows."""
    columns = reading.columns
    if SQUARE_COPIES * 8 * columns**2 <= memory:
        return MomentAccumulator(reading.group_size)
    rows = max(256, memory // 3 // (8 * columns))
    side = math.isqrt(memory // (2 * SQUARE_COPIES * 8))  # columns whose square matrices fit half of the memory
    units = max(1, side // reading.group_size)
    return FactorAccumulator(reading.group_size, rows=rows, seed=seed, memory_units=units)


class GroupRecorder:
    """Accumulates one group's moments over batches; float64, streamed.

    Args:
        memory: bytes that the moments of one reading may take; a square matrix that needs more becomes a factor.
        targets: record Ψ from the original network; else Ψ = ΦV follows from the moments of Φ.
    """

    def __init__(
        self,
        group: UnitGroup,
        readings: Sequence[Reading],
        plan: SamplePlan,
        *,
        seed: int,
        memory: int,
        targets: bool = False,
    ) -> None:
        self.group = group
        self.readings = tuple(readings)
        self.plan = plan
        self.targets = targets
        self.rows = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._sums = [make_accumulator(reading, memory // len(self.readings), seed) for reading in self.readings]

    def add(
        self,
        values: Mapping[str, tuple[Tensor, Tensor]],
        original: Mapping[str, Tensor],
        current: Mapping[str, Tensor],
        weights: Tensor | None = None,
    ) -> None:
        """Add one batch. `values` holds the readings' input nodes in the original and the current network.

        Raises:
            NonFiniteError: an activation is NaN or Inf.
        """
        for reading, count, sums in zip(self.readings, self.plan.positions, self._sums, strict=True):
            first, second = values[reading.first.input]
            index = sample_positions(reading, first, count, self._generator)
            patches = read_rows(reading, second, index)  # (n, I·taps), all input channels of the current network
            features = own_columns(reading, patches)  # (n, K·s)
            if not bool(torch.isfinite(features.sum())):
                raise NonFiniteError(
                    f"NaN or Inf in the activations that `{self.group.name}` hands on; "
                    "check the weights up to there and the preprocessing."
                )
            if self.targets or isinstance(sums, FactorAccumulator):
                source = patches if second is first else read_rows(reading, first, index)
                outputs = self._targets(reading, source, patches, features, original, current)
            else:
                outputs = features.new_zeros(features.shape[0], 0)
            repeated = None if weights is None else weights.repeat_interleave(features.shape[0] // weights.shape[0])
            if isinstance(sums, FactorAccumulator):
                sums.add(features, outputs)
            else:
                sums.add(features, outputs, repeated)
            self.rows = max(self.rows, int(sums.count))

    def moments(self, original: Mapping[str, Tensor]) -> tuple[Moments | FactoredMoments, ...]:
        """One Moments per reading; without recorded targets Ψ is ΦV for the original weights, exactly."""
        found = []
        for sums, reading in zip(self._sums, self.readings, strict=True):
            part = sums.moments()
            if isinstance(part, Moments) and not self.targets:
                part = part.with_outputs(reading.weights(original))
            found.append(part)
        return tuple(found)

    def _targets(
        self,
        reading: Reading,
        source: Tensor,
        patches: Tensor,
        features: Tensor,
        original: Mapping[str, Tensor],
        current: Mapping[str, Tensor],
    ) -> Tensor:
        """What the group's units must give (n, D): the original output less what the other channels give now."""
        blocks = []
        for consumer in reading.consumers:
            before = all_rows(consumer, original[consumer.weight])  # (I·taps, D)
            wanted = source.double() @ before
            if features.shape[1] < patches.shape[1]:
                now = all_rows(consumer, current[consumer.weight])
                others = patches.double() @ now - features.double() @ consumer_matrix(
                    consumer, current[consumer.weight]
                )
                wanted -= others
            blocks.append(wanted)
        return torch.cat(blocks, 1)


def all_rows(consumer: Consumer, weight: Tensor) -> Tensor:
    """The consumer's whole weight as a matrix (I·taps, D) in float64."""
    dense = dense_weight(weight, consumer)
    return dense.reshape(dense.shape[0], -1).T.to(torch.float64)


def output_positions(reading: Reading, program: Program) -> int:
    """Output positions of a reading per sample, from the traced shapes; 1 for a linear one."""
    if not reading.kernel:
        return 1
    shape = program.shape(reading.first.input)
    return math.prod(output_extent(reading, shape))


def output_extent(reading: Reading, shape: Sequence[int]) -> tuple[int, ...]:
    """Output positions per spatial dimension of a conv reading whose input has `shape` (B, C, …)."""
    consumer = reading.first
    return tuple(
        (size + 2 * pad - step * (width - 1) - 1) // stride + 1
        for size, pad, step, width, stride in zip(
            shape[2:], consumer.padding, consumer.dilation, reading.kernel, consumer.stride, strict=True
        )
    )


def sample_positions(reading: Reading, inputs: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """Output positions (B, P) to read, drawn without replacement for each sample; None where every one is read."""
    if not reading.kernel:
        return None
    available = math.prod(output_extent(reading, inputs.shape))
    if count >= available:
        return None
    draws = torch.rand(inputs.shape[0], available, generator=generator)
    return draws.topk(count, dim=1).indices.to(inputs.device)


def read_rows(reading: Reading, inputs: Tensor, index: Tensor | None) -> Tensor:
    """Rows (n, I·taps) that the consumers multiply, channel-major, from their input activations.

    Args:
        inputs: (…, I) for a linear reading, (B, I, …) for a conv one.
        index: output positions (B, P) in row-major order; None for all.
    """
    if not reading.kernel:
        return inputs.reshape(-1, inputs.shape[-1])
    consumer = reading.first
    extent = output_extent(reading, inputs.shape)
    pads = [pad for size in reversed(consumer.padding) for pad in (size, size)]
    padded = functional.pad(inputs, pads) if any(pads) else inputs.contiguous()
    batch, channels = padded.shape[:2]
    strides = padded.stride()
    windows = padded.as_strided(
        (batch, *extent, channels, *reading.kernel),
        (
            strides[0],
            *(step * size for step, size in zip(consumer.stride, strides[2:], strict=True)),
            strides[1],
            *(step * size for step, size in zip(consumer.dilation, strides[2:], strict=True)),
        ),
    )
    columns = channels * math.prod(reading.kernel)
    if index is None:
        return windows.reshape(-1, columns)
    places = torch.unravel_index(index, extent)
    rows = torch.arange(batch, device=inputs.device)[:, None]
    return windows[(rows, *places)].reshape(-1, columns)


def own_columns(reading: Reading, rows: Tensor) -> Tensor:
    """The columns (n, K·s) of the group's own units, unit-major, out of all input channels' (n, I·taps)."""
    positions = reading.first.positions.flatten()
    taps = math.prod(reading.kernel)
    if positions.numel() * taps == rows.shape[1] and torch.equal(positions.cpu(), torch.arange(positions.numel())):
        return rows
    blocks = rows.reshape(rows.shape[0], -1, taps)
    return blocks.index_select(1, positions.to(rows.device)).reshape(rows.shape[0], -1)


def record_moments(
    program: Program,
    recorders: Sequence[GroupRecorder],
    read: Callable[[int], Sequence[Tensor]],
    sizes: Sequence[int],
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor] | None = None,
    *,
    store: ActivationStore | None = None,
    keep: ActivationStore | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """One pass over the batches for all `recorders`, in one or two networks at once.

    Returns:
        Wall seconds: "forward" of reading data and running the networks, "recording" of everything else.

    Args:
        read: batch number -> inputs; not called for a batch that can start from `store`.
        sizes: samples in each batch; a batch reaches only those recorders whose plan is not yet full.
        original, current: states of the two networks; None: one network.
        store: values from which a batch can start; used up as it is read.
        keep: where to leave the values from which the next pass can start.
        advance: told the samples of each finished batch.
    """
    other = original if current is None else current
    changed = program.downstream(name for name, tensor in original.items() if other[name] is not tensor)
    device = next(iter(original.values())).device
    seen = 0
    forward, started = 0.0, time.perf_counter()
    with torch.inference_mode():
        for number, size in enumerate(sizes):
            open_recorders = [recorder for recorder in recorders if recorder.plan.samples > seen]
            if not open_recorders:
                break
            wanted = {reading.first.input for recorder in open_recorders for reading in recorder.readings}
            further = keep.nodes if keep is not None else ()
            start = store.get(number, device) if store is not None else None
            names = list(dict.fromkeys([*sorted(wanted), *further]))
            running = time.perf_counter()
            inputs = [] if start is not None else [tensor.to(device) for tensor in read(number)]
            values = run_pair(program, original, other, inputs, names, changed=changed, start=start)
            forward += time.perf_counter() - running
            for recorder in open_recorders:
                recorder.add(values, original, other)
            if keep is not None:
                keep.put(number, values)
            if store is not None:
                store.drop(number)
            seen += size
            if advance is not None:
                advance(size)
    return {"forward": forward, "recording": time.perf_counter() - started - forward}

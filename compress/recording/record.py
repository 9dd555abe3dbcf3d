"""record_moments(): streams calibration batches into the moments of every consumer of a group of units.

Each reading has moments of its own. A conv consumer's rows are the patches under a seeded sample of output positions.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from compress.convex import FactorAccumulator, FactoredMoments, MomentAccumulator, Moments
from compress.errors import NonFiniteError
from compress.graph.ops import Layout
from compress.graph.program import Program, iterate
from compress.graph.steps import Override
from compress.recording.layer_moments import ROWS_PER_COLUMN
from compress.recording.pieces import Piece, cut_batch
from compress.recording.positions import rows_at
from compress.recording.readings import Reading, constant_of, own_columns, read_rows, sample_positions
from compress.recording.residuals import Rectifier, Residual
from compress.recording.sharing import Share
from compress.recording.store import ActivationStore
from compress.units.groups import Consumer, ReadUnits

FEWEST_ROWS = 20_000
FEWEST_SAMPLES = 1024  # over which rows are spread where there are so many: rows of one sample are much alike
RECORDING_PASSES = 4.0  # over all samples, beyond which more rows than columns are not read
RECORDING_LEAST = 1e11  # multiplications, some seconds, that one reading may take in any case
COST_SHARE = 0.02  # of a forward pass, what one layer's moments may cost before positions are sampled


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


def plan_samples(
    readings: Sequence[Reading], positions: Sequence[int], samples: int, forward_macs: int, share: float = 1.0
) -> SamplePlan:
    """How many samples, and positions per sample, a group's moments take.

    Every linear row is taken. A conv reading takes as many positions as cost at most `COST_SHARE` of a forward pass,
    but at least those that give `ROWS_PER_COLUMN`·K·s rows (fewer, down to K·s, where their products would take longer
    than `RECORDING_PASSES` over the samples); no more samples than `FEWEST_SAMPLES` and that many rows
    need, and of those no more positions: more of the same samples say little.

    Args:
        positions: output positions that each reading has per sample (1 for linear).
        samples: calibration samples there are.
        forward_macs: multiply-accumulates of the whole network for one sample.
        share: of `FEWEST_ROWS`.
    """
    needed = 1
    drawn: list[int] = []
    for reading, available in zip(readings, positions, strict=True):
        if not reading.kernel:
            needed = samples
            drawn.append(0)
            continue
        bounded = int(max(RECORDING_LEAST, RECORDING_PASSES * forward_macs * samples) / reading.columns**2)
        fewest = max(ROWS_PER_COLUMN * reading.columns, round(share * FEWEST_ROWS))
        rows = min(fewest, max(reading.columns, bounded))
        affordable = int(COST_SHARE * forward_macs / reading.columns**2)
        count = min(available, max(1, affordable, math.ceil(rows / samples)))
        spread = min(samples, max(FEWEST_SAMPLES, math.ceil(rows / count)))
        needed = max(needed, spread)
        drawn.append(min(count, math.ceil(rows / spread)))
    return SamplePlan(needed, tuple(drawn))


SQUARE_COPIES = 8  # matrices of the size of one square moment matrix that recording and solving hold at once


def make_accumulators(
    readings: Sequence[Reading], memory: int, seed: int, *, single: bool = False, output_gram: bool = False
) -> list[MomentAccumulator | FactorAccumulator]:
    """Square moments where all readings' columns side by side fit `memory`, else thin factors of as many rows."""
    columns = sum(reading.columns for reading in readings)
    if SQUARE_COPIES * 8 * columns**2 <= memory:
        return [MomentAccumulator(reading.group_size, output_gram, single=single) for reading in readings]
    rows = max(256, memory // 3 // (8 * columns))
    side = math.isqrt(memory // (2 * SQUARE_COPIES * 8))  # columns whose square matrices fit half of the memory
    units = max(1, side // sum(reading.group_size for reading in readings))
    return [FactorAccumulator(reading.group_size, rows=rows, seed=seed, memory_units=units) for reading in readings]


class GroupRecorder:
    """Accumulates one group's moments over batches; float64, streamed.

    Args:
        memory: bytes that the moments of all readings may take; square matrices that need more become factors.
        targets: record Ψ from the original network; else Ψ = ΦV follows from the moments of Φ.
        residuals: consumer's node -> the addition behind it, whose error so far the targets take back.
        rectifiers: consumer's node -> the ReLU behind it. The targets then are what the units give now, moved so that
            the rectified values become the original's; in a network that is cut and refitted already.
        share: which batches this process adds; the processes' sums are added up. Factors are not shared out: there
            every process adds all batches.
        units: unit numbers (m,), sorted, whose features alone are recorded; the outputs are still those of all units.
            None: all.
        kept: what the original network gave at these rows or more, where it does not run.
        single: moments are for a refit alone: products of each batch in single precision, where the features are.
    """

    def __init__(
        self,
        group: ReadUnits,
        readings: Sequence[Reading],
        plan: SamplePlan,
        *,
        seed: int,
        memory: int,
        targets: bool = False,
        residuals: Mapping[str, Residual] | None = None,
        rectifiers: Mapping[str, Rectifier] | None = None,
        share: Share | None = None,
        units: Tensor | None = None,
        kept: OriginalRows | None = None,
        single: bool = False,
    ) -> None:
        self.group = group
        self.whole = tuple(readings)
        self.readings = restrict_readings(readings, units)
        self.units = units
        self.plan = plan
        targets = targets or units is not None  # the outputs of units that are not recorded follow from no moments
        self.targets = targets
        self.residuals = dict(residuals or {}) if targets else {}
        self.rectifiers = dict(rectifiers or {}) if targets else {}
        self.rows = 0
        self.fault: NonFiniteError | None = None
        self._generator = torch.Generator().manual_seed(seed)
        ranked = targets and not single
        self._sums = make_accumulators(self.readings, memory, seed, single=single, output_gram=ranked)
        self._kept = kept
        self._added = 0  # batches
        self._moments: tuple[Moments | FactoredMoments, ...] | None = None
        dense = all(isinstance(sums, MomentAccumulator) for sums in self._sums)
        self.share = share if share is not None and dense else Share()

    @property
    def wanted(self) -> set[str]:
        """Names of the nodes whose values `add` reads."""
        inputs = {name for reading in self.readings for name in reading.inputs}
        behind = {rectifier.source for rectifier in self.rectifiers.values()}
        return inputs | behind | {residual.other for residual in self.residuals.values()}

    @property
    def wanted_originals(self) -> set[str]:
        """Names of the nodes whose values `original_rows` reads."""
        consumers = [consumer for reading in self.readings for applied in reading.places for consumer in applied]
        plain = [each for each in consumers if each.node not in self.rectifiers and gives_rows(each)]
        return self.wanted | {consumer.node for consumer in plain}

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
        kept = None if self._kept is None else iter(self._kept.read(self._added))
        self._added += 1
        values = {name: values[name] for name in self.wanted}
        parts = zip(self.readings, self.whole, self.plan.positions, self._sums, strict=True)
        for number, (reading, whole, count, sums) in enumerate(parts):
            for place, site in enumerate(reading.sites):
                second = values[site.input][1]
                index = sample_positions(reading, site, second, count, self._generator)
                rows = None if kept is None else next(kept)
                if rows is not None and self._kept is not None:
                    rows = first_rows(rows, len(second), self._kept.plan.positions[number], count)
                for piece in cut_batch(reading, site, values, index, rows):
                    self._add_piece(reading, whole, place, sums, piece, original, current)
            self.rows = max(self.rows, int(sums.count))

    def _add_piece(
        self,
        reading: Reading,
        whole: Reading,
        place: int,
        sums: MomentAccumulator | FactorAccumulator,
        piece: Piece,
        original: Mapping[str, Tensor],
        current: Mapping[str, Tensor],
    ) -> None:
        """Add a reading's rows of some of a batch's samples at one place."""
        values, index, rows = piece.values, piece.index, piece.rows
        site = reading.sites[place]
        features = read_rows(reading, site, values[site.input][1], index, own=True)  # (n, K·s)
        if not bool(torch.isfinite(features.sum())):
            raise NonFiniteError(
                f"NaN or Inf in the activations that `{self.group.name}` hands on; "
                "check the weights up to there and the preprocessing."
            )
        if self.targets or isinstance(sums, FactorAccumulator):
            if rows is None:
                rows = self._given(reading, whole, place, index, piece.originals, original)
            outputs = self._outputs(reading, whole, place, _Seen(values, index, rows, original, current, features))
        else:
            outputs = features.new_zeros(features.shape[0], 0)
        sums.add(features, outputs)

    def original_rows(self, values: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Of one batch, for each reading and place, what `add` reads of the original network's `values`."""
        rows = []
        pairs = {name: (value, value) for name, value in values.items()}
        for reading, whole, count in zip(self.readings, self.whole, self.plan.positions, strict=True):
            for place, site in enumerate(reading.sites):
                index = sample_positions(reading, site, values[site.input], count, self._generator)
                parts = [
                    self._given(reading, whole, place, piece.index, piece.originals, original)
                    for piece in cut_batch(reading, site, pairs, index)
                ]
                rows.append(parts[0] if len(parts) == 1 else [torch.cat(blocks) for blocks in zip(*parts, strict=True)])
        return rows

    def bytes_of_rows(self, program: Program, state: Mapping[str, Tensor]) -> float:
        """What the original network's rows of all samples take, from the traced shapes and at four bytes a number."""
        traced, total = program.network.examples[0].shape[0], 0.0
        for reading, count in zip(self.readings, self.plan.positions, strict=True):
            for place, site in enumerate(reading.sites):
                rows = count or math.prod(program.shape(site.input)[:-1]) / traced
                for applied in reading.places:
                    part = reading.outputs(applied[place], state)
                    kinds = 2 if applied[place].node in self.residuals else 1
                    total += 4 * kinds * self.plan.samples * rows * (part.stop - part.start)
        return total

    def skip(self, size: int, program: Program) -> None:
        """Leave a batch of `size` samples to another process; the positions drawn for the next one stay the same."""
        traced = program.network.examples[0].shape[0]
        for reading, count in zip(self.readings, self.plan.positions, strict=True):
            for site in reading.sites:
                shape = program.shape(site.input)
                inputs = torch.empty(shape[0] * size // traced, *shape[1:], device="meta")
                sample_positions(reading, site, inputs, count, self._generator)

    def moments(self, original: Mapping[str, Tensor]) -> tuple[Moments | FactoredMoments, ...]:
        """One Moments per reading; without recorded targets Ψ is ΦV for the original weights, exactly.

        The recorder is finished then: its sums are let go of.

        Raises:
            NonFiniteError: an activation was NaN or Inf, here or in another process.
            MomentsError: nothing was added.
        """
        if self.share.any(self.fault is not None):
            raise self.fault or NonFiniteError(f"NaN or Inf in the activations that `{self.group.name}` hands on.")
        if self._moments is None:
            self._moments = tuple(self._finished(reading, original) for reading in self.readings)
        return self._moments

    def _finished(self, reading: Reading, original: Mapping[str, Tensor]) -> Moments | FactoredMoments:
        sums = self._sums.pop(0)
        if self.share.count > 1 and isinstance(sums, MomentAccumulator):
            sums.all_reduce(next(iter(original.values())).device)
            self.rows = max(self.rows, int(sums.count))
        part = sums.moments()
        del sums
        if isinstance(part, Moments) and not self.targets:
            return part.with_outputs(reading.weights(original))
        return part

    def _given(
        self,
        reading: Reading,
        whole: Reading,
        place: int,
        index: Tensor | None,
        values: Mapping[str, Tensor],
        original: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Rows of the original: for each consumer what it gives and the shortcut beside it, or what a ReLU sees."""
        rows: list[Tensor] = []
        source: Tensor | None = None  # rows of all input channels (n, I·taps)
        linear = not reading.kernel
        for applied in reading.places:
            consumer = applied[place]
            part = reading.outputs(consumer, original)
            rectifier = self.rectifiers.get(consumer.node)
            if rectifier is not None:
                rows.append(rectifier.path.rows(values[rectifier.source], index, linear=linear, part=part))
                continue
            given = values.get(consumer.node) if gives_rows(consumer) else None
            if given is not None and given.dtype in (torch.float32, torch.float64):
                rows.append(given_rows(consumer, given, index, original, part))
            else:
                if source is None:
                    source = read_rows(reading, reading.sites[place], values[reading.sites[place].input], index)
                rows.append(_product(source, whole.whole_matrix(consumer, original[consumer.weight])))
            residual = self.residuals.get(consumer.node)
            if residual is not None:
                rows.append(residual.rows(values[residual.other], index, linear=linear, part=part))
        return rows

    def _outputs(self, reading: Reading, whole: Reading, place: int, seen: _Seen) -> Tensor:
        """Targets (n, D) of all the reading's consumers side by side, in the precision the network computes in."""
        blocks: list[Tensor] = []
        patches: Tensor | None = None
        given = iter(seen.given)
        linear = not reading.kernel
        for applied in reading.places:
            consumer = applied[place]
            wanted = next(given).to(seen.features.device)
            rectifier = self.rectifiers.get(consumer.node)
            if rectifier is not None:
                blocks.append(_rectified(reading, consumer, rectifier, wanted, seen))
                continue
            site = reading.sites[place]
            if whole.columns < whole.whole_columns(
                consumer, seen.current
            ):  # others' outputs are not the units' to give
                if patches is None:
                    patches = read_rows(reading, site, seen.values[site.input][1], seen.index)
                now = seen.current[consumer.weight]
                wanted = wanted - _product(patches, whole.whole_matrix(consumer, now))
                wanted += _product(own_columns(whole, patches), whole.matrix(consumer, now))
            residual = self.residuals.get(consumer.node)
            if residual is not None:
                part, shortcut = reading.outputs(consumer, seen.current), next(given).to(wanted.device)
                second = seen.values[residual.other][1]
                missing = residual.correction(shortcut, second, seen.current, seen.index, linear=linear, part=part)
                wanted = wanted.double() + missing
            blocks.append(wanted)
        return torch.cat(blocks, 1)


def gives_rows(consumer: Consumer) -> bool:
    """Whether the consumer's node has a row of what it gives for each position, and on it its bias alone."""
    return consumer.layout is not Layout.CONVOLUTION_TRANSPOSED and not consumer.shifted


def given_rows(
    consumer: Consumer, value: Tensor, index: Tensor | None, state: Mapping[str, Tensor], part: slice
) -> Tensor:
    """What the consumer gives (n, d) at positions `index` (None: all), less its bias, from its node's value.

    Args:
        part: which d of the D outputs.
    """
    rows = rows_at(value, index) if consumer.layout.spatial else value.reshape(-1, value.shape[-1])
    if consumer.bias is not None:
        rows = rows - state[consumer.bias].to(rows)
    return rows[:, part]


def first_rows(rows: Sequence[Tensor], samples: int, kept: int, count: int) -> list[Tensor]:
    """Of rows (samples·kept, …) those of each sample's first `count` positions; all where every position is read."""
    if count == kept:
        return list(rows)
    return [each.reshape(samples, -1, each.shape[-1])[:, :count].reshape(-1, each.shape[-1]) for each in rows]


class OriginalRows(Protocol):
    """What the original network gave at rows of a plan."""

    plan: SamplePlan

    def read(self, batch: int) -> list[list[Tensor]]:
        """Rows of a batch: for each reading and place."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """One batch at one place of a reading.

    Attributes:
        values: of the recorder's nodes, in the original and the current network.
        index: output positions that are read; None: all.
        given: rows of the original network.
        features: Φ (n, K·s), from the current one.
    """

    values: Mapping[str, tuple[Tensor, Tensor]]
    index: Tensor | None
    given: Sequence[Tensor]
    original: Mapping[str, Tensor]
    current: Mapping[str, Tensor]
    features: Tensor


def _rectified(reading: Reading, consumer: Consumer, rectifier: Rectifier, wanted: Tensor, seen: _Seen) -> Tensor:
    """Targets (n, D) of one consumer in front of a ReLU: what changes least of what the units give now."""
    part = reading.outputs(consumer, seen.current)
    second = seen.values[rectifier.source][1]
    change = rectifier.correction(wanted, second, seen.current, seen.index, linear=not reading.kernel, part=part)
    now = _product(seen.features, reading.matrix(consumer, seen.current[consumer.weight])).double()
    if reading.takes_constant:
        name, sign = constant_of(consumer)
        now += sign * (seen.current[name][part].double() - seen.original[name][part].double())
    return now + change


def _product(rows: Tensor, weights: Tensor) -> Tensor:
    """rows · weights in the rows' own precision, in float32 at least: as exact as the network's own outputs are."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(dtype) @ weights.to(dtype)


def restrict_readings(readings: Sequence[Reading], units: Tensor | None) -> tuple[Reading, ...]:
    """The readings of the given units (m,) alone; None: of all."""
    if units is None:
        return tuple(readings)
    return tuple(replace(reading, positions=reading.positions[units]) for reading in readings)


class Recorder(Protocol):
    """Adds what it wants of each batch.

    Attributes:
        fault: what kept it from adding a batch, told to who asks for its moments; the other recorders go on.
    """

    plan: SamplePlan
    share: Share
    fault: NonFiniteError | None

    @property
    def wanted(self) -> set[str]:
        """Names of the nodes whose values `add` reads."""

    def add(
        self,
        values: Mapping[str, tuple[Tensor, Tensor]],
        original: Mapping[str, Tensor],
        current: Mapping[str, Tensor],
    ) -> None:
        """Add one batch: the `wanted` nodes' values in the original and the current network."""

    def skip(self, size: int, program: Program) -> None:
        """Leave a batch to another process."""


class _Arrivals:
    """Values of one batch that some recorder has still to read, or that are kept for the next pass."""

    def __init__(self, recorders: Sequence[Recorder], kept: Sequence[str]) -> None:
        self.values: dict[str, tuple[Tensor, Tensor]] = {}
        self._missing = {recorder: set(recorder.wanted) for recorder in recorders}
        self._readers = Counter(name for wanted in self._missing.values() for name in wanted)
        self._readers.update(kept)

    def take(self, name: str, pair: tuple[Tensor, Tensor]) -> list[Recorder]:
        """Hold a value; the recorders that now have all they read."""
        self.values[name] = pair
        ready = []
        for recorder, missing in self._missing.items():
            if name in missing:
                missing.remove(name)
                if not missing:
                    ready.append(recorder)
        return ready

    def release(self, recorder: Recorder) -> None:
        """Let go of what no other recorder reads."""
        for name in recorder.wanted:
            self._readers[name] -= 1
            if not self._readers[name]:
                del self.values[name]


def record_moments(
    program: Program,
    recorders: Sequence[Recorder],
    read: Callable[[int], Sequence[Tensor]],
    sizes: Sequence[int],
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor] | None = None,
    *,
    store: ActivationStore | None = None,
    keep: ActivationStore | None = None,
    advance: Callable[[int], None] | None = None,
    alone: bool = False,
    override: Mapping[str, Override] | None = None,
) -> dict[str, float]:
    """One pass over the batches for all `recorders`, in one or two networks at once.

    Returns:
        Wall seconds: "forward" of reading data and running the networks, "recording" of everything else.

    Args:
        read: batch number -> inputs; not called for a batch that can start from `store`.
        sizes: samples in each batch; a batch reaches only those recorders whose plan is not yet full.
        original, current: states of the two networks; None: one network.
        store: values from which a batch can start; used up as it is read.
        keep: where to leave the values from which the next pass can start. What was not read, or found no room, is
            left there at the frontier of `store`. `store` itself: the next pass starts where this one does.
        advance: told the samples of each finished batch.
        alone: only the current network runs, and its values stand for both: all recorders know what the original gave.
        override: steps that the current network computes otherwise.
    """
    other = original if current is None else current
    states = (other,) if alone else (original, other)
    device = next(iter(original.values())).device
    seen = 0
    forward, started = 0.0, time.perf_counter()
    with torch.inference_mode():
        for number, size in enumerate(sizes):
            open_recorders = [recorder for recorder in recorders if recorder.plan.samples > seen]
            if not open_recorders:
                break
            for recorder in open_recorders:
                if not recorder.share.owns(number):
                    recorder.skip(size, program)
            open_recorders = [recorder for recorder in open_recorders if recorder.share.owns(number)]
            seen += size
            if not open_recorders:
                continue
            start = store.get(number, device) if store is not None else None
            running = time.perf_counter()
            further = keep.nodes if keep is not None and keep is not store else ()
            wanted = dict.fromkeys([*sorted(set().union(*(each.wanted for each in open_recorders))), *further])
            starts = () if start is None else start  # a shortcut from the very input needs that too
            inputs = [each.to(device) for each in read(number)] if program.reads_input(wanted, starts) else []
            if start is not None:
                start = {name: pair[-len(states) :] for name, pair in start.items()}
            arriving = iterate(program, states, inputs, wanted, start=start, override=override, fast=True)
            del start, starts, inputs
            left = _Arrivals(open_recorders, further)
            for name, pair in arriving:
                ready = left.take(name, (pair[0], pair[-1]))
                del pair
                forward += time.perf_counter() - running
                for recorder in ready:
                    if recorder.fault is None:
                        try:
                            recorder.add(left.values, original, other)
                        except NonFiniteError as fault:
                            recorder.fault = fault
                    left.release(recorder)
                running = time.perf_counter()
            if keep is not store:
                kept = keep is not None and keep.put(number, left.values)
                if store is not None and (kept or keep is None):
                    store.drop(number)
            del left
            if advance is not None:
                advance(size)
    if keep is not None and store is not None and keep is not store:
        keep.inherit(store)
    return {"forward": forward, "recording": time.perf_counter() - started - forward}

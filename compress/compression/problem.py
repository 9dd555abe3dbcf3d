"""A traced network with its calibration data, ready to be compressed, and what is recorded of it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from compress.compression.faults import LAYER_FAULTS, describe_fault
from compress.compression.layers.decisions import Ingredients
from compress.compression.pricing.latency import Timing
from compress.compression.turns import Turn, make_turns
from compress.data import DataSource
from compress.data.extremes import Extremes, without
from compress.data.related import hold_back
from compress.errors import DataError
from compress.graph.program import Program
from compress.graph.steps import Override
from compress.measures.figures import GATED
from compress.measures.outputs import Output
from compress.progress import Progress
from compress.recording.filters import FilterRecorder, filter_reading
from compress.recording.layer_moments import LayerMoments, make_layer_moments
from compress.recording.originals import KeptRows, OriginalRecorder
from compress.recording.readings import Reading, find_readings, output_positions
from compress.recording.record import (
    FEWEST_SAMPLES,
    GroupRecorder,
    Recorder,
    SamplePlan,
    plan_samples,
    record_moments,
    restrict_readings,
)
from compress.recording.residuals import Rectifier, Residual, find_rectifier, find_residual
from compress.recording.sharing import Share
from compress.units.branches import Branch
from compress.units.forms import Form
from compress.units.groups import Consumer, ReadUnits, UnitGroup
from compress.units.low_rank import Factorables
from compress.units.network import Network
from compress.units.surgery import statistics_over_kept

KeptPair = tuple[KeptRows, KeptRows]  # of the fitting and of the held-back samples

FILTER_NUMBERS = 45_000  # of each channel of a depthwise convolution, taps times rows
FILTER_ROWS_PER_TAP = 40  # at least
FILTER_SAMPLES = 128  # that these rows are spread over, where each has positions enough
FEWEST_HELD_BACK = 2  # one sample has no spread to measure an error against


@dataclass(frozen=True, eq=False)
class SampleStream:
    """The first samples of a data source in a fixed, shuffled order, batch by batch.

    Attributes:
        indices: sample numbers (N,) in reading order.
    """

    source: DataSource
    indices: Tensor
    batch_size: int

    @property
    def count(self) -> int:
        """N."""
        return len(self.indices)

    def read(self, number: int) -> tuple[Tensor, ...]:
        """Inputs of batch `number`."""
        return self.batch(number).tensors  # type: ignore[no-any-return]

    def batch(self, number: int):  # type: ignore[no-untyped-def]
        """Batch `number`, inputs and labels."""
        batch_indices = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        return next(iter(self.source.batches(self.batch_size, batch_indices)))

    def of_samples(self, places: Tensor) -> tuple[Tensor, ...]:
        """Inputs of samples by their places (B,) in reading order."""
        return next(iter(self.source.batches(len(places), self.indices[places]))).tensors

    def of(self, source: DataSource) -> SampleStream:
        """The part of it that is of one source, the first of those that are mixed."""
        return replace(self, source=source, indices=self.indices[self.indices < source.sample_count])

    def sizes(self) -> list[int]:
        """Samples in each batch."""
        return [min(self.batch_size, self.count - first) for first in range(0, self.count, self.batch_size)]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a network sees while it is compressed.

    Attributes:
        fitting, held_back: disjoint samples; the second only checks.
        answered: the output that their labels or targets are answers to; None without either.
        judged: keys of the figures that say whether much was lost.
        related: samples of the two that belong to others of them (crops, frames, windows of the same thing), which are
            on the same side; 0 where there are hardly any or that cannot be told.
        extremes: samples that are in neither, since their numbers outweigh those of all others.
    """

    fitting: SampleStream
    held_back: SampleStream
    answered: Output | None = None
    judged: Sequence[str] = GATED
    related: int = 0
    extremes: Extremes = field(default_factory=Extremes)


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be cut from a network, on which data.

    Attributes:
        groups: the units to cut, front to back.
        forward_macs: multiply-accumulates of one sample through the original network.
        memory: bytes that recording and solving one layer may hold.
        readers: consumers that may be refitted although none of their units goes, once their input has changed.
        filters: depthwise convolutions that may be refitted likewise.
        share: this process's part of the batches to record.
        ingredients: what a sweep makes use of.
        branches: blocks that may go as a whole.
        factorables: layers that two of a low rank may stand for.
        timing: on what latency is measured.
        form: in which the network is written.
        row_share: of the rows that moments take where these need be no more; less where only slight cuts are asked for.
    """

    network: Network
    calibration: Calibration
    groups: tuple[UnitGroup, ...]
    forward_macs: int
    memory: int
    seed: int = 0
    readers: tuple[Consumer, ...] = ()
    filters: tuple[Consumer, ...] = ()
    share: Share = field(default_factory=Share)
    ingredients: Ingredients = field(default_factory=Ingredients)
    branches: tuple[Branch, ...] = ()
    factorables: Factorables = field(default_factory=Factorables)
    timing: Timing = field(default_factory=Timing)
    form: Form = field(default_factory=Form)
    row_share: float = 1.0

    @property
    def program(self) -> Program:
        """The network's operations."""
        return self.network.program

    @property
    def state(self) -> dict[str, Tensor]:
        """The original network's tensors."""
        return self.network.state

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.network.device

    @property
    def fitting(self) -> SampleStream:
        """Samples that layers are fitted to."""
        return self.calibration.fitting

    @property
    def held_back(self) -> SampleStream:
        """Samples that only check."""
        return self.calibration.held_back

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the network returns and weights can change."""
        return tuple(output for output in self.network.outputs if output.node is not None)

    @property
    def output_nodes(self) -> tuple[str, ...]:
        """Nodes of the outputs, each once."""
        return tuple(dict.fromkeys(output.node for output in self.outputs if output.node is not None))

    def turns(self, removed: Sequence[Branch] = (), lowered: Iterable[str] = ()) -> tuple[Turn, ...]:
        """The turns of a sweep, front to back; of the blocks that go only the one that settles their constant.

        Args:
            lowered: weights that are given a low rank.
        """
        again = self.ingredients.readers
        gone = {name for branch in removed for name in branch.groups if name != branch.end}
        nodes = {name for branch in removed for name in branch.nodes}
        readers, filters = (
            tuple(consumer for consumer in consumers if consumer.node not in nodes) if again else ()
            for consumers in (self.readers, self.filters)
        )
        cut = [group for group in self.groups if group.name not in gone]
        low = [each.consumer for each in self.factorables.layers if each.weight in set(lowered)]
        low = [consumer for consumer in low if consumer.node not in nodes]
        return make_turns(self.program, self.state, cut, readers, filters, low)

    def readings(self, group: ReadUnits) -> tuple[Reading, ...]:
        """Which weights multiply the units, and where."""
        return find_readings(group, self.state)

    def residuals(self, group: ReadUnits) -> dict[str, Residual]:
        """Consumer's node -> the addition behind it, where there is one."""
        if not self.ingredients.shortcuts:
            return {}
        residuals = {consumer.node: find_residual(self.program, consumer) for consumer in group.consumers}
        return {node: residual for node, residual in residuals.items() if residual is not None}

    def rectifiers(self, group: ReadUnits) -> dict[str, Rectifier]:
        """Consumer's node -> the ReLU behind it, where there is one."""
        rectifiers = {consumer.node: find_rectifier(self.program, consumer) for consumer in group.consumers}
        return {node: rectifier for node, rectifier in rectifiers.items() if rectifier is not None}

    def renormalised(self, kept: Mapping[str, Tensor]) -> dict[str, Override]:
        """The steps that take statistics over units, as they are once only the `kept` ones are left."""
        return statistics_over_kept(kept, [group for group in self.groups if group.statistics])

    def plans(self, group: ReadUnits, units: Tensor | None = None) -> tuple[SamplePlan, SamplePlan]:
        """What the fitting and held-back moments of a group, or of some of its units, take."""
        readings = restrict_readings(self.readings(group), units)
        available = [output_positions(reading, self.program) for reading in readings]
        fitting = plan_samples(readings, available, self.fitting.count, self.forward_macs, self.row_share)
        share = fitting.samples / self.fitting.count
        fewest = min(self.held_back.count, 256)
        return fitting, SamplePlan(max(fewest, round(share * self.held_back.count)), fitting.positions)

    def filter_recorders(
        self, read: ReadUnits, *, rectified: bool = False, kept: KeptPair | None = None
    ) -> tuple[FilterRecorder, FilterRecorder]:
        """Empty recorders of one depthwise convolution, for the fitting and for the held-back samples."""
        (consumer,) = read.consumers
        reading = filter_reading(consumer, self.state[consumer.weight])
        available = output_positions(reading, self.program)
        taps = math.prod(reading.kernel)
        rows = self.row_share * max(FILTER_NUMBERS / taps, FILTER_ROWS_PER_TAP * taps)
        count = min(available, math.ceil(rows / min(self.fitting.count, FILTER_SAMPLES)))
        samples = min(self.fitting.count, FEWEST_SAMPLES, max(FILTER_SAMPLES, math.ceil(rows / count)))
        rectifier = self.rectifiers(read).get(consumer.node) if rectified else None
        plans = (SamplePlan(samples, (count,)), SamplePlan(min(self.held_back.count, FEWEST_SAMPLES), (count,)))
        first, second = (
            FilterRecorder(consumer, plan, seed=self.seed + shift, rectifier=rectifier, kept=rows)
            for shift, (plan, rows) in enumerate(zip(plans, kept or (None, None), strict=True))
        )
        return first, second

    def recorders(
        self,
        group: ReadUnits,
        targets: bool,
        units: Tensor | None = None,
        *,
        rectified: bool = False,
        kept: KeptPair | None = None,
        single: bool = False,
    ) -> tuple[GroupRecorder, GroupRecorder]:
        """Empty recorders of one group, or of some of its units, for the fitting and for the held-back samples.

        Args:
            rectified: targets that count errors behind the next ReLU alone.
            kept: what the original network gives there, where it does not run.
            single: moments are for a refit alone.
        """
        plans = self.plans(group, units)
        if kept is not None and not all(rows.covers(plan) for rows, plan in zip(kept, plans, strict=True)):
            plans = kept[0].plan, kept[1].plan
        fitting, checking = (
            GroupRecorder(
                group,
                self.readings(group),
                plan,
                seed=self.seed + shift,
                memory=self.memory,
                targets=targets,
                residuals=self.residuals(group),
                rectifiers=self.rectifiers(group) if rectified else None,
                share=self.share,
                units=units,
                kept=rows,
                single=single,
            )
            for shift, (plan, rows) in enumerate(zip(plans, kept or (None, None), strict=True))
        )
        return fitting, checking


def select_groups(groups: Sequence[UnitGroup], layers: Sequence[str], excluded: Sequence[str]) -> tuple[UnitGroup, ...]:
    """Groups that match a glob of `layers` (all, if there is none) and none of `excluded`.

    A pattern also selects the subtree of modules below it: `classifier` matches `classifier.4`. Of layers that are cut
    together each one's own name stands for all of them.
    """

    def matches(group: UnitGroup, patterns: Sequence[str]) -> bool:
        return any(pattern in group.producers for pattern in patterns) or matches_name(group.name, patterns)

    return tuple(group for group in groups if (not layers or matches(group, layers)) and not matches(group, excluded))


def select_names(paths: Iterable[str], layers: Sequence[str], excluded: Sequence[str]) -> tuple[str, ...]:
    """Module paths that a glob of `layers` selects (all, if there is none) and none of `excluded`."""
    return tuple(
        path for path in paths if (not layers or matches_name(path, layers)) and not matches_name(path, excluded)
    )


def matches_name(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the globs, or lies below a module that does."""
    return any(fnmatch.fnmatchcase(name, form) for pattern in patterns for form in (pattern, f"{pattern}.*"))


@dataclass(frozen=True, eq=False)
class Recorded:
    """Moments by group name, and of the groups without any, why: they are NaN, or of no samples."""

    moments: dict[str, LayerMoments]
    skipped: dict[str, str]


def record_all(
    problem: Problem, progress: Progress, keepers: Sequence[Sequence[OriginalRecorder]] = ((), ())
) -> Recorded:
    """Moments of every group in one pass over the original network, Ψ being its own outputs.

    Args:
        keepers: of the fitting and of the held-back samples, what keeps rows of the original network on the way.
    """
    recorder_pairs = {group.name: problem.recorders(group, targets=False) for group in problem.groups}
    for which, stream in enumerate((problem.fitting, problem.held_back)):
        recorders: list[Recorder] = [*(pair[which] for pair in recorder_pairs.values()), *keepers[which]]
        progress.stage("recording all layers" if not which else "recording held-back samples", stream.count)
        record_moments(problem.program, recorders, stream.read, stream.sizes(), problem.state, advance=progress.advance)
    recorded = Recorded({}, {})
    for group in problem.groups:
        try:
            recorded.moments[group.name] = gather_moments(problem, group, recorder_pairs.pop(group.name))
        except LAYER_FAULTS as fault:
            recorded.skipped[group.name] = describe_fault(fault)
    return recorded


def gather_moments(problem: Problem, group: ReadUnits, recorders: tuple[GroupRecorder, GroupRecorder]) -> LayerMoments:
    """Moments of one group from its two full recorders. Raises NonFiniteError, MomentsError."""
    fitting, checking = recorders
    return make_layer_moments(
        group,
        fitting.whole,
        fitting.moments(problem.state),
        checking.moments(problem.state),
        state=problem.state,
        targets=fitting.targets,
        rows=fitting.rows,
        positions=fitting.plan.describe(),
        units=fitting.units,
    )


class Divided(NamedTuple):
    """Disjoint samples to fit to and to check on, and how many of them belong to others, which are on the same side."""

    fitting: SampleStream
    held_back: SampleStream
    related: int


def fit_samples(
    source: DataSource,
    limit: int,
    held_back: float,
    batch_size: int,
    seed: int,
    *,
    whole_batches: bool = False,
    left_out: Sequence[int] = (),
) -> Divided:
    """Seeded, disjoint streams for fitting and for checking, from at most `limit` samples of a source.

    Args:
        whole_batches: leave out what does not fill a batch, for a graph that holds for one batch size only.
        left_out: numbers of samples that are in neither.

    Raises:
        DataError: a sample cannot be read, or too few fill no batch.
    """
    order = without(draw_samples(source, limit, seed), left_out)
    checking = min(len(order) - 1, max(FEWEST_HELD_BACK, round(held_back * len(order))))
    *parts, related = hold_back(source, order, checking, batch_size)
    if whole_batches:
        parts = [part[: len(part) // batch_size * batch_size] for part in parts]
        if not all(len(part) for part in parts):
            raise DataError(f"This network runs on batches of {batch_size} only; give more calibration samples.")
    fitting, checks = (SampleStream(source, part, batch_size) for part in parts)
    return Divided(fitting, checks, related)


def draw_samples(source: DataSource, limit: int, seed: int) -> Tensor:
    """Numbers of at most `limit` samples of a source in a seeded order."""
    return torch.randperm(source.sample_count, generator=torch.Generator().manual_seed(seed))[:limit]

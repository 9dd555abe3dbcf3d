"""Front to back: each layer's Φ from the network compressed so far, its Ψ from the original one (THEORY §5)."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.compression.layer import LayerFacts, LayerOptions, LayerResult, adjust_layer, solve_layer
from compress.compression.resume import RunState, StoredLayer
from compress.compression.scoring import CalibrationScore, score_samples
from compress.compression.turns import Turn, changed_tensors, left_channels, make_schedule
from compress.compression.widths import WidthRule
from compress.data import DataSource
from compress.errors import DataError
from compress.graph.program import Program
from compress.progress import Progress
from compress.recording.layer_moments import LayerMoments, make_layer_moments
from compress.recording.readings import Reading, find_readings, output_positions
from compress.recording.record import GroupRecorder, SamplePlan, plan_samples, record_moments, restrict_readings
from compress.recording.residuals import Rectifier, Residual, find_rectifier, find_residual
from compress.recording.sharing import Share
from compress.recording.store import ActivationStore
from compress.units.groups import Consumer, UnitGroup

FEWEST_HELD_BACK = 2  # one sample has no spread to measure an error against
CACHE_BYTES = 8 * 2**30  # on disk, for activations between two layers


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
        return (self.batch(number).inputs,)

    def batch(self, number: int):  # type: ignore[no-untyped-def]
        """Batch `number`, inputs and labels."""
        own = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        return next(iter(self.source.batches(self.batch_size, own)))

    def sizes(self) -> list[int]:
        """Samples in each batch."""
        return [min(self.batch_size, self.count - first) for first in range(0, self.count, self.batch_size)]


@dataclass(frozen=True, eq=False)
class Problem:
    """A traced network with its data, ready to be compressed.

    Attributes:
        state: original state in computing precision, on the device.
        groups: the units to cut, front to back.
        fitting, held_back: disjoint calibration samples; the second only checks.
        forward_macs: multiply-accumulates of one sample through the original network.
        readers: consumers that may be refitted although none of their units goes, once their input has changed.
        share: this process's part of the batches to record.
        biases: state names of zero biases that the original network does not have.
    """

    program: Program
    state: dict[str, Tensor]
    groups: tuple[UnitGroup, ...]
    fitting: SampleStream
    held_back: SampleStream
    forward_macs: int
    memory: int
    seed: int = 0
    readers: tuple[Consumer, ...] = ()
    share: Share = field(default_factory=Share)
    biases: tuple[str, ...] = ()

    def schedule(self) -> tuple[Turn, ...]:
        """The turns of a sweep, front to back."""
        return make_schedule(self.program, self.state, self.groups, self.readers)

    def readings(self, group: UnitGroup) -> tuple[Reading, ...]:
        """Readings of one of the groups."""
        return find_readings(group, self.state)

    def residuals(self, group: UnitGroup) -> dict[str, Residual]:
        """Consumer's node -> the addition behind it, where there is one."""
        found = {consumer.node: find_residual(self.program, consumer) for consumer in group.consumers}
        return {node: residual for node, residual in found.items() if residual is not None}

    def rectifiers(self, group: UnitGroup) -> dict[str, Rectifier]:
        """Consumer's node -> the ReLU behind it, where there is one."""
        found = {consumer.node: find_rectifier(self.program, consumer) for consumer in group.consumers}
        return {node: rectifier for node, rectifier in found.items() if rectifier is not None}

    def plans(self, group: UnitGroup, units: Tensor | None = None) -> tuple[SamplePlan, SamplePlan]:
        """What the fitting and held-back moments of a group, or of some of its units, take."""
        readings = restrict_readings(self.readings(group), units)
        available = [output_positions(reading, self.program) for reading in readings]
        fitting = plan_samples(readings, available, self.fitting.count, self.forward_macs)
        share = fitting.samples / self.fitting.count
        fewest = min(self.held_back.count, 256)
        return fitting, SamplePlan(max(fewest, round(share * self.held_back.count)), fitting.positions)

    def recorders(
        self, group: UnitGroup, targets: bool, units: Tensor | None = None, *, rectified: bool = False
    ) -> tuple[GroupRecorder, GroupRecorder]:
        """Empty recorders of one group, or of some of its units, for the fitting and for the held-back samples.

        Args:
            rectified: targets that count errors behind the next ReLU alone.
        """
        readings = self.readings(group)
        fitting, checking = (
            GroupRecorder(
                group,
                readings,
                plan,
                seed=self.seed + shift,
                memory=self.memory,
                targets=targets,
                residuals=self.residuals(group),
                rectifiers=self.rectifiers(group) if rectified else None,
                share=self.share,
                units=units,
            )
            for shift, plan in enumerate(self.plans(group, units))
        )
        return fitting, checking


@dataclass(frozen=True, eq=False)
class Layerwise:
    """A compressed network, still in its original shapes.

    Attributes:
        state: removed units' columns are zero in their consumers; consumers are refitted.
        fitting: score on the fitting samples, where it came for free; else None.
        held_back: score on the held-back samples; None where the network's outputs are not class scores.
    """

    results: list[LayerResult | StoredLayer]
    state: dict[str, Tensor]
    fitting: CalibrationScore | None
    held_back: CalibrationScore | None


def select_groups(groups: Sequence[UnitGroup], layers: Sequence[str], excluded: Sequence[str]) -> tuple[UnitGroup, ...]:
    """Groups whose name matches a glob of `layers` (all, if there is none) and none of `excluded`.

    A pattern also selects the subtree of modules below it: `classifier` matches `classifier.4`.
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, form) for pattern in patterns for form in (pattern, f"{pattern}.*"))

    return tuple(
        group for group in groups if (not layers or matches(group.name, layers)) and not matches(group.name, excluded)
    )


def record_all(problem: Problem, progress: Progress) -> dict[str, LayerMoments]:
    """Moments of every group in one pass over the original network, Ψ being its own outputs."""
    both = {group.name: problem.recorders(group, targets=False) for group in problem.groups}
    for which, stream in enumerate((problem.fitting, problem.held_back)):
        recorders = [pair[which] for pair in both.values()]
        progress.stage("recording all layers" if not which else "recording held-back samples", stream.count)
        record_moments(problem.program, recorders, stream.read, stream.sizes(), problem.state, advance=progress.advance)
    return {group.name: finished(problem, group, both[group.name]) for group in problem.groups}


def finished(problem: Problem, group: UnitGroup, recorders: tuple[GroupRecorder, GroupRecorder]) -> LayerMoments:
    """Moments of one group from its two full recorders."""
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


def compress_layers(
    problem: Problem,
    rule: WidthRule,
    options: LayerOptions,
    progress: Progress,
    *,
    widths: Mapping[str, int] | None = None,
    chosen: Mapping[str, Tensor] | None = None,
    candidates: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, LayerFacts] | None = None,
    kept_state: RunState | None = None,
) -> Layerwise:
    """Solve all groups of the problem front to back, then score the result on calibration samples.

    The values at the frontier between what is settled and what will still change are kept on disk, so a pass continues
    where the last one ended and the whole sweep costs about one pass through each of the two networks.

    Args:
        widths: group name -> width; overrides the rule.
        chosen: group name -> unit numbers to keep, by whatever means they were chosen; only the refit is left to do.
        candidates: group name -> unit numbers to choose among, of the groups where not all are; needs `facts`.
        facts: group name -> what moments of all units say; units out of the question are not recorded then.
        kept_state: where settled turns are kept for a later run, and taken from.
    """
    current = dict(problem.state)
    results: list[LayerResult | StoredLayer] = []
    stores: list[ActivationStore] = []
    schedule = problem.schedule()
    kept: dict[str, Tensor] = {}
    sweep = None if kept_state is None else kept_state.of_sweep(str(rule), widths)
    try:
        stores = [ActivationStore.open(CACHE_BYTES // 2) for _ in range(2)]
        for number, turn in enumerate(schedule):
            group = turn.group
            settled = None if sweep is None else sweep.read_turn(number)
            if settled is not None:
                device = next(iter(problem.state.values())).device
                current.update({name: tensor.to(device) for name, tensor in settled.weights.items()})
                if settled.layer is not None:
                    kept[group.name] = settled.layer.kept
                    results.append(settled.layer)
                continue
            units: Tensor | None = None  # the only ones in question
            if not turn.chooses:
                units = left_channels(turn, kept, problem.groups)
            elif facts is not None:
                units = (chosen or candidates or {}).get(group.name)
                units = None if units is None else units.sort().values
            frontier = next_frontier(problem, schedule[number:])
            following = [store.advance(frontier) for store in stores]
            moments, seconds = record_turn(problem, group, current, stores, following, progress, units=units)
            stores = following
            progress.stage(f"solving {group.name}")
            if units is not None and not turn.chooses:
                adjusted = adjust_layer(moments, units, options, problem.state, current)
                current.update(adjusted)
                if sweep is not None:
                    sweep.write_turn(number, adjusted)
                continue
            result = solve_layer(
                moments,
                rule,
                options,
                problem.state,
                current,
                width=(widths or {}).get(group.name),
                chosen=(chosen or {}).get(group.name),
                facts=(facts or {}).get(group.name),
            )
            current.update(result.weights)
            kept[group.name] = result.kept
            results.append(replace(result, seconds={**seconds, **result.seconds}))
            if sweep is not None:
                sweep.write_turn(number, result.weights, results[-1])
        scores = score_streams(problem, current, stores, progress)
    finally:
        for store in stores:
            store.close()
    return Layerwise(results, current, *scores)


def record_turn(
    problem: Problem,
    group: UnitGroup,
    current: Mapping[str, Tensor],
    stores: Sequence[ActivationStore],
    following: Sequence[ActivationStore],
    progress: Progress,
    *,
    units: Tensor | None = None,
    rectified: bool = False,
) -> tuple[LayerMoments, dict[str, float]]:
    """Moments of one group in the network compressed so far, and the wall seconds that took by stage.

    Args:
        units: unit numbers (m,), sorted, to record; None: all.
        rectified: with targets that count errors behind the next ReLU alone.
        stores: of the fitting and of the held-back samples, values to start from; used up.
        following: where to leave the values that the next turn starts from.
    """
    changed = any(current[name] is not tensor for name, tensor in problem.state.items())
    if units is not None and len(units) in (0, group.unit_count):
        units = None
    recorders = problem.recorders(group, targets=changed, units=units, rectified=rectified)
    seconds: Counter[str] = Counter()
    for recorder, stream, store, keep in zip(
        recorders, (problem.fitting, problem.held_back), stores, following, strict=True
    ):
        progress.stage(f"recording {group.name}", min(stream.count, recorder.plan.samples))
        spent = record_moments(
            problem.program,
            [recorder],
            stream.read,
            stream.sizes(),
            problem.state,
            current,
            store=store,
            keep=keep,
            advance=progress.advance,
        )
        seconds.update(spent)
    return finished(problem, group, recorders), dict(seconds)


def score_streams(
    problem: Problem, current: Mapping[str, Tensor], stores: Sequence[ActivationStore], progress: Progress
) -> tuple[CalibrationScore | None, CalibrationScore | None]:
    """Scores on the fitting samples, where all their last values are kept, and on the held-back ones."""
    scores: list[CalibrationScore | None] = []
    for which, (stream, store) in enumerate(zip((problem.fitting, problem.held_back), stores, strict=True)):
        sizes = stream.sizes()
        if which == 0 and not all(map(store.reaches, range(len(sizes)))):  # scoring them could cost two passes
            scores.append(None)
            continue
        progress.stage("scoring calibration samples" if which == 0 else "scoring held-back samples", stream.count)
        scores.append(
            score_samples(
                problem.program, problem.state, current, stream.batch, sizes, store=store, advance=progress.advance
            )
        )
    return scores[0], scores[1]


def next_frontier(problem: Problem, turns: Sequence[Turn], *, rectified: bool = False) -> tuple[str, ...]:
    """Values after which nothing depends on weights that are still to change, once the first turn is done."""
    changing = {name for turn in turns for consumer in turn.group.consumers for name in changed_tensors(consumer)}
    later = [turn.group for turn in turns[1:]]
    wanted = {consumer.input for group in later for consumer in group.consumers}
    wanted |= {residual.other for group in later for residual in problem.residuals(group).values()}
    if rectified:
        wanted |= {rectifier.source for group in later for rectifier in problem.rectifiers(group).values()}
    return problem.program.frontier(changing, [*sorted(wanted), problem.program.output])


def fit_samples(
    source: DataSource, limit: int, held_back: float, batch_size: int, seed: int, *, whole_batches: bool = False
) -> tuple[SampleStream, SampleStream]:
    """Seeded, disjoint streams for fitting and for checking, from at most `limit` samples of a source.

    Args:
        whole_batches: leave out what does not fill a batch, for a graph that holds for one batch size only.
    """
    order = torch.randperm(source.sample_count, generator=torch.Generator().manual_seed(seed))[:limit]
    checking = min(len(order) - 1, max(FEWEST_HELD_BACK, round(held_back * len(order))))
    parts = [order[checking:], order[:checking]]
    if whole_batches:
        parts = [part[: len(part) // batch_size * batch_size] for part in parts]
        if not all(len(part) for part in parts):
            raise DataError(f"This network runs on batches of {batch_size} only; give more calibration samples.")
    fitting, checks = (SampleStream(source, part, batch_size) for part in parts)
    return fitting, checks

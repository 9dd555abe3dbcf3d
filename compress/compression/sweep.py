"""Front to back: each layer's Φ from the network compressed so far, its Ψ from the original one.

The first sweep settles what a plan decides and refits linear outputs. Further sweeps leave the units as they are and
ask of every consumer only what comes through the next ReLU: what lies below its threshold is cut off, so an error there
costs nothing, and freedom spent on it is wasted. It is the alternation of Zhang, Zou, He and Sun (2015) with one
least-squares step a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from compress.compression.faults import LAYER_FAULTS, describe_fault
from compress.compression.frontier import Frontier
from compress.compression.known import KnownOriginal, keep_original
from compress.compression.layers.decisions import Given, Leave, Plan, Width, Within
from compress.compression.layers.layer import (
    SHAKING,
    LayerFacts,
    LayerOptions,
    LayerProblem,
    adjust_layer,
    solve_layer,
    unread,
)
from compress.compression.layers.lowering import channels_left, lower_layer
from compress.compression.layers.result import LayerResult, Settled
from compress.compression.problem import Problem
from compress.compression.resume import RunState
from compress.compression.scoring import CalibrationScore
from compress.compression.turns import Choose, Filter, Refit, Turn, left_channels
from compress.compression.watching import Look, Watch
from compress.convex import SelectionCurve
from compress.progress import Progress
from compress.recording.filters import refit_filters
from compress.recording.layer_moments import LayerMoments
from compress.units.branches import Branch, removed_branches

POLISHING_PASSES = 0.3  # that looking for better units may take in all layers together
POLISHING_LEAST = 0.5  # effort that all layers together may take in any case: about a second
PER_EFFORT = 4e9  # multiplications of that search at effort 1
SLOWER = 10.0  # times that a multiplication of that search takes as long as one of a pass
WORTH = 0.02  # of the damage, that a further sweep must have taken away for another one to follow
RIDGE = 1e-3  # of a depthwise filter's refit: on its change, relative to each tap's second moment


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed network, still in its original shapes.

    Attributes:
        state: removed units' columns are zero in their consumers; consumers are refitted.
        fitting: score on the fitting samples, where it came for free; else None.
        held_back: score on the held-back samples; None where nothing was scored.
        skipped: group name -> why it has no result and stays as it is.
        refined: further sweeps that were made.
        ranks: weights that have a low rank -> that rank; `wholes`: what they and their constants were before.
    """

    results: list[LayerResult]
    state: dict[str, Tensor]
    fitting: CalibrationScore | None
    held_back: CalibrationScore | None
    skipped: Mapping[str, str] = field(default_factory=dict)
    refined: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    wholes: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Group name -> unit numbers that stay, of the groups with a result."""
        return {result.name: result.kept for result in self.results}


Settle = Callable[[Choose | Refit, Tensor | None, LayerMoments, Mapping[str, Tensor], Look], Settled]


def sweep(
    problem: Problem,
    plan: Plan,
    options: LayerOptions,
    progress: Progress,
    *,
    facts: Mapping[str, LayerFacts] | None = None,
    curves: Mapping[str, SelectionCurve] | None = None,
    known: KnownOriginal | None = None,
    watch: Watch | None = None,
    kept_state: RunState | None = None,
) -> Compressed:
    """Settle what the plan decides for every group, front to back, and score the result on calibration samples.

    A group whose moments or whose problem are no good is skipped with the reason, and the sweep goes on.

    Args:
        facts: group name -> what moments of all units say; units that a decision leaves out are not recorded then.
        curves: group name -> how its units were selected in the original network. Blocks of whose layers the plan keeps
            no unit go as a whole; both are needed for these.
        known: what was kept of the original network; None: it is run now, and kept.
        watch: what holds layers to smaller errors where the outputs move too far; None: nothing does.
        kept_state: where settled turns are kept for a later run, and taken from.
    """

    def wanted(turn: Choose) -> Tensor | None:
        decision = plan[turn.group.name]
        units: Tensor | None = None
        if facts is not None and isinstance(decision, Given):
            units = decision.units
        elif facts is not None and isinstance(decision, Width):
            units = decision.among
        return None if units is None else units.sort().values

    def settle(
        turn: Choose | Refit, units: Tensor | None, moments: LayerMoments, current: Mapping[str, Tensor], look: Look
    ) -> Settled:
        if isinstance(turn, Refit):
            assert units is not None, "a refit names its channels"
            return Settled(adjust_layer(moments, units, options, problem.state, current))
        group = turn.group
        layer = LayerProblem(
            group,
            moments,
            options,
            problem.state,
            current,
            None if facts is None else facts.get(group.name),
            None if curves is None else curves.get(group.name),
            problem.ingredients.swaps,
            polishing_effort(problem),
        )
        decision = plan[group.name]
        if watch is None or not isinstance(decision, Within):
            return Settled.of(layer.certify(decision, solve_layer(layer, decision)))
        settled = watch.settle(group, decision, partial(solve_layer, layer), look)
        return Settled.of(layer.certify(watch.decided(group, decision), settled), watch.watched(group))

    state = None if kept_state is None else kept_state.of_sweep("first" if watch is None else "watched", plan)
    left = {name: decision.reason for name, decision in plan.items() if isinstance(decision, Leave)}
    removed = removed_branches(problem.branches, planned_widths(plan))
    exact = facts is None or options.certify
    compressed = run_turns(
        problem,
        problem.state,
        {},
        wanted,
        settle,
        progress,
        stage="solving",
        left=left,
        removed=removed,
        exact=exact,
        known=known or keep_original(problem, progress),
        watch=watch,
        kept_state=state,
    )
    return (
        compressed
        if facts is None or curves is None
        else with_inner_layers(compressed, problem, removed, facts, curves)
    )


def polishing_effort(problem: Problem) -> float:
    """Effort for each layer, so that all of them take a small part of a pass over the data, or a few seconds."""
    passes = problem.forward_macs * problem.fitting.count * POLISHING_PASSES / SLOWER
    return min(SHAKING, max(POLISHING_LEAST, passes / PER_EFFORT) / max(1, len(problem.groups)))


def with_inner_layers(
    compressed: Compressed,
    problem: Problem,
    removed: Sequence[Branch],
    facts: Mapping[str, LayerFacts],
    curves: Mapping[str, SelectionCurve],
) -> Compressed:
    """The result with the layers inside blocks that go: without units, or whole where their block's end was skipped."""
    results, skipped = {layer.name: layer for layer in compressed.results}, dict(compressed.skipped)
    groups = {group.name: group for group in problem.groups}
    for branch in removed:
        for name in branch.groups:
            if branch.end in skipped:
                skipped.setdefault(name, skipped[branch.end])
            elif name != branch.end:
                results[name] = unread(groups[name], facts[name], curves[name])
    return replace(compressed, results=[results[name] for name in groups if name in results], skipped=skipped)


def planned_widths(plan: Plan) -> dict[str, int]:
    """Group name -> units that stay, of the groups whose width is decided."""
    return {name: decision.count for name, decision in plan.items() if isinstance(decision, Width)}


def refine(
    problem: Problem,
    before: Compressed,
    options: LayerOptions,
    progress: Progress,
    *,
    sweeps: int,
    known: KnownOriginal | None = None,
    ranks: Mapping[str, int] | None = None,
    stage: str = "refining",
    kept_state: RunState | None = None,
) -> Compressed:
    """The compressed network after so many further sweeps, or fewer where the last one gained little.

    Units and widths stay. A consumer keeps its weights where held-back samples do not gain. Each sweep costs about one
    pass through the compressed network, and one through the original where nothing is known of that.

    Args:
        known: what was kept of the original network; None: it runs again.
        ranks: weights that are given a low rank -> that rank; None: those that have one already keep it.
        kept_state: where settled turns are kept for a later run, and taken from.
    """
    kept = before.kept
    removed = removed_branches(problem.branches, {name: len(units) for name, units in kept.items()})
    plan = {name: Given(units) for name, units in kept.items()}
    ranks = before.ranks if ranks is None else ranks

    def settle(
        turn: Choose | Refit, units: Tensor | None, moments: LayerMoments, current: Mapping[str, Tensor], _: Look
    ) -> Settled:
        kept_units = kept[turn.group.name] if isinstance(turn, Choose) else units
        assert kept_units is not None, "a refit names its channels"
        rank = ranks.get(turn.consumer.weight) if isinstance(turn, Refit) else None
        if not isinstance(turn, Refit) or rank is None or not len(kept_units):
            return Settled(adjust_layer(moments, kept_units, options, problem.state, current))
        weight, dim = turn.consumer.weight, turn.consumer.layout.output_dim
        outputs = channels_left(weight, dim, problem.state[weight].shape[dim], kept, problem.groups)
        return lower_layer(moments, kept_units, outputs, rank, options.ridge, problem.state, current)

    compressed = before
    for number in range(sweeps):
        state = None if kept_state is None else kept_state.of_sweep(f"{stage} {number}", plan, ranks)
        after = run_turns(
            problem,
            compressed.state,
            kept,
            lambda turn: kept[turn.group.name],
            settle,
            progress,
            stage="refining",
            left=compressed.skipped,
            rectified=problem.ingredients.rectified,
            removed=removed,
            known=known,
            ranks=ranks,
            kept_state=state,
        )
        left = damage_ratio(compressed, after)
        compressed = replace(after, results=before.results, skipped=before.skipped, refined=number + 1)
        if 1 - WORTH < left < math.inf:
            break
    return compressed


def damage_ratio(first: Compressed, second: Compressed) -> float:
    """Outputs' distance of the second network over that of the first, on the samples that both were scored on.

    Held-back samples and, where both were scored on them, those that were fitted to: each network was fitted to the
    same ones, and held-back samples alone are few. Infinite where nothing was scored.
    """
    kinds = ("held_back", "fitting") if first.fitting is not None and second.fitting is not None else ("held_back",)
    sums = []
    for compressed in (first, second):
        scores = [score for kind in kinds if (score := getattr(compressed, kind)) is not None]
        if len(scores) < len(kinds):
            return math.inf
        sums.append(sum(score.distance * score.samples for score in scores))
    return sums[1] / sums[0] if sums[0] > 0 else math.inf


def run_turns(
    problem: Problem,
    start: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    wanted: Callable[[Choose], Tensor | None],
    settle: Settle,
    progress: Progress,
    *,
    stage: str,
    left: Mapping[str, str],
    rectified: bool = False,
    removed: Sequence[Branch] = (),
    exact: bool = False,
    known: KnownOriginal | None = None,
    ranks: Mapping[str, int] | None = None,
    watch: Watch | None = None,
    kept_state: RunState | None = None,
) -> Compressed:
    """Record and settle every turn of a sweep in its order, then score the network.

    Args:
        start: state to begin with.
        kept: group name -> units (m,) that stay, of groups settled before; the turns' own layers add theirs.
        wanted: the only units in question where a group's are chosen; None: all.
        settle: turn, units that were recorded (None: all), their moments, the state so far and what the outputs make of
            new tensors, to what becomes of it.
        stage: what a turn is called while it is settled.
        left: group name -> why its units are not asked about.
        rectified: record targets that count errors behind the next ReLU alone.
        removed: blocks that go as a whole.
        exact: more than a refit is asked of the moments of a group whose units are chosen: certificates, ranks.
        known: what was kept of the original network.
        ranks: weights that are given a low rank -> that rank.
        watch: is told of every group that is done.
        kept_state: where settled turns are kept for a later run, and taken from.
    """
    current, kept, skipped, ranks = dict(start), dict(kept), dict(left), ranks or {}
    results: list[LayerResult] = []
    wholes: dict[str, Mapping[str, Tensor]] = {}
    turns = [
        turn for turn in problem.turns(removed, ranks) if not (isinstance(turn, Choose) and turn.group.name in left)
    ]
    if known is not None and not known.serves(turns, rectified=rectified):
        known = None
    with Frontier.open(problem, progress, rectified=rectified, known=known) as frontier:
        for number, turn in enumerate(turns):
            settled = None if kept_state is None else kept_state.read_turn(number)
            if settled is None:
                with frontier.turn(turns[number:], kept):
                    settled = settle_turn(frontier, turn, current, kept, wanted, settle, stage, exact=exact)
                if kept_state is not None:
                    kept_state.write_turn(number, settled)
            else:
                settled = settled.to(problem.device)
            if watch is not None and isinstance(turn, Choose):
                watch.go_on(turn.group, settled.watched)
            current.update(settled.weights)
            wholes |= {name: settled.whole for name in settled.whole if name in ranks}
            if settled.fault is not None and isinstance(turn, Choose):
                skipped[turn.group.name] = settled.fault
            elif settled.fault is not None:
                progress.note(f"{turn.read.name} keeps its weights: {settled.fault}")
            if settled.layer is not None:
                kept[settled.layer.name] = settled.layer.kept
                results.append(settled.layer)
            progress.reach((number + 1) / len(turns))
        scores = frontier.score(current, kept)
    lowered = {name: ranks[name] for name in wholes}
    return Compressed(results, current, *scores, skipped, ranks=lowered, wholes=wholes)


def settle_turn(
    frontier: Frontier,
    turn: Turn,
    current: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    wanted: Callable[[Choose], Tensor | None],
    settle: Settle,
    stage: str,
    *,
    exact: bool,
) -> Settled:
    """Record one turn and settle it; arguments as of `run_turns`. Moments that are no good become its fault."""
    problem = frontier.problem
    try:
        if isinstance(turn, Filter):
            moments_of_filter = frontier.record_filters(turn, current, kept)
            return Settled(refit_filters(turn.consumer, *moments_of_filter, RIDGE, problem.state, current))
        units = wanted(turn) if isinstance(turn, Choose) else left_channels(turn, kept, problem.groups)
        single = isinstance(turn, Refit) or not exact
        moments, seconds = frontier.record(turn, current, kept, units, single=single)
        frontier.progress.stage(f"{stage} {turn.read.name}")

        def look(layer: LayerResult, count: int) -> float:
            return frontier.distance({**current, **layer.weights}, {**kept, layer.name: layer.kept}, count)

        settled = settle(turn, units, moments, current, look)
    except LAYER_FAULTS as fault:
        return Settled({}, fault=describe_fault(fault))
    if settled.layer is None:
        return settled
    return replace(settled, layer=settled.layer.after_recording(seconds))

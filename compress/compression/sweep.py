"""Front to back: each layer's Φ from the network compressed so far, its Ψ from the original one.

The first sweep settles what a plan decides and refits linear outputs. Further sweeps leave the units as they are and
ask of every consumer only what comes through the next ReLU: what lies below its threshold is cut off, so an error there
costs nothing, and freedom spent on it is wasted. It is the alternation of Zhang, Zou, He and Sun (2015) with one
least-squares step a sweep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from compress.compression.decisions import Given, Leave, Plan, Width
from compress.compression.faults import LAYER_FAULTS, describe_fault
from compress.compression.layer import LayerFacts, LayerOptions, LayerResult, adjust_layer, solve_layer
from compress.compression.problem import Problem, gather_moments
from compress.compression.resume import RunState, SettledTurn, StoredLayer
from compress.compression.scoring import CalibrationScore, score_samples
from compress.compression.turns import Choose, Filter, Refit, Turn, changed_tensors, left_channels
from compress.progress import Progress
from compress.recording.filters import FilterMoments, refit_filters
from compress.recording.layer_moments import LayerMoments
from compress.recording.record import record_moments
from compress.recording.store import ActivationStore
from compress.units.groups import ReadUnits

RIDGE = 1e-3  # of a depthwise filter's refit: on its change, relative to each tap's second moment
CACHE_BYTES = 8 * 2**30  # on disk, for activations between two layers


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed network, still in its original shapes.

    Attributes:
        state: removed units' columns are zero in their consumers; consumers are refitted.
        fitting: score on the fitting samples, where it came for free; else None.
        held_back: score on the held-back samples; None where nothing was scored.
        skipped: group name -> why it has no result and stays as it is.
    """

    results: list[LayerResult | StoredLayer]
    state: dict[str, Tensor]
    fitting: CalibrationScore | None
    held_back: CalibrationScore | None
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Group name -> unit numbers that stay, of the groups with a result."""
        return {result.name: result.kept for result in self.results}


@dataclass(frozen=True, eq=False)
class Settled:
    """What a turn comes to: new tensors by state name, and the layer's result where its units were chosen.

    Attributes:
        fault: why it comes to nothing, where its moments or the problem on them are no good.
    """

    weights: Mapping[str, Tensor]
    layer: LayerResult | StoredLayer | None = None
    fault: str | None = None


Settle = Callable[[Choose | Refit, Tensor | None, LayerMoments, Mapping[str, Tensor]], Settled]


def sweep(
    problem: Problem,
    plan: Plan,
    options: LayerOptions,
    progress: Progress,
    *,
    facts: Mapping[str, LayerFacts] | None = None,
    kept_state: RunState | None = None,
) -> Compressed:
    """Settle what the plan decides for every group, front to back, and score the result on calibration samples.

    A group whose moments or whose problem are no good is skipped with the reason, and the sweep goes on.

    Args:
        facts: group name -> what moments of all units say; units that a decision leaves out are not recorded then.
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
        turn: Choose | Refit, units: Tensor | None, moments: LayerMoments, current: Mapping[str, Tensor]
    ) -> Settled:
        if isinstance(turn, Refit):
            assert units is not None, "a refit names its channels"
            return Settled(adjust_layer(moments, units, options, problem.state, current))
        group = turn.group
        known = None if facts is None else facts.get(group.name)
        swaps = problem.ingredients.swaps
        layer = solve_layer(group, moments, plan[group.name], options, problem.state, current, facts=known, swaps=swaps)
        return Settled(layer.weights, layer)

    state = None if kept_state is None else kept_state.of_sweep("first", plan)
    left = {name: decision.reason for name, decision in plan.items() if isinstance(decision, Leave)}
    return run_turns(problem, problem.state, {}, wanted, settle, progress, stage="solving", left=left, kept_state=state)


def refine(
    problem: Problem,
    before: Compressed,
    options: LayerOptions,
    progress: Progress,
    *,
    sweeps: int,
    kept_state: RunState | None = None,
) -> Compressed:
    """The compressed network after so many further sweeps; units and widths stay.

    A consumer keeps its weights where held-back samples do not gain. Each sweep costs about one pass through each of
    the two networks.

    Args:
        kept_state: where settled turns are kept for a later run, and taken from.
    """
    kept = before.kept
    plan = {name: Given(units) for name, units in kept.items()}

    def settle(
        turn: Choose | Refit, units: Tensor | None, moments: LayerMoments, current: Mapping[str, Tensor]
    ) -> Settled:
        own = kept[turn.group.name] if isinstance(turn, Choose) else units
        assert own is not None, "a refit names its channels"
        return Settled(adjust_layer(moments, own, options, problem.state, current))

    found = before
    for number in range(sweeps):
        state = None if kept_state is None else kept_state.of_sweep(f"refining {number}", plan)
        after = run_turns(
            problem,
            found.state,
            kept,
            lambda turn: kept[turn.group.name],
            settle,
            progress,
            stage="refining",
            left=found.skipped,
            rectified=problem.ingredients.rectified,
            kept_state=state,
        )
        found = replace(after, results=before.results, skipped=before.skipped)
    return found


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
    kept_state: RunState | None = None,
) -> Compressed:
    """Record and settle every turn of a sweep in its order, then score the network.

    The values at the frontier between what is settled and what will still change are kept on disk, so a pass continues
    where the last one ended and the whole sweep costs about one pass through each of the two networks.

    Args:
        start: state to begin with.
        kept: group name -> units (m,) that stay, of groups settled before; the turns' own layers add theirs.
        wanted: the only units in question where a group's are chosen; None: all.
        settle: turn, units that were recorded (None: all), their moments and the state so far, to what becomes of it.
        stage: what a turn is called while it is settled.
        left: group name -> why its units are not asked about.
        rectified: record targets that count errors behind the next ReLU alone.
        kept_state: where settled turns are kept for a later run, and taken from.
    """
    current, kept = dict(start), dict(kept)
    results: list[LayerResult | StoredLayer] = []
    skipped = dict(left)
    turns = [turn for turn in problem.turns() if not (isinstance(turn, Choose) and turn.group.name in left)]
    stores: list[ActivationStore] = []
    try:
        stores = [ActivationStore.open(CACHE_BYTES // 2) for _ in range(2)]
        for number, turn in enumerate(turns):
            done = None if kept_state is None else kept_state.read_turn(number)
            if done is None:
                frontier = next_frontier(problem, turns[number:], rectified=rectified)
                following = [store.advance(frontier) for store in stores]
                try:
                    if isinstance(turn, Filter):
                        filters = record_filters(
                            problem, turn, current, stores, following, progress, rectified=rectified
                        )
                        settled = Settled(refit_filters(turn.consumer, *filters, RIDGE, problem.state, current))
                    else:
                        units = wanted(turn) if isinstance(turn, Choose) else left_channels(turn, kept, problem.groups)
                        moments, seconds = record_turn(
                            problem, turn.read, current, stores, following, progress, units=units, rectified=rectified
                        )
                        progress.stage(f"{stage} {turn.read.name}")
                        settled = timed(settle(turn, units, moments, current), seconds)
                except LAYER_FAULTS as fault:
                    settled = Settled({}, fault=describe_fault(fault))
                stores = following
                if kept_state is not None:
                    kept_state.write_turn(number, settled.weights, settled.layer, settled.fault)
            else:
                settled = on_device(done, problem)
            current.update(settled.weights)
            if settled.fault is not None and isinstance(turn, Choose):
                skipped[turn.group.name] = settled.fault
            elif settled.fault is not None:
                progress.note(f"{turn.read.name} keeps its weights: {settled.fault}")
            if settled.layer is not None:
                kept[settled.layer.name] = settled.layer.kept
                results.append(settled.layer)
            progress.reach((number + 1) / len(turns))
        scores = score_streams(problem, current, stores, progress)
    finally:
        for store in stores:
            store.close()
    return Compressed(results, current, *scores, skipped)


def timed(settled: Settled, seconds: Mapping[str, float]) -> Settled:
    """The same with the seconds that recording took in the layer's result."""
    if not isinstance(settled.layer, LayerResult):
        return settled
    return replace(settled, layer=replace(settled.layer, seconds={**seconds, **settled.layer.seconds}))


def on_device(done: SettledTurn, problem: Problem) -> Settled:
    """What an earlier run settled, where this one computes."""
    return Settled({name: tensor.to(problem.device) for name, tensor in done.weights.items()}, done.layer, done.fault)


def record_turn(
    problem: Problem,
    read: ReadUnits,
    current: Mapping[str, Tensor],
    stores: Sequence[ActivationStore],
    following: Sequence[ActivationStore],
    progress: Progress,
    *,
    units: Tensor | None = None,
    rectified: bool = False,
) -> tuple[LayerMoments, dict[str, float]]:
    """Moments of units in the network compressed so far, and the wall seconds that took by stage.

    Args:
        units: unit numbers (m,), sorted, to record; None: all.
        rectified: with targets that count errors behind the next ReLU alone.
        stores: of the fitting and of the held-back samples, values to start from; used up.
        following: where to leave the values that the next turn starts from.
    """
    changed = any(current[name] is not tensor for name, tensor in problem.state.items())
    if units is not None and len(units) in (0, read.unit_count):
        units = None
    recorders = problem.recorders(read, targets=changed, units=units, rectified=rectified)
    seconds: Counter[str] = Counter()
    for recorder, stream, store, keep in zip(
        recorders, (problem.fitting, problem.held_back), stores, following, strict=True
    ):
        progress.stage(f"recording {read.name}", min(stream.count, recorder.plan.samples))
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
    return gather_moments(problem, read, recorders), dict(seconds)


def record_filters(
    problem: Problem,
    turn: Filter,
    current: Mapping[str, Tensor],
    stores: Sequence[ActivationStore],
    following: Sequence[ActivationStore],
    progress: Progress,
    *,
    rectified: bool = False,
) -> tuple[FilterMoments, FilterMoments]:
    """Moments of a depthwise convolution on the fitting and on the held-back samples; arguments as `record_turn`."""
    found = []
    recorders = problem.filter_recorders(turn.read, rectified=rectified)
    for recorder, stream, store, keep in zip(
        recorders, (problem.fitting, problem.held_back), stores, following, strict=True
    ):
        progress.stage(f"recording {turn.read.name}", min(stream.count, recorder.plan.samples))
        record_moments(
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
        found.append(recorder.moments())
    return found[0], found[1]


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
                problem.program,
                problem.state,
                current,
                stream.batch,
                sizes,
                problem.outputs,
                problem.calibration.answered,
                judged=problem.calibration.judged,
                store=store,
                advance=progress.advance,
            )
        )
    return scores[0], scores[1]


def next_frontier(problem: Problem, turns: Sequence[Turn], *, rectified: bool = False) -> tuple[str, ...]:
    """Values after which nothing depends on weights that are still to change, once the first turn is done."""
    changing = {name for turn in turns for consumer in turn.read.consumers for name in changed_tensors(consumer)}
    later = [turn.read for turn in turns[1:]]
    wanted = {consumer.input for group in later for consumer in group.consumers}
    wanted |= {residual.other for group in later for residual in problem.residuals(group).values()}
    if rectified:
        wanted |= {rectifier.source for group in later for rectifier in problem.rectifiers(group).values()}
    return problem.program.frontier(changing, [*sorted(wanted), *problem.output_nodes])

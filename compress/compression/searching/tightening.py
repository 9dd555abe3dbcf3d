"""The default rule over a whole network: each layer within its tolerance, and the outputs within theirs.

Layers that err alike do not move the outputs alike: all that follows reads the few channels of a narrow linear
bottleneck, while hundreds of wide ones may go unnoticed. Where random errors of the tolerance's size move the outputs
further than they may, the layers that move them most are held to smaller errors from the beginning. Where the outputs
still moved too far, the same is done by what the layers did, and the network is compressed anew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from compress.compression.known import KnownOriginal, keep_original
from compress.compression.layers.decisions import Decision, Plan, Width, Within, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.problem import Problem
from compress.compression.resume import RunState
from compress.compression.searching.curves import affordable_samples
from compress.compression.searching.damage import Cut, measure_cuts
from compress.compression.searching.foresight import expected_distance
from compress.compression.sweep import Compressed, sweep
from compress.compression.turns import Choose, Turn, changed_tensors, counting_steps
from compress.compression.watching import Watch
from compress.progress import Portion, Progress
from compress.units.groups import UnitGroup

MOST_AGAIN = 2  # sweeps after the first one
STUBBORN = 2.0  # times its part that a layer still adds before the last of them, above which it stays whole then
SLIGHT = 0.15  # tolerance of a layer up to which its refit has little to take back, and needs fewer rows for that
SLIGHT_ROWS = 0.3  # share of the others' rows
AIM = 0.8  # of what the outputs may move, that smaller tolerances are chosen for
WATCHED_AIM = 0.5  # the same while a sweep goes on: the samples that decide are few, and decide for every layer


def sweep_within(
    problem: Problem,
    tolerance: float,
    allowed: float,
    options: LayerOptions,
    progress: Progress,
    kept_state: RunState | None = None,
) -> Compressed:
    """Compress every layer to the fewest units within `tolerance`, smaller ones where outputs move more than `allowed`.

    Where random errors of the tolerance's size move the outputs that far, the first sweep is watched. Where they move
    too far after a sweep, what every layer added to their distance, behind the cuts before it, is measured, and
    `stricter` decides for another one. After `MOST_AGAIN` further sweeps the network that moved its outputs least is
    taken, with a warning where that is too far.

    Args:
        tolerance: relative error on held-back samples that a layer may add.
        allowed: mean distance of the held-back outputs from the original's: nats of scores, squares of numbers
            relative to their spread.
        kept_state: where settled turns are kept for a later run, and taken from.
    """
    problem = replace(problem, row_share=SLIGHT_ROWS) if tolerance <= SLIGHT else problem
    plan = same_for_all(problem.groups, Within(tolerance))
    known = keep_original(problem, progress)
    expected = problem.share.from_first(lambda: expected_distance(problem, tolerance, progress, known))
    samples = affordable_samples(problem, len(problem.groups))
    watch = Watch(WATCHED_AIM * allowed, len(problem.groups), samples) if expected > allowed else None
    best = last = sweep(problem, plan, options, progress, known=known, watch=watch, kept_state=kept_state)
    alone = distance_of(best)
    plan = plan if watch is None else {**plan, **watch.stricter}
    for number in range(1, MOST_AGAIN + 1):
        if not distance_of(last) > allowed:
            break
        added = added_distances(problem, last, progress, known)
        if common_cap(added.values(), AIM * allowed) == math.inf:
            break
        plan = stricter(problem.groups, plan, added, AIM * allowed, last=number == MOST_AGAIN)
        last = sweep(problem, plan, options, Portion(progress, 1, 1), known=known, kept_state=kept_state)
        best = min(best, last, key=distance_of)
    held = watch is not None and bool(watch.stricter)
    note_tightening(expected if held else alone, best, allowed, progress, foreseen=held)
    return best


def distance_of(compressed: Compressed) -> float:
    """Mean distance of the held-back outputs from the original's; 0 where nothing was scored or it is no number."""
    distance = 0.0 if compressed.held_back is None else compressed.held_back.distance
    return 0.0 if math.isnan(distance) else distance


def note_tightening(
    alone: float, best: Compressed, allowed: float, progress: Progress, *, foreseen: bool = False
) -> None:
    """Say that layers were held to smaller errors, and whether that was enough.

    Args:
        alone: what the layers' tolerance alone came to; `foreseen`: would have come to, by random errors of its size.
    """
    distance = distance_of(best)
    if distance < alone:
        moved = "would move held-back outputs by about" if foreseen else "moved held-back outputs by"
        progress.note(
            f"--tolerance alone {moved} {alone:.3g}, more than --output-tolerance {allowed:g}: the "
            f"layers that moved them most were held to smaller errors, and they move by {distance:.3g}"
        )
    if distance > allowed:
        progress.note(
            f"warning: held-back outputs move by {distance:.3g}, more than --output-tolerance {allowed:g}; give more "
            "samples, a smaller --tolerance, or a budget such as --macs."
        )


def added_distances(
    problem: Problem, compressed: Compressed, progress: Progress, known: KnownOriginal | None = None
) -> dict[str, float]:
    """Group name -> what its cut and the refits up to the next cut added to the outputs' distance; 0 where it fell.

    Each network that is compressed up to a layer and the original's behind it is run from that layer on, over the
    held-back samples or some of them.
    """
    cut = {layer.name for layer in compressed.results if layer.is_cut}
    turns = problem.turns()
    places = [at for at, turn in enumerate(turns) if isinstance(turn, Choose) and turn.group.name in cut]
    ends = [*places[1:], len(turns)]
    kept = compressed.kept
    parts = [partly(problem, turns, end, kept) for end in ends]
    samples = affordable_samples(problem, len(parts))
    progress.stage("measuring what layers do to the outputs", samples)
    reached = measure_cuts(
        problem,
        parts,
        samples=samples,
        known=known,
        advance=progress.advance,
        base=compressed.state,
        override=problem.renormalised(kept),
    )
    rises = (max(0.0, after - before) for before, after in itertools.pairwise([0.0, *reached]))
    return {turns[at].read.name: rise for at, rise in zip(places, rises, strict=True)}


def partly(problem: Problem, turns: Sequence[Turn], end: int, kept: Mapping[str, Tensor]) -> Cut:
    """A compressed network of which `kept` units are left, with the original's weights and units from turn `end` on."""
    later = {name for turn in turns[end:] for consumer in turn.read.consumers for name in changed_tensors(consumer)}
    groups = [turn.group for turn in turns[end:] if isinstance(turn, Choose)]
    start = problem.program.frontier(later, problem.output_nodes, counting_steps(groups))
    names = {group.name for group in groups}
    override = problem.renormalised({name: units for name, units in kept.items() if name not in names})
    return Cut("partly", 0, {name: problem.state[name] for name in later}, start, override)


def stricter(
    groups: Sequence[UnitGroup], plan: Plan, added: Mapping[str, float], allowed: float, *, last: bool
) -> dict[str, Decision]:
    """Decisions by which no layer adds more than another, or than it did, and all of them add no more than `allowed`.

    A distance grows as the square of a small error, so that tolerances fall as its root. Where held-back samples do not
    see what a cut does, the fewest units that are within any tolerance stay the same: before the last sweep a layer
    that adds far more than its part is left whole.
    """
    cap, decisions = common_cap(added.values(), allowed), dict(plan)
    for group in groups:
        decision, distance = plan[group.name], added.get(group.name, 0.0)
        if last and distance > STUBBORN * cap:
            decisions[group.name] = Width(group.unit_count)
        elif distance > cap and isinstance(decision, Within):
            decisions[group.name] = Within(float(f"{decision.error * math.sqrt(cap / distance):.4g}"))
    return decisions


def common_cap(values: Iterable[float], total: float) -> float:
    """The c at which Σ min(value, c) is the total; infinite where all values together are less."""
    room, rising = total, sorted(values)
    for place, value in enumerate(rising):
        left = len(rising) - place
        if value * left > room:
            return room / left
        room -= value
    return math.inf

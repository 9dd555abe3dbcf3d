"""Further sweeps over a network that is cut: consumers refitted to what the original gives behind the next ReLU.

The first sweep refits linear outputs. What lies below a ReLU's threshold is cut off, so an error there costs nothing,
and freedom spent on it is wasted: with widths and units settled, each sweep asks of every consumer only what comes
through, by the least change of what it gives now. It is the alternation of Zhang, Zou, He and Sun (2015) with one
least-squares step a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from compress.compression.layer import LayerOptions, adjust_layer
from compress.compression.resume import RunState
from compress.compression.sweep import CACHE_BYTES, Layerwise, Problem, next_frontier, record_turn, score_streams
from compress.compression.turns import left_channels
from compress.progress import Progress
from compress.recording.store import ActivationStore


def refine_layers(
    problem: Problem,
    found: Layerwise,
    options: LayerOptions,
    progress: Progress,
    *,
    sweeps: int,
    kept_state: RunState | None = None,
) -> Layerwise:
    """The compressed network after so many further sweeps; units and widths stay.

    A consumer keeps its weights where held-back samples do not gain. Each sweep costs about one pass through each of
    the two networks.

    Args:
        kept_state: where settled turns are kept for a later run, and taken from.
    """
    kept = {result.name: result.kept for result in found.results}
    widths = {name: len(units) for name, units in kept.items()}
    for number in range(sweeps):
        state = None if kept_state is None else kept_state.of_sweep(f"refining {number}", widths)
        found = _sweep(problem, found, kept, options, progress, state)
    return found


def _sweep(
    problem: Problem,
    found: Layerwise,
    kept: Mapping[str, Tensor],
    options: LayerOptions,
    progress: Progress,
    kept_state: RunState | None,
) -> Layerwise:
    current = dict(found.state)
    schedule = problem.schedule()
    stores: list[ActivationStore] = []
    try:
        stores = [ActivationStore.open(CACHE_BYTES // 2) for _ in range(2)]
        for number, turn in enumerate(schedule):
            settled = None if kept_state is None else kept_state.read_turn(number)
            if settled is not None:
                device = next(iter(problem.state.values())).device
                current.update({name: tensor.to(device) for name, tensor in settled.weights.items()})
                continue
            units = kept[turn.group.name] if turn.chooses else left_channels(turn, kept, problem.groups)
            frontier = next_frontier(problem, schedule[number:], rectified=True)
            following = [store.advance(frontier) for store in stores]
            moments, _ = record_turn(
                problem, turn.group, current, stores, following, progress, units=units, rectified=True
            )
            stores = following
            progress.stage(f"refining {turn.group.name}")
            adjusted = adjust_layer(moments, units, options, problem.state, current)
            current.update(adjusted)
            if kept_state is not None:
                kept_state.write_turn(number, adjusted)
        scores = score_streams(problem, current, stores, progress)
    finally:
        for store in stores:
            store.close()
    return replace(found, state=current, fitting=scores[0], held_back=scores[1])

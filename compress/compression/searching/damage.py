"""What a layer's reconstruction error does to the network's outputs, measured on calibration samples without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compress.compression.faults import LAYER_FAULTS
from compress.compression.layers.layer import LayerOptions
from compress.compression.layers.refit import refit_layer
from compress.compression.problem import Problem
from compress.compression.turns import changed_tensors
from compress.convex import SelectionCurve
from compress.graph.program import run
from compress.measures.outputs import Distances
from compress.recording.layer_moments import LayerMoments

PROBED_ERRORS = (0.1, 0.3, 0.6)  # relative errors at whose widths the divergence is measured


def probe_widths(errors: Tensor, legal: Sequence[int], levels: Sequence[float] = PROBED_ERRORS) -> list[int]:
    """The smallest legal width within each error level, each once, without the full width."""
    found = []
    for level in levels:
        width = next((width for width in legal if float(errors[width]) <= level), legal[-1])
        if width != legal[-1] and width not in found:
            found.append(width)
    return found


def measure_divergences(
    problem: Problem,
    moments: Mapping[str, LayerMoments],
    curves: Mapping[str, SelectionCurve],
    widths: Mapping[str, Sequence[int]],
    options: LayerOptions,
    *,
    samples: int,
    advance: Callable[[int], None] | None = None,
) -> dict[str, list[tuple[int, float]]]:
    """Divergence of the outputs from the original's when one layer alone is cut to one width and refitted.

    All outputs count, by their weights, in nats where they are scores and in squares relative to their own spread
    where they are numbers. The held-back samples are run once through the original network; every cut restarts from
    the values in front of the layer it changes, so it costs only what lies behind that layer. A cut whose problem has
    no solution is not measured.

    Args:
        widths: group name -> widths to measure.
        samples: how many of the held-back samples.

    Returns:
        Group name -> (width, mean divergence per sample).
    """
    program, state = problem.program, problem.state
    nodes = list(problem.output_nodes)
    cuts: list[tuple[str, int, dict[str, Tensor], tuple[str, ...]]] = []
    for group in problem.groups:
        tensors = {name for consumer in group.consumers for name in changed_tensors(consumer)}
        start = program.frontier(tensors, nodes)
        for width in widths.get(group.name, ()):
            kept = curves[group.name].units(width)
            try:
                weights = refit_layer(moments[group.name], kept, options.ridge, state, state).weights
            except LAYER_FAULTS:
                continue
            cuts.append((group.name, width, weights, start))
    needed = sorted({name for *_, start in cuts for name in start})
    sums = Distances(problem.outputs, len(cuts))
    stream = problem.held_back
    device = next(iter(state.values())).device
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            if sums.samples >= samples or not cuts:
                break
            inputs = [tensor.to(device) for tensor in stream.read(number)]
            values = run(program, (state,), inputs, [*nodes, *needed])
            before = {output.name: values[str(output.node)][0] for output in problem.outputs}
            sums.start(before, size)
            for index, (_, _, weights, start) in enumerate(cuts):
                known = {name: values[name] for name in start}
                found = run(program, ({**state, **weights},), inputs, nodes, start=known)
                after = {output.name: found[str(output.node)][0] for output in problem.outputs}
                sums.add(index, before, after, size)
            if advance is not None:
                advance(size)
    measured: dict[str, list[tuple[int, float]]] = {group.name: [] for group in problem.groups}
    for (name, width, *_), distance in zip(cuts, sums.weighted(), strict=True):
        measured[name].append((width, distance))
    return measured

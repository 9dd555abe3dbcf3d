"""What a layer's reconstruction error does to the network's outputs, measured on calibration samples without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.compression.faults import LAYER_FAULTS
from compress.compression.known import KnownOriginal
from compress.compression.layers.layer import LayerOptions
from compress.compression.layers.refit import refit_layer
from compress.compression.problem import Problem
from compress.compression.turns import changed_tensors
from compress.convex import SelectionCurve
from compress.graph.program import iterate, run
from compress.graph.steps import Override
from compress.measures.outputs import Distances
from compress.recording.layer_moments import LayerMoments

PROBED_ERRORS = (0.1, 0.3, 0.6)  # relative errors at whose widths the divergence is measured


def probe_widths(errors: Tensor, legal: Sequence[int], levels: Sequence[float] = PROBED_ERRORS) -> list[int]:
    """The smallest legal width within each error level, each once, without the full width."""
    probed = []
    for level in levels:
        width = next((width for width in legal if float(errors[width]) <= level), legal[-1])
        if width != legal[-1] and width not in probed:
            probed.append(width)
    return probed


def measure_divergences(
    problem: Problem,
    moments: Mapping[str, LayerMoments],
    curves: Mapping[str, SelectionCurve],
    widths: Mapping[str, Sequence[int]],
    options: LayerOptions,
    *,
    samples: int,
    known: KnownOriginal | None = None,
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
        known: what was kept of the original network.

    Returns:
        Group name -> (width, mean divergence per sample).
    """
    cuts = solvable_cuts(problem, moments, curves, widths, options)
    distances = measure_cuts(problem, cuts, samples=samples, known=known, advance=advance)
    measured: dict[str, list[tuple[int, float]]] = {group.name: [] for group in problem.groups}
    for cut, distance in zip(cuts, distances, strict=True):
        measured[cut.name].append((cut.width, distance))
    return measured


def measure_cuts(
    problem: Problem,
    cuts: Sequence[Cut],
    *,
    samples: int,
    known: KnownOriginal | None = None,
    advance: Callable[[int], None] | None = None,
    base: Mapping[str, Tensor] | None = None,
    override: Mapping[str, Override] | None = None,
) -> list[float]:
    """Divergence of the outputs from the original's for every cut, by itself, on held-back samples.

    Args:
        samples: how many of the held-back samples, to the nearest batch, one at least.
        known: what was kept of the original network.
        base: state of the network that is cut; None: the original's.
        override: steps that this network computes otherwise.
    """
    sums = Distances(problem.outputs, len(cuts))
    stream = problem.held_back
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            if not cuts or (sums.samples and samples - sums.samples < size / 2):
                break
            inputs = [tensor.to(problem.device) for tensor in stream.read(number)]
            given = None if known is None else known.held_back_outputs(number)
            add_batch(problem, cuts, inputs, size, sums, base, given, override)
            if advance is not None:
                advance(size)
    return list(sums.weighted())


@dataclass(frozen=True, eq=False)
class Cut:
    """One layer cut to one width, or to one rank, and refitted on the original's features.

    Attributes:
        name: of the group of units, or of the weight that has the rank.
        weights: state name -> what its consumers have then.
        start: nodes from whose values a pass through the network with these weights can start.
        override: steps that this network computes otherwise.
    """

    name: str
    width: int
    weights: Mapping[str, Tensor]
    start: tuple[str, ...]
    override: Mapping[str, Override] = field(default_factory=dict)


def solvable_cuts(
    problem: Problem,
    moments: Mapping[str, LayerMoments],
    curves: Mapping[str, SelectionCurve],
    widths: Mapping[str, Sequence[int]],
    options: LayerOptions,
) -> list[Cut]:
    """Every layer at every width that is asked for, front to back; those whose problem has no solution left out."""
    state, cuts = problem.state, []
    for group in problem.groups:
        tensors = {name for consumer in group.consumers for name in changed_tensors(consumer)}
        start = problem.program.frontier(tensors, problem.output_nodes)
        for width in widths.get(group.name, ()):
            kept = curves[group.name].units(width)
            try:
                weights = refit_layer(moments[group.name], kept, options.ridge, state, state).weights
            except LAYER_FAULTS:
                continue
            cuts.append(Cut(group.name, width, weights, start))
    return cuts


def add_batch(
    problem: Problem,
    cuts: Sequence[Cut],
    inputs: Sequence[Tensor],
    size: int,
    sums: Distances,
    base: Mapping[str, Tensor] | None = None,
    given: Mapping[str, Tensor] | None = None,
    override: Mapping[str, Override] | None = None,
) -> None:
    """Add the distances of every cut network's outputs on one batch.

    Of the original's values no more are held at once than the cuts in front of which the pass stands start from.

    Args:
        given: the original's value of each output node; None: it runs.
    """
    program, nodes = problem.program, list(problem.output_nodes)
    state = problem.state if base is None else base

    def outputs_of(values: Mapping[str, tuple[Any, ...]]) -> dict[str, Tensor]:
        return {output.name: values[str(output.node)][0] for output in problem.outputs}

    before = outputs_of(
        run(program, (problem.state,), inputs, nodes, fast=True)
        if given is None
        else {name: (value,) for name, value in given.items()}
    )
    sums.start(before, size)
    waiting = dict(enumerate(cuts))
    known: dict[str, tuple[Any, ...]] = {}

    def run_ready() -> None:
        for index in [index for index, cut in waiting.items() if known.keys() >= set(cut.start)]:
            cut = waiting.pop(index)
            start = {name: known[name] for name in cut.start}
            states = ({**state, **cut.weights},)
            after = run(program, states, inputs, nodes, start=start, override=cut.override, fast=True)
            sums.add(index, before, outputs_of(after), size)

    run_ready()
    starts = sorted({name for cut in cuts for name in cut.start})
    for name, value in iterate(program, (state,), inputs, starts, override=override, fast=True):
        known[name] = value
        del value
        run_ready()
        needed = {name for cut in waiting.values() for name in cut.start}
        known = {name: value for name, value in known.items() if name in needed}

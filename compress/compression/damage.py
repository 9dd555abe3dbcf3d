"""What a layer's reconstruction error does to the network's output, measured on calibration samples without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compress.compression.layer import LayerOptions
from compress.compression.problem import Problem
from compress.compression.refit import refit_layer
from compress.compression.turns import changed_tensors
from compress.convex import SelectionCurve
from compress.graph.program import run
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
    """Divergence of the output from the original's when one layer alone is cut to one width and refitted.

    The held-back samples are run once through the original network; every cut restarts from the values in front of the
    layer it changes, so it costs only what lies behind that layer.

    Args:
        widths: group name -> widths to measure.
        samples: how many of the held-back samples.

    Returns:
        Group name -> (width, mean divergence per sample).
    """
    program, state = problem.program, problem.state
    output = program.output
    cuts: list[tuple[str, int, dict[str, Tensor], tuple[str, ...]]] = []
    for group in problem.groups:
        tensors = {name for consumer in group.consumers for name in changed_tensors(consumer)}
        start = program.frontier(tensors, [output])
        for width in widths.get(group.name, ()):
            kept = curves[group.name].units(width)
            weights = refit_layer(moments[group.name], kept, options.ridge, state, state).weights
            cuts.append((group.name, width, weights, start))
    needed = sorted({name for *_, start in cuts for name in start})
    totals = [0.0] * len(cuts)
    seen = 0
    stream = problem.held_back
    device = next(iter(state.values())).device
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            if seen >= samples or not cuts:
                break
            inputs = [tensor.to(device) for tensor in stream.read(number)]
            values = run(program, (state,), inputs, [output, *needed])
            before = values[output][0]
            for index, (_, _, weights, start) in enumerate(cuts):
                known = {name: values[name] for name in start}
                after = run(program, ({**state, **weights},), inputs, [output], start=known)[output][0]
                totals[index] += float(divergence(before, after).sum())
            seen += size
            if advance is not None:
                advance(size)
    found: dict[str, list[tuple[int, float]]] = {group.name: [] for group in problem.groups}
    for (name, width, *_), total in zip(cuts, totals, strict=True):
        found[name].append((width, total / max(seen, 1)))
    return found


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """How far outputs moved, per sample (B,): KL of the class distributions (B, C), else relative squares."""
    first, second = before.double(), after.double()
    if first.ndim == 2 and first.shape[1] > 1:
        logs, other = first.log_softmax(1), second.log_softmax(1)
        return (logs.exp() * (logs - other)).sum(1).clamp_min(0)
    flat = (second - first).flatten(1).square().sum(1)
    return flat / first.flatten(1).square().sum(1).mean().clamp_min(1e-30)

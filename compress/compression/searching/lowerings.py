"""Weights that may be given a low rank: at which three ranks two layers are faster, and what that does to the outputs.

A rank between those that were measured is never chosen: where the outputs' spectrum breaks off, damage grows by orders
of magnitude from one rank to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compress.checkpoint.pairs import most_rank
from compress.compression.faults import LAYER_FAULTS, describe_fault
from compress.compression.layers.layer import LayerOptions
from compress.compression.layers.lowering import cut_off
from compress.compression.pricing.allocate import Lowering
from compress.compression.pricing.costs import map_uses
from compress.compression.pricing.pairs import FASTER, extents_left, time_pairs
from compress.compression.problem import Problem, gather_moments
from compress.compression.searching.damage import Cut, measure_cuts
from compress.compression.sweep import Compressed
from compress.compression.turns import changed_tensors
from compress.errors import SolverError
from compress.progress import Progress
from compress.recording.layer_moments import LayerMoments
from compress.recording.record import record_moments
from compress.report.model import Counts, LowRankLayer, Measured, Step
from compress.units.low_rank import Factorable, describe_layer

SLOWER = "two layers are no faster at any rank"
MOST_SAMPLES = 512  # held-back ones, that a layer's damage in the cut network is measured on
LEVELS = (3 / 4, 1 / 2, 1 / 4)  # of the rank at which two layers multiply as often as the one


@dataclass(frozen=True)
class Lowerings:
    """What may be chosen, and path -> why other layers keep their rank."""

    usable: tuple[Lowering, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def probed_ranks(most: int, round_to: int = 1) -> tuple[int, ...]:
    """Three ranks or fewer to measure, descending: multiples of `round_to`, or of the channels that kernels work in."""
    ranks = (rounded_rank(level * (most + 1), most, round_to) for level in LEVELS)
    return tuple(dict.fromkeys(rank for rank in ranks if 0 < rank <= most))


def rounded_rank(wanted: float, most: int, round_to: int) -> int:
    """The nearest multiple that is at most `most`; without one to round to, of 8 from 16 up, of 4 from 4 up."""
    step = round_to if round_to > 1 else 8 if wanted >= 16 else 4 if wanted >= 4 else 1
    return min(round(wanted / step), most // step) * step


def find_lowerings(problem: Problem, options: LayerOptions, samples: int, progress: Progress) -> Lowerings:
    """Time, record and measure every layer that two of a low rank may stand for, at three ranks each.

    Args:
        samples: held-back ones that damage is measured on.
    """
    refused = dict(problem.factorables.refused)
    shares: dict[str, dict[int, float]] = {}
    progress.stage("timing layers of low rank", len(problem.factorables.layers))
    for layer in problem.factorables.layers:
        ranks, extents = probed_ranks(layer.most, options.round_to), (layer.outputs, layer.inputs)
        shares[layer.weight] = faster_ranks(problem, layer, ranks, extents)
        progress.advance()
    layers = [layer for layer in problem.factorables.layers if shares[layer.weight]]
    slow = {layer.path for layer in problem.factorables.layers} - {layer.path for layer in layers}
    refused |= dict.fromkeys(sorted(slow), SLOWER)
    cuts, faults = lowered_cuts(problem, layers, shares, options, progress)
    refused |= faults
    progress.stage("measuring low ranks", samples)
    damages = measure_cuts(problem, cuts, samples=samples, advance=progress.advance)
    usable = []
    for layer in layers:
        known = {cut.width: damage for cut, damage in zip(cuts, damages, strict=True) if cut.name == layer.weight}
        if known:
            ranks = tuple(known)
            times = tuple(shares[layer.weight][rank] for rank in ranks)
            usable.append(Lowering(layer.weight, ranks, tuple(known.values()), times))
    return Lowerings(tuple(usable), refused)


def faster_ranks(
    problem: Problem, layer: Factorable, ranks: Sequence[int], extents: tuple[int, int]
) -> dict[int, float]:
    """The ranks at which two layers multiply less than the one, and are faster -> their share of its time.

    Args:
        extents: outputs and inputs that are left of it.
    """
    ranks = [rank for rank in ranks if rank <= most_rank(*extents, layer.taps)]
    if not ranks:
        return {}
    whole, *pairs = problem.share.from_first(lambda: time_pairs(problem.network, layer, ranks, extents, problem.timing))
    return {rank: pair / whole for rank, pair in zip(ranks, pairs, strict=True) if pair < FASTER * whole}


def lowered_cuts(
    problem: Problem,
    layers: Sequence[Factorable],
    ranks: Mapping[str, Mapping[int, float]],
    options: LayerOptions,
    progress: Progress,
) -> tuple[list[Cut], dict[str, str]]:
    """Every layer at every rank of it, front to back, and path -> why a layer has none."""
    cuts: list[Cut] = []
    faults: dict[str, str] = {}
    for layer, moments in record_layers(problem, layers, progress).items():
        if isinstance(moments, str):
            faults[layer.path] = moments
            continue
        start = problem.program.frontier(changed_tensors(layer.consumer), problem.output_nodes)
        everything, outputs = torch.arange(layer.inputs), torch.arange(layer.outputs)
        for rank in ranks[layer.weight]:
            try:
                weights = cut_off(moments, everything, outputs, rank, options.ridge, problem.state)
            except LAYER_FAULTS as fault:
                faults[layer.path] = describe_fault(fault)
                break
            cuts.append(Cut(layer.weight, rank, weights, start))
    return [cut for cut in cuts if cut.name.rpartition(".")[0] not in faults], faults


def record_layers(
    problem: Problem, layers: Sequence[Factorable], progress: Progress
) -> dict[Factorable, LayerMoments | str]:
    """Moments of the layers' inputs in the original network, in one pass; a sentence where they are no good."""
    pairs = {layer: problem.recorders(layer.read, targets=False) for layer in layers}
    for which, stream in enumerate((problem.fitting, problem.held_back)):
        recorders = [pair[which] for pair in pairs.values()]
        progress.stage("recording layers for low rank", stream.count)
        record_moments(problem.program, recorders, stream.read, stream.sizes(), problem.state, advance=progress.advance)
    recorded: dict[Factorable, LayerMoments | str] = {}
    for layer in layers:
        try:
            moments = gather_moments(problem, layer.read, pairs.pop(layer))
            if moments.candidates is not None:
                raise SolverError("its moments need more memory than was allowed")
            recorded[layer] = moments
        except LAYER_FAULTS as fault:
            recorded[layer] = describe_fault(fault)
    return recorded


def describe_lowered(
    problem: Problem, lowerings: Lowerings, compressed: Compressed, widths: Mapping[str, int]
) -> tuple[LowRankLayer, ...]:
    """The layers that became two, as a report holds them: damages and times are measured again.

    Args:
        widths: group name -> units that stay.
    """
    layers = [layer for layer in problem.factorables.layers if layer.weight in compressed.ranks]
    known = {lowering.weight: lowering for lowering in lowerings.usable}
    uses = map_uses(problem.program)
    rows = []
    for layer, damage in zip(layers, measure_lowered(problem, layers, compressed), strict=True):
        rank, lowering = compressed.ranks[layer.weight], known[layer.weight]
        outputs, inputs = extents_left(layer, problem.groups, widths)
        times = time_pairs(problem.network, layer, [rank], (outputs, inputs), problem.timing)
        whole, pair = layer.outputs * layer.inputs * layer.taps, rank * (outputs + inputs * layer.taps)
        rows.append(
            LowRankLayer(
                name=layer.path,
                kind=describe_layer(problem.network.module.get_submodule(layer.path)),
                rank=rank,
                tried=tuple(map(Step, lowering.ranks, lowering.damages)),
                predicted_damage=lowering.damage(rank),
                measured_damage=damage,
                macs=Counts(round(uses[layer.weight] * whole), round(uses[layer.weight] * pair)),
                milliseconds=Measured(*times),
            )
        )
    return tuple(rows)


def measure_lowered(problem: Problem, layers: Sequence[Factorable], compressed: Compressed) -> list[float]:
    """What each layer's rank adds to the divergence of the compressed network's outputs, on held-back samples."""
    if not layers:
        return []
    outputs = problem.output_nodes
    cuts = [Cut("", 0, {}, problem.program.frontier((), outputs))]
    for layer in layers:
        start = problem.program.frontier(changed_tensors(layer.consumer), outputs)
        cuts.append(Cut(layer.weight, 0, compressed.wholes[layer.weight], start))
    now, *whole = measure_cuts(problem, cuts, samples=MOST_SAMPLES, base=compressed.state)
    return [now - each for each in whole]

"""What two layers of a low rank take beside the one that they stand for: timed one after another, as eager layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compress.checkpoint.execution import Execution
from compress.checkpoint.pairs import make_pair, resized, zeroed
from compress.compression.pricing.latency import Timing
from compress.graph.cost import measure_latency
from compress.units.groups import UnitGroup
from compress.units.low_rank import Factorable
from compress.units.network import Network

PASSES = 15  # of a layer
FASTER = 0.97  # of the layer's time, above which two layers are not taken for faster


def time_pairs(
    network: Network, layer: Factorable, ranks: Sequence[int], extents: tuple[int, int], timing: Timing
) -> tuple[float, ...]:
    """Milliseconds of a layer, and of two of each rank in its place: of the fastest pass.

    Args:
        extents: outputs and inputs that are left of it.
    """
    plain = resized(network.module.get_submodule(layer.path), *extents)
    pairs = [zeroed(make_pair(plain, rank)) for rank in ranks]
    first, *others = network.program.shape(layer.consumer.input)
    shape = [max(1, first * len(timing.inputs(network)[0]) // len(network.examples[0])), *others]
    shape[1 if layer.consumer.layout.spatial else -1] = extents[1]
    inputs = torch.zeros(shape, dtype=next(plain.parameters()).dtype, device=network.device)
    if layer.consumer.layout.spatial:
        inputs = timing.laid_out(inputs)
        for module in (plain, *pairs):
            Execution(channels_last=timing.channels_last).applied(module)
    with timing.running():
        times = measure_latency((plain, *pairs), (inputs,), most=PASSES)
    return tuple(each.least for each in times)


def extents_left(layer: Factorable, groups: Sequence[UnitGroup], widths: Mapping[str, int]) -> tuple[int, int]:
    """Outputs and inputs that are left of a layer at these widths."""
    left = [layer.outputs, layer.inputs]
    for group in groups:
        lost = group.unit_count - widths.get(group.name, group.unit_count)
        for part in group.slices:
            if part.name == layer.weight and part.dim < 2:
                left[part.dim] -= part.positions.shape[1] * lost
    return left[0], left[1]

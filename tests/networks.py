"""Tiny networks, one for each operation rule, and the check that all of them share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.groups import UnitGroup
from compress.units.surgery import narrow, verify_narrowed


class Function(nn.Module):
    """Named layers and a function of them and the input."""

    def __init__(self, forward: Callable[[nn.ModuleDict, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every floating-point tensor random (running variances positive), so that no unit is inert."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            value = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(value + 0.5 if name.endswith("running_var") or tensor.dim() < 2 else value - 0.5)
    return module.eval()


def analyse(module: nn.Module, inputs: tuple[Tensor, ...], *, couple: bool = False) -> dict[str, UnitGroup]:
    """Groups by name, each prunable subset verified: half of every group's units removed, in float64."""
    randomise(module.double())
    inputs = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    graph = trace_network(module, inputs)
    groups = find_units(graph, module, couple=couple)
    generator = torch.Generator().manual_seed(3)
    kept = {
        group.name: torch.randperm(group.unit_count, generator=generator)[: max(1, group.unit_count // 2)].sort().values
        for group in groups
        if group.skip_reason is None
    }
    if kept:
        narrowed = narrow(module, kept, groups)
        assert verify_narrowed(graph, module, kept, groups, narrowed, inputs) <= 1e-9
    return {group.name: group for group in groups}

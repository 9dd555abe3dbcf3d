"""Buffers that no state dict holds: cut with the units where they hold one value, a reason where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.checkpoint.restoring import restore_shapes
from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.surgery import module_outputs, narrow, verify_narrowed


class PartlyBiased(nn.Module):
    """Two projections of which the second one's bias is a constant, as keys have none in some attentions."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.both = nn.Linear(5, 16, bias=False)
        self.bias = nn.Parameter(torch.randn(8))
        self.register_buffer("constant", constant, persistent=False)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = functional.linear(x, self.both.weight, torch.cat((self.bias, self.constant))).chunk(2, dim=-1)
        return self.out(torch.relu(value) * gate)


def build(constant: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return PartlyBiased(constant).eval()


X = (torch.randn(4, 5, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_buffer_of_one_value_shrinks_with_the_units_and_follows_from_its_shape(value: float) -> None:
    module = build(torch.full((8,), value))
    graph = trace_network(module, X)
    (group, *_) = groups = find_units(graph, module)
    kept = {group.name: torch.tensor([0, 3, 5])}
    narrowed = narrow(module, kept, groups)
    assert verify_narrowed(graph, module, kept, groups, narrowed, X, dtype=torch.float64) <= 1e-9
    restored = restore_shapes(build(torch.full((8,), value)), narrowed.shapes, narrowed.attributes)
    restored.load_state_dict(narrowed.module.state_dict())
    assert "constant" not in narrowed.module.state_dict()
    assert torch.equal(module_outputs(restored, X)[0], module_outputs(narrowed.module, X)[0])


def test_a_buffer_of_different_values_holds_its_units_with_a_reason() -> None:
    module = build(torch.arange(8.0))
    groups = find_units(trace_network(module, X), module)
    assert not any(group.prunable for group in groups)
    assert "meets something that cannot be cut with it" in str(groups[0].skip_reason)

"""What operations are is read off the graph: weights and inputs of linear maps, batch norms with their own eps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.diagnostics.balance import input_norms
from compress.graph.meaning import batch_norms, linear_maps
from compress.graph.ops import Layout
from compress.graph.program import Program
from compress.graph.trace import trace_network
from compress.units.find import find_units


class Mixed(nn.Module):
    """A strided convolution, a transposed one, a linear map and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=0.25)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 6)
        self.mix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.norm(self.down(x)))
        return self.head(self.up(hidden).mean((2, 3))) @ self.mix


def test_linear_maps_name_their_tensors_and_count_their_uses() -> None:
    program = Program.of(trace_network(Mixed().eval(), (torch.randn(2, 3, 8, 8),)))
    found = {each.weight: each for each in linear_maps(program.network)}
    assert {name: (each.bias, each.layout) for name, each in found.items()} == {
        "down.weight": (None, Layout.CONVOLUTION),
        "up.weight": ("up.bias", Layout.CONVOLUTION_TRANSPOSED),
        "head.weight": ("head.bias", Layout.LINEAR),
        "mix": (None, Layout.LINEAR_TRANSPOSED),
    }
    assert {name: each.positions for name, each in found.items()} == {
        "down.weight": 2 * 16,
        "up.weight": 2 * 16,
        "head.weight": 2,
        "mix": 2,
    }


def test_a_unit_s_norm_takes_the_eps_of_its_own_batch_norm() -> None:
    module = Mixed().eval()
    network = trace_network(module, (torch.randn(2, 3, 8, 8),))
    (norm,) = batch_norms(network)
    assert (norm.scale, norm.variance, norm.eps) == ("norm.weight", "norm.running_var", 0.25)
    group = next(group for group in find_units(network, module) if group.name == "down")
    expected = module.down.weight.detach().double().flatten(1).norm(dim=1) / 1.25**0.5
    torch.testing.assert_close(input_norms(group, module.state_dict()), expected)

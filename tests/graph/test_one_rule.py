"""Adding an operation is one rule: an operation that the package has never seen is cut, counted, timed and refitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import compress
from compress.compression.pricing.costs import map_uses
from compress.graph.meaning import linear_maps
from compress.graph.ops import Layout, LinearMap
from compress.graph.program import Program
from compress.graph.rules import RULES
from compress.graph.rules.contraction import linear_rule, make_map
from compress.graph.trace import NetworkGraph, trace_network
from compress.recording.residuals import find_residual
from compress.units.find import find_units
from compress.units.scaling import find_scalings

ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("compress_tests::shifted_product", mutates_args=())
def shifted_product(shift: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    """x M + s, its arguments in an order that no operation of torch has."""
    return x @ matrix + shift


@shifted_product.register_fake
def _(shift: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], matrix.shape[1])


def read_shifted_product(network: NetworkGraph, node: fx.Node) -> LinearMap | None:
    shift, matrix, x = node.args
    return make_map(network, node, Layout.LINEAR_TRANSPOSED, x, matrix, shift)


class Shifted(nn.Module):
    """A layer made of the new operation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.shift = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return shifted_product(self.shift, self.matrix, x)


class Block(nn.Module):
    """h + b(relu(a(h))) with h = stem(x), then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(6, 6), Shifted(6, 16), Shifted(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        return self.head(hidden + self.b(self.a(hidden).relu()))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Block:
    for name, rule in linear_rule("shifted_product", meaning=read_shifted_product).items():
        monkeypatch.setitem(RULES, name, rule)
    torch.manual_seed(0)
    return Block().eval()


def test_without_its_rule_an_operation_pins_what_reaches_it() -> None:
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Shifted(16, 3)).eval()
    (group,) = find_units(trace_network(module, (ROWS[:2],)), module)
    assert group.skip_reason == "it reaches the operation shifted_product, which has no rule"


def test_one_rule_lets_its_units_be_cut_and_the_readers_refitted(network: Block) -> None:
    result = compress.prune(network, ROWS, keep=0.5)
    assert tuple(result.model.a.matrix.shape) == (6, 8)
    assert tuple(result.model.b.matrix.shape) == (8, 6)


def test_one_rule_gives_its_cost_its_latency_its_scaling_and_the_shortcut_behind_it(network: Block) -> None:
    graph = trace_network(network, (ROWS[:2],))
    program, (group,) = Program.of(graph), [g for g in find_units(graph, network) if g.prunable]
    assert map_uses(program) == {"stem.weight": 1, "a.matrix": 1, "b.matrix": 1, "head.weight": 1}
    first = linear_maps(graph)[1]
    half = network.a.matrix.detach()[:, :8]
    torch.testing.assert_close(first.apply(ROWS, half), ROWS @ half)  # what a latency is measured of
    scalings, _ = find_scalings(graph, [group], network.state_dict())
    assert [part.name for part in scalings[0].outputs] == ["b.matrix"]
    residual = find_residual(program, group.consumers[0])
    assert residual is not None
    assert residual.other == "linear"

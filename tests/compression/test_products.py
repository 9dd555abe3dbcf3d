"""Costs of products of two computed values: attention, adjacency, outer products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.compression.pricing.costs import CostModel, cost_model, find_products
from compress.compression.problem import Problem
from compress.graph.cost import count_macs, count_products
from compress.units.surgery import narrow
from tests.compression.test_schedule import make_problem
from tests.strange_networks import Vit


class Graph(nn.Module):
    """Features of nodes, mixed along an adjacency that is computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, nodes: Tensor) -> Tensor:
        near = torch.softmax(nodes @ nodes.mT, -1)
        hidden = torch.relu(near @ self.first(nodes))
        return self.head(torch.relu(near @ self.second(hidden)))  # type: ignore[no-any-return]


class Outer(nn.Module):
    """The products of every two features."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(6, 10), nn.Linear(80, 3)

    def forward(self, rows: Tensor) -> Tensor:
        left, right = torch.relu(self.left(rows)), torch.relu(self.right(rows))
        return self.head((left.mT @ right).flatten(1))  # type: ignore[no-any-return]


class Windows(nn.Module):
    """A hidden layer on windows that lie side by side among the samples, and one on tokens in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 20), nn.Linear(20, 6)
        self.third, self.head = nn.Linear(6, 14), nn.Linear(14, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        windows = tokens.reshape(-1, 4, 6)
        windows = windows + self.second(torch.relu(self.first(windows)))
        ahead = windows.reshape(-1, 12, 6).transpose(0, 1)  # (tokens, samples, channels)
        return self.head(torch.relu(self.third(ahead)).mean(0))  # type: ignore[no-any-return]


NETWORKS = {
    "graph": (Graph, (9, 7)),
    "outer": (Outer, (11, 6)),
    "attention": (Vit, (3, 8, 8)),
    "windows": (Windows, (12, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cost_of_a_narrower_network_is_told_before_it_is_built(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    module = make().eval()
    problem = make_problem(module, *shape)
    model = priced(module, problem)
    assert bool(model.products) == (name != "windows")
    assert model.original("macs") == pytest.approx(problem.forward_macs)
    for share in (0.75, 0.5, 0.25):
        widths = {group.name: max(1, round(share * group.unit_count)) for group in problem.groups}
        kept = {group.name: torch.arange(widths[group.name]) for group in problem.groups}
        smaller = narrow(module, kept, problem.groups).module
        assert model.macs(widths) == pytest.approx(count_macs(smaller, problem.network.examples), rel=1e-6)
    group = problem.groups[0].name
    less = {**widths, group: widths[group] - 1}
    assert model.slope("macs", widths, group) == pytest.approx(model.macs(widths) - model.macs(less))
    assert model.slope("params", widths, group) == pytest.approx(model.parameters(widths) - model.parameters(less))


def priced(module: nn.Module, problem: Problem) -> CostModel:
    """The cost model of a problem's network."""
    found = find_products(module, problem.network.examples, problem.groups, problem.forward_macs)
    parameters = dict(module.named_parameters())
    return cost_model(problem.program, problem.groups, parameters, problem.forward_macs, products=found)


class Particular(Graph):
    """One that does not run at half of a width."""

    def forward(self, nodes: Tensor) -> Tensor:
        assert self.first.out_features != 6, "half of 12"
        return super().forward(nodes)


def test_a_group_without_which_the_network_does_not_run_at_half_takes_nothing_off() -> None:
    module = Particular().eval()
    problem = make_problem(module, 9, 7)
    depends = {name for product in priced(module, problem).products for name in product.shares}
    assert depends == {"second"}


def test_products_with_a_tensor_of_the_network_are_no_products_of_computed_values() -> None:
    chain = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2)).eval()
    assert count_products(chain, (torch.randn(2, 6),)) == []
    assert find_products(chain, (torch.randn(2, 6),), (), 100) == ()


def test_a_budget_is_used_up_where_products_shrink_with_the_layers() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(50, 9, 7) for _ in range(6)]
    cost = compress.prune(Graph().eval(), batches, macs=0.5, recover="off").report.cost
    assert 0.45 < cost.macs.after / cost.macs.before <= 0.5

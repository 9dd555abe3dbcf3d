"""Units that a layer reads paired with one another, as in bilinear pooling: no column is one unit's alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.surgery import narrow, verify_narrowed


class Bilinear(nn.Module):
    """A linear layer over all products of two hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.pairs, self.head = nn.Linear(6, 8), nn.Linear(64, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x).relu()
        x = self.pairs((x[:, :, None] * x[:, None]).flatten(1)).relu()
        return self.head(x)


class ShuffledBlock(nn.Module):
    """ShuffleNet's first block: groups of channels exchanged between two grouped convolutions, with a shortcut."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.stem = nn.Conv2d(3, groups * groups, 1)
        self.first = nn.Conv2d(groups * groups, groups * groups, 1, groups=groups)
        self.second = nn.Conv2d(groups * groups, groups * groups, 1, groups=groups)
        self.head = nn.Conv2d(groups * groups, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.first(x).relu().unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return self.head((x + self.second(y)).relu())


def test_units_that_share_columns_are_left_with_the_reason() -> None:
    module = Bilinear().eval()
    graph = trace_network(module, (torch.randn(2, 6),))
    reasons = {group.name: group.skip_reason for group in find_units(graph, module)}
    assert reasons["hidden"] == "pairs reads its units paired with one another, so that none goes alone"
    assert reasons["pairs"] is None


def test_shuffled_groups_are_cut_in_the_view_that_gives_every_unit_its_columns() -> None:
    torch.manual_seed(0)
    module, x = ShuffledBlock().eval(), torch.randn(2, 3, 4, 4)
    graph = trace_network(module, (x,))
    (group,) = [group for group in find_units(graph, module, couple=True) if group.prunable]
    for consumer in group.consumers:
        assert len(consumer.positions.unique()) == consumer.positions.numel()
    kept = {group.name: torch.arange(group.unit_count // 2)}
    narrowed = narrow(module, kept, (group,))
    assert verify_narrowed(graph, module, kept, (group,), narrowed, (x,), dtype=torch.float64) <= 1e-9

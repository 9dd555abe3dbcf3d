"""Channels that are shuffled and halved again and again: cut in ties that keep the halves equal, or a clear reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.surgery import narrow, verify_narrowed


class Shuffled(nn.Module):
    """Two blocks that pass one half of the channels and map the other, then shuffle both, as in ShuffleNet v2."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * half, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(half, half, 1), nn.ReLU()) for _ in range(2))
        self.head = nn.Conv2d(2 * half, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            passed, mapped = x.chunk(2, dim=1)
            both = torch.cat((passed, block(mapped)), dim=1)
            batch, channels, height, width = both.shape
            x = both.view(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)
        return self.head(x)


X = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),)


def test_shuffled_halves_that_can_be_halved_again_are_cut_exactly() -> None:
    torch.manual_seed(0)
    module = Shuffled(8).eval()
    graph = trace_network(module, X)
    (group,) = [group for group in find_units(graph, module, couple=True) if group.prunable]
    kept = {group.name: torch.arange(group.unit_count // 2)}
    narrowed = narrow(module, kept, (group,))
    assert verify_narrowed(graph, module, kept, (group,), narrowed, X, dtype=torch.float64) <= 1e-9
    assert narrowed.module.blocks[0][0].weight.shape[0] == 4


def test_halves_of_odd_width_are_left_with_a_reason_that_says_what_halves_them() -> None:
    module = Shuffled(5).eval()
    groups = find_units(trace_network(module, X), module, couple=True)
    assert not any(group.prunable for group in groups)
    assert any(
        "taken in equal parts by chunk: no cut of these tied channels leaves equal parts" in str(group.skip_reason)
        for group in groups
    )

"""Groups that only work when the same share of each goes: found as one group, not as several that pass by accident."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.surgery import narrow, verify_narrowed


class Attention(nn.Module):
    """Heads whose joint width is read off the input's; the projection is called as a module or as a function."""

    def __init__(self, functional_call: bool) -> None:
        super().__init__()
        self.num_heads, self.functional_call = 4, functional_call
        self.qkv = nn.Linear(24, 72, bias=False)
        self.proj = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        made = functional.linear(x, self.qkv.weight) if self.functional_call else self.qkv(x)
        query, key, value = made.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        read = functional.scaled_dot_product_attention(query, key, value, scale=0.4)
        return self.proj(read.transpose(1, 2).reshape(batch, tokens, width))


class Residual(nn.Module):
    """A stream of 24 channels with one attention."""

    def __init__(self, functional_call: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 24)
        self.attention = Attention(functional_call)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.attention(x))


X = (torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("functional_call", [False, True])
def test_heads_whose_width_is_the_streams_are_one_group_with_it(functional_call: bool) -> None:
    torch.manual_seed(0)
    module = Residual(functional_call).eval()
    graph = trace_network(module, X)
    groups = [group for group in find_units(graph, module, couple=True) if group.prunable]
    assert [group.unit_count for group in groups] == [4]
    for kept in ([1], [0, 2], [0, 1, 3]):
        narrowed = narrow(module, {groups[0].name: torch.tensor(kept)}, groups)
        names = {groups[0].name: torch.tensor(kept)}
        assert verify_narrowed(graph, module, names, groups, narrowed, X, dtype=torch.float64) <= 1e-9

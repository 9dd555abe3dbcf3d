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


class Cross(nn.Module):
    """The first token asks all: keys and values are layers of their own, whose heads and widths are two views."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.query, self.key, self.value, self.proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query = self.query(x[:, :1]).reshape(batch, 1, self.num_heads, width // self.num_heads).transpose(1, 2)
        key, value = (
            layer(x).reshape(batch, tokens, self.num_heads, width // self.num_heads).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        read = (query @ key.transpose(-2, -1)).softmax(-1) @ value
        return x[:, :1] + self.proj(read.transpose(1, 2).reshape(batch, 1, width))


class Deepened(nn.Module):
    """Channels that a depthwise convolution makes two of each, so that the stream is halves and wholes."""

    def __init__(self) -> None:
        super().__init__()
        self.deepen = nn.Conv1d(12, 24, 1, groups=12)
        self.attention = Attention(functional_call=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deepen(x.transpose(1, 2)).transpose(1, 2)
        return x + self.attention(x)


@pytest.mark.parametrize(("stem", "middle"), [(24, Cross), (12, Deepened)])
def test_a_tie_takes_one_of_several_views_of_a_layer(stem: int, middle: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, stem), middle(), nn.Linear(24, 3)).eval()
    graph = trace_network(module, X)
    groups = [group for group in find_units(graph, module, couple=True) if group.prunable]
    assert [group.unit_count for group in groups] == [4]
    kept = {groups[0].name: torch.tensor([0, 3])}
    narrowed = narrow(module, kept, groups)
    assert verify_narrowed(graph, module, kept, groups, narrowed, X, dtype=torch.float64) <= 1e-9

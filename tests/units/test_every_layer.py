"""Every layer with a weight matrix is in a group of units, or skipped with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.compression.problem import select_groups
from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.surgery import narrow, verify_narrowed
from tests.safety.network_cases import design
from tests.test_strange_networks import SHAPES, TOKENS, build


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)


class SharedHeads(nn.Module):
    """A causal language model whose blocks all read one number of heads."""

    def __init__(self, blocks: int, size: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.head = nn.Embedding(50, size), nn.Linear(size, 50)
        self.layers = nn.ModuleList([Block(size) for _ in range(blocks)])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embed(tokens)
        batch, count, _ = hidden.shape
        for layer in self.layers:
            parts = layer.qkv(layer.norm(hidden)).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            found = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
            hidden = hidden + layer.proj(found.transpose(1, 2).reshape(batch, count, -1))
            hidden = hidden + layer.down(functional.gelu(layer.up(hidden)))
        scores: Tensor = self.head(hidden)
        return scores


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_heads_that_all_blocks_share_are_cut_in_all_whatever_the_example(blocks: int, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, inputs = SharedHeads(blocks).eval(), torch.randint(0, 50, (2, 9))
    groups = find_units(trace_network(module, (inputs,)), module)
    together = tuple(f"layers.{number}.qkv" for number in range(blocks))
    assert [group.producers for group in groups if group.prunable and "qkv" in group.name] == [together]
    for name in together:
        assert [group.name for group in select_groups(groups, [name], [])] == ["layers.0.qkv"]


class Attention(nn.Module):
    """Three heads over twelve features."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = 3, nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, _ = tokens.shape
        parts = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        mixed: Tensor = self.proj(seen.transpose(1, 2).reshape(batch, count, -1))
        return mixed


class Turning(nn.Module):
    """Tokens that are moved on by as many places as there are heads, with little effect."""

    def __init__(self) -> None:
        super().__init__()
        self.turn_size, self.attention, self.head = 3, Attention(), nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = tokens + self.attention(tokens)
        scores: Tensor = self.head(hidden + 1e-4 * torch.roll(hidden, self.turn_size, 1))
        return scores


def test_a_number_that_only_equals_a_count_stays_as_it_is() -> None:
    torch.manual_seed(0)
    module = Turning().eval()
    (group,) = [
        group
        for group in find_units(trace_network(module, (torch.randn(2, 8, 12),)), module)
        if group.prunable and group.name == "attention.qkv"
    ]
    changed = {rule.path for rule in group.attributes}
    assert "attention.heads" in changed
    assert "turn_size" not in changed


class TerseAttention(nn.Module):
    """Query heads that share keys and values, with their sizes under letters; as many numbers go another way."""

    def __init__(self, h: int, g: int, d: int) -> None:
        super().__init__()
        self.h, self.g, self.d, self.r = h, g, d, h
        self.q, self.k, self.v = nn.Linear(12, h * d), nn.Linear(12, g * d), nn.Linear(12, g * d)
        self.o = nn.Linear(h * d, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, _ = tokens.shape
        query = self.q(torch.roll(tokens, self.r, 1)).view(batch, count, self.h, self.d).transpose(1, 2)
        key, value = (layer(tokens).view(batch, count, self.g, self.d).transpose(1, 2) for layer in (self.k, self.v))
        key, value = (part.repeat_interleave(self.h // self.g, 1) for part in (key, value))
        seen = functional.scaled_dot_product_attention(query, key, value)
        mixed: Tensor = self.o(seen.transpose(1, 2).reshape(batch, count, -1))
        return mixed


@pytest.mark.parametrize(("sizes", "followed"), [((4, 2, 3), {"h", "g"}), ((3, 3, 3), {"h", "g"})])
def test_sizes_under_names_that_do_not_say_so_follow_their_units(
    sizes: tuple[int, int, int], followed: set[str]
) -> None:
    torch.manual_seed(0)
    module, inputs = TerseAttention(*sizes).eval(), (torch.randn(2, 7, 12),)
    graph = trace_network(module, inputs)
    groups = find_units(graph, module)
    (heads,) = [group for group in groups if group.prunable]
    assert heads.unit_count == sizes[1]
    assert {rule.name for rule in heads.attributes if rule.module == ""} == followed
    kept = {heads.name: torch.arange(1)}
    assert verify_narrowed(graph, module, kept, groups, narrow(module, kept, groups), inputs) <= 1e-5


class Blur(nn.Module):
    """A fixed filter for every channel, whose number is its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("filter", torch.ones(channels, 1, 2, 2) / 4, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.filter, stride=2, groups=self.channels)  # type: ignore[arg-type]


class Sharp(nn.Module):
    """Makes very much of rounding, and views its channels by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.first, self.second = 512, nn.Linear(8, 2048), nn.Linear(2048, 5)

    def forward(self, x: Tensor) -> Tensor:
        grouped = self.first(x).reshape(*x.shape[:3], self.groups, 4).relu()
        return torch.sin(1e4 * self.second(grouped.flatten(3)))


@pytest.mark.parametrize(
    ("module", "units"),
    [(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Blur(8), nn.Conv2d(8, 5, 1)), 8), (Sharp(), 512)],
)
def test_sizes_are_followed_whatever_is_grouped_and_whatever_becomes_of_rounding(module: nn.Module, units: int) -> None:
    graph = trace_network(module.eval(), (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))
    assert [group.unit_count for group in find_units(graph, module) if group.prunable] == [units]


def unlisted(module: nn.Module, inputs: Tensor) -> list[str]:
    """Names of layers with a weight matrix that no group makes or cuts along."""
    groups = find_units(trace_network(module, (inputs,)), module)
    assert len({group.name for group in groups}) == len(groups)
    listed = {producer for group in groups for producer in group.producers}
    along = {part.name for group in groups for part in group.slices if part.dim == 0}
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
        and layer.weight.ndim > 1
        and name not in listed
        and f"{name}.weight" not in along
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_strange_networks_leave_no_layer_out(name: str) -> None:
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (2, *shape), generator=generator)
    assert unlisted(build(name), tokens if shape is TOKENS else torch.randn(2, *shape, generator=generator)) == []


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_leave_no_layer_out(seed: int) -> None:
    module, shape, kind = design(seed)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (2, *shape), generator=generator)
    assert unlisted(module, tokens if kind == "tokens" else torch.randn(2, *shape, generator=generator)) == []


def test_a_layer_that_forward_does_not_use_is_said_to_be_unused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.last = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(6, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            scores: Tensor = self.last(torch.relu(self.used(inputs)))
            return scores

    module = Idle().eval()
    groups = find_units(trace_network(module, (torch.ones(2, 4),)), module)
    assert {group.name: group.skip_reason for group in groups} == {
        "used": None,
        "idle": "forward() does not use it",
        "last": "it has a single unit",
    }

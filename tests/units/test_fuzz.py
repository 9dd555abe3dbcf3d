"""Random networks from the operation rules: narrowing equals masking on every one of them.

COMPRESS_FUZZ=N draws N networks instead of the few of an ordinary run.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.networks import analyse

STEPS = (
    *(
        "conv",
        "relu",
        "gelu",
        "batch_norm",
        "group_norm",
        "depthwise",
        "grouped",
        "residual",
        "dense",
        "gate",
        "shuffle",
    ),
    *("halves", "glu", "pool", "tokens", "squeeze", "interleave", "attention"),
)


class Program(nn.Module):
    """Layers drawn from a list of step names, on images (B, 3, 4, 4), ending in a linear head."""

    def __init__(self, steps: list[str], width: int) -> None:
        super().__init__()
        self.steps, self.parts = steps, nn.ModuleList()
        channels = width
        self.stem = nn.Conv2d(3, channels, 1)
        for step in steps:
            layers, channels = self._layers(step, channels)
            self.parts.append(nn.ModuleList(layers))
        self.head = nn.Linear(channels, 3)

    def _layers(self, step: str, c: int) -> tuple[list[nn.Module], int]:
        half = c // 2
        table: dict[str, tuple[list[nn.Module], int]] = {
            "conv": ([nn.Conv2d(c, 8, 3, padding=1)], 8),
            "batch_norm": ([nn.BatchNorm2d(c)], c),
            "group_norm": ([nn.GroupNorm(2, c)], c),
            "depthwise": ([nn.Conv2d(c, c, 3, padding=1, groups=c)], c),
            "grouped": ([nn.Conv2d(c, 2 * c, 1, groups=2)], 2 * c),
            "residual": ([nn.Conv2d(c, 6, 1), nn.Conv2d(6, c, 1)], c),
            "dense": ([nn.Conv2d(c, 4, 1)], c + 4),
            "gate": ([nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)], c),
            "halves": ([nn.Conv2d(half, half, 1)], c),
            "glu": ([nn.Conv2d(c, 8, 1)], 4),
            "tokens": ([nn.Linear(c, 6), nn.Linear(6, c)], c),
            "squeeze": ([nn.LayerNorm(c)], c),
            "interleave": ([nn.Conv2d(c, c, 1)], 2 * c),
            "attention": ([nn.Linear(c, 12), nn.Linear(4, c)], c),
        }
        return table.get(step, ([], c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step, part in zip(self.steps, self.parts, strict=True):
            x = self._run(step, list(part), x)
        return self.head(x.mean((2, 3)))

    def _run(self, step: str, part: list[nn.Module], x: Tensor) -> Tensor:
        if step in ("relu", "gelu"):
            return getattr(functional, step)(x)
        if step == "residual":
            return x + part[1](functional.relu(part[0](x)))
        if step == "dense":
            return torch.cat([x, part[0](x).relu()], 1)
        if step == "gate":
            return x * part[1](part[0](x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        if step == "shuffle":
            return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        if step == "halves":
            a, b = x.chunk(2, 1)
            return torch.cat([a, part[0](b)], 1)
        if step == "glu":
            a, b = part[0](x).chunk(2, 1)
            return a * b.sigmoid()
        if step == "pool":
            return functional.max_pool2d(x, 3, 1, 1)
        if step == "tokens":
            y = x.flatten(2).transpose(1, 2)
            return part[1](functional.silu(part[0](y))).transpose(1, 2).unflatten(2, (4, 4))
        if step == "squeeze":
            return part[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if step == "interleave":
            return torch.stack([x, part[0](x)], 2).flatten(1, 2)
        if step == "attention":
            y = x.flatten(2).transpose(1, 2)
            q, k, v = part[0](y).unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4).unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return part[1](y).transpose(1, 2).unflatten(2, (4, 4))
        for layer in part:
            x = layer(x)
        return x


@settings(
    max_examples=int(os.environ.get("COMPRESS_FUZZ", "12")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=5),
    width=st.sampled_from([4, 8]),
    couple=st.booleans(),
)
def test_narrowing_equals_masking_on_random_networks(steps: list[str], width: int, couple: bool) -> None:
    inputs = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),)
    groups = analyse(Program(steps, width), inputs, couple=couple)
    assert "head" in groups

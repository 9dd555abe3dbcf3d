"""Networks that are called with keywords, dictionaries and nested tuples, on a flat tuple of tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.data.calls import CallShape, gather, spread
from compress.graph.trace import trace_network


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, pair: dict[str, Tensor], *, scale: float, mask: Tensor) -> Tensor:
        found: Tensor = (self.first(pair["a"]) + self.second(pair["b"])) * scale * mask
        return found


@pytest.fixture
def arguments() -> tuple[tuple[dict[str, Tensor]], dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    a, b, mask = (torch.randn(2, size, generator=generator) for size in (3, 5, 4))
    return ({"a": a, "b": b},), {"scale": 0.5, "mask": mask}


def test_a_spread_network_gives_what_the_nested_call_gives(arguments) -> None:  # type: ignore[no-untyped-def]
    args, keywords = arguments
    module = Nested().eval()
    wanted = module(*args, **keywords)
    shape, tensors = CallShape.of(args, keywords)
    assert [tuple(each.shape) for each in tensors] == [(2, 3), (2, 5), (2, 4)]
    names = list(module.state_dict())
    copied = copy.deepcopy(spread(module, shape))
    assert list(copied.state_dict()) == names
    torch.testing.assert_close(copied(*tensors), wanted)
    assert type(gather(copied)) is Nested
    torch.testing.assert_close(copied(*args, **keywords), wanted)


def test_a_spread_network_is_traced_with_one_input_a_tensor(arguments) -> None:  # type: ignore[no-untyped-def]
    args, keywords = arguments
    shape, tensors = CallShape.of(args, keywords)
    graph = trace_network(spread(Nested().eval(), shape), tensors)
    assert len(graph.inputs) == 3


def test_a_plain_call_changes_no_class() -> None:
    module = nn.Linear(3, 2)
    shape, tensors = CallShape.of((torch.zeros(1, 3),), {})
    assert shape.is_plain
    assert type(spread(module, shape)) is nn.Linear
    with pytest.raises(ValueError, match="takes 1 tensors, got 2"):
        shape.arguments((*tensors, *tensors))

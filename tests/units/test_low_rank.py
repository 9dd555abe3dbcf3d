"""Which layers two layers of a low rank can stand for, and what the network computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.pairs import most_rank
from compress.checkpoint.removed import remove_modules
from compress.checkpoint.restoring import restore_shapes
from compress.errors import SurgeryError
from compress.preparation import trace
from compress.units.low_rank import Factorables, factored, find_factorable
from compress.units.surgery import narrow
from tests.networks import Function, randomise


def found(module: nn.Module, *shape: int) -> Factorables:
    randomise(module)
    network = trace(module, (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),), couple=False)
    return find_factorable(network, [group for group in network.groups if group.prunable])


def chain(*layers: nn.Module) -> nn.Module:
    return Function(lambda parts, x: parts["end"](parts["body"](x)), body=nn.Sequential(*layers), end=nn.Linear(12, 9))


def reading_its_weight(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    return parts["end"](x.to(parts["end"].weight.dtype))  # type: ignore[no-any-return]


def beside_its_forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    return nn.functional.linear(x, parts["end"].weight, parts["end"].bias)


def twice(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    return parts["end"](parts["end"](x))  # type: ignore[no-any-return]


def and_its_norm(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    return parts["end"](x) * parts["end"].weight.norm()  # type: ignore[no-any-return]


class Own(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("forward", "layer", "said"),
    [
        (reading_its_weight, nn.Linear(12, 12), "without its weight"),
        (beside_its_forward, nn.Linear(12, 12), "outside its own forward"),
        (twice, nn.Linear(12, 12), "shared"),
        (and_its_norm, nn.Linear(12, 12), "read elsewhere"),
        (lambda parts, x: parts["end"](x), Own(12, 12), "Own is no plain"),
        (lambda parts, x: parts["end"](x[..., None]), nn.Conv1d(12, 12, 1, groups=2), "in groups"),
        (lambda parts, x: parts["end"](x), nn.Linear(12, 1), "no two layers multiply less"),
    ],
)
def test_what_else_reads_a_weight_keeps_it(forward: Callable[..., Tensor], layer: nn.Module, said: str) -> None:
    factorables = found(Function(forward, end=layer), 12)
    assert not factorables.layers
    (reason,) = factorables.refused.values()
    assert said in reason


def test_a_hook_keeps_a_layer() -> None:
    module = Function(lambda parts, x: parts["end"](x), end=nn.Linear(12, 12))
    module.layers["end"].register_forward_hook(lambda *_: None)
    assert found(module, 12).refused == {"layers.end": "it has hooks"}


def test_attention_of_torch_keeps_its_projections() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    factorables = found(Function(lambda parts, x: parts["end"](x, x, x)[0], end=attention), 5, 8)
    assert not factorables.layers
    assert set(factorables.refused) == {"layers.end", "layers.end.out_proj"}


def test_layers_whose_channels_can_all_be_cut_are_left_to_that() -> None:
    factorables = found(nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 7)), 9)
    assert [layer.path for layer in factorables.layers] == ["0", "4"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 10), (12,)),
        (nn.Linear(12, 10, bias=False), (5, 12)),
        (nn.Conv1d(6, 8, 3, padding=1), (6, 9)),
        (nn.Conv2d(6, 8, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1), bias=False), (6, 11, 12)),
        (nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), (6, 7, 7)),
        (nn.Conv3d(4, 5, 2), (4, 4, 4, 4)),
    ],
)
def test_two_layers_compute_the_low_rank_weight_put_in_place_as_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    module = Function(lambda parts, x: parts["end"](x), end=layer)
    (factorable,) = found(module, *shape).layers
    rank = factorable.most
    weight = module.layers["end"].weight
    with torch.no_grad():
        left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
        weight.copy_(((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(weight.shape))
    pair = factored(narrow(module, {}, ()), {"layers.end": rank})
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(pair.module(inputs), module(inputs), atol=1e-5)
    assert [type(part) for part in pair.module.layers["end"]] == [type(layer)] * 2
    before = sum(each.numel() for each in module.parameters())
    assert sum(each.numel() for each in pair.module.parameters()) < before
    fresh = copy.deepcopy(module)
    remove_modules(fresh, pair.removed, {})
    restore_shapes(fresh, pair.shapes, pair.attributes).load_state_dict(pair.module.state_dict())
    assert torch.equal(fresh(inputs), pair.module(inputs))


def test_the_largest_rank_is_the_last_that_multiplies_less() -> None:
    for outputs, inputs, taps in ((16, 16, 9), (10, 10, 1), (3, 64, 1), (1, 5, 9)):
        most = most_rank(outputs, inputs, taps)
        costs = [rank * (outputs + inputs * taps) < outputs * inputs * taps for rank in range(most + 2)]
        assert costs == [True] * (most + 1) + [False]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"layers.end": {"rank": 9}}, "rank from 1 to 8, got 9"),
        ({"layers.end": {"rank": 0}}, "rank from 1 to 8, got 0"),
        ({"layers": {"rank": 2}}, "no two layers can stand"),
        ({"nowhere": {"rank": 2}}, "no module `nowhere`"),
        ({"": {"rank": 2}}, "whole network"),
    ],
)
def test_a_forged_rank_is_refused(entry: dict[str, dict[str, int]], said: str) -> None:
    module = Function(lambda parts, x: parts["end"](x), end=nn.Linear(18, 17))
    with pytest.raises(SurgeryError, match=said):
        remove_modules(module, entry, {})

"""Chains of convolutions and linear layers under unknown names: read off their shapes, offered, never guessed."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.checkpoint.architecture import open_architecture
from compress.checkpoint.reading.read import Checkpoint, load_checkpoint
from compress.errors import CompressError, UnknownArchitectureError
from compress.models.plain import PlainChain, read_layers
from compress.preparation import build_network

VGG = nn.Sequential(
    nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.Tanh(), nn.MaxPool2d(2),
    nn.Conv2d(5, 7, 3, padding=1), nn.Tanh(), nn.Conv2d(7, 6, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(6 * 9, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 4),
)  # fmt: skip
MLP = nn.Sequential(
    OrderedDict(eins=nn.Linear(12, 9), a=nn.ReLU(), zwei=nn.Linear(9, 9), b=nn.ReLU(), drei=nn.Linear(9, 3))
)


def saved(module: nn.Module, path: Path) -> Checkpoint:
    """The module's state dict, read back."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    torch.save(module.state_dict(), path)
    return load_checkpoint(path)


def test_a_chain_of_linear_layers_gives_what_its_own_class_gives(tmp_path: Path) -> None:
    checkpoint, found = open_architecture(saved(MLP, tmp_path / "net.pt"), "chain:relu")
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build_network(checkpoint, found)(inputs), MLP.eval()(inputs))
    assert found.input_shape == (12,)


def test_a_chain_with_convolutions_takes_pools_and_padding_from_the_user(tmp_path: Path) -> None:
    read = saved(VGG, tmp_path / "net.pt")
    checkpoint, found = open_architecture(read, "chain:tanh", {"pool": [1, 3], "padding": 1})
    images = torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(build_network(checkpoint, found)(images), VGG.eval()(images), atol=1e-6)
    assert found.input_shape == (2, 12, 12)
    with pytest.raises(CompressError, match="does not say where"):
        open_architecture(read, "chain:tanh")


def test_a_chain_is_offered_with_what_was_read(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitectureError, match=r"eins 12→9, zwei 9→9, drei 9→3.*--arch chain:relu"):
        open_architecture(saved(MLP, tmp_path / "net.pt"))
    with pytest.raises(UnknownArchitectureError, match=r"0 3×3 2→5, .*pool=\["):
        open_architecture(saved(VGG, tmp_path / "vgg.pt"))


def test_widths_that_allow_one_order_tell_it_where_neither_file_nor_names_do(tmp_path: Path) -> None:
    layers = OrderedDict(first=nn.Linear(12, 9), second=nn.Linear(9, 9), hidden=nn.Linear(9, 7), last=nn.Linear(7, 3))
    save_file(nn.Sequential(layers).state_dict(), tmp_path / "net.safetensors")
    _, found = open_architecture(load_checkpoint(tmp_path / "net.safetensors"), "chain:relu")
    assert [layer[0] for layer in found.arguments["layers"]] == list(layers)
    layers["third"] = nn.Linear(9, 9)
    save_file(nn.Sequential(layers).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(UnknownArchitectureError, match="no plain chain"):
        open_architecture(load_checkpoint(tmp_path / "net.safetensors"), "chain:relu")


def test_names_are_ordered_by_number_where_a_file_has_no_order(tmp_path: Path) -> None:
    module = nn.Sequential(*[nn.Linear(6, 6) for _ in range(11)], nn.Linear(6, 2))
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    _, found = open_architecture(load_checkpoint(tmp_path / "net.safetensors"), "chain:relu")
    assert [layer[0] for layer in found.arguments["layers"]] == [str(number) for number in range(12)]


@pytest.mark.parametrize(
    "shapes",
    [
        {"a.weight": (4, 3)},
        {"a.weight": (4, 3), "b.weight": (2, 5)},
        {"a.weight": (4, 3), "a.bias": (5,), "b.weight": (2, 4)},
        {"a.weight": (4, 3, 3, 3), "b.weight": (2, 21)},
        {"a.weight": (4, 3), "b.weight": (5, 4, 3, 3)},
        {"a.weight": (4, 3), "n.weight": (4,), "b.weight": (2, 4)},
        {"a.weight": (4, 3, 3), "b.weight": (2, 4)},
        {"weight": (4, 3), "b.weight": (2, 4)},
        {"a.weight": (4, 3), "a.b.weight": (2, 4), "c": (1,)},
    ],
)
def test_what_is_no_plain_chain_is_not_read_as_one(shapes: dict[str, tuple[int, ...]]) -> None:
    assert read_layers(shapes) is None


@pytest.mark.parametrize(
    "layers",
    [
        [], "x", [["a"]], [["a", "linear", 2, 3]], [["a", "linear", 2, -3, True]], [["a", "linear", 2, 3, 1]],
        [["__init__.x", "pool", 2, 3, True]], [["../a", "linear", 2, 3, True]], [["forward", "linear", 2, 3, True]],
        [["a", "linear", 2, 3, True], ["a", "linear", 2, 2, True]],
        [["a", "linear", 2, 3, True], ["a.b", "linear", 2, 2, True]], [["a", "linear", 1 << 40, 3, True]],
    ],
)  # fmt: skip
def test_layers_that_a_file_describes_wrongly_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"layer"):
        PlainChain(layers, "relu")

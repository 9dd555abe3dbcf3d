"""State dicts in others' conventions: Lightning, averages, students and teachers; what is said of near misses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.checkpoint.architecture import open_architecture
from compress.checkpoint.building.builders import build_architecture
from compress.checkpoint.reading.read import Checkpoint, load_checkpoint
from compress.errors import CheckpointError, UnknownArchitectureError, UnsupportedError

DIGITS = build_architecture("compress:digits_net", {}).state_dict()


def saved(content: Any, path: Path) -> Checkpoint:
    """A file with that content, read."""
    torch.save(content, path)
    return load_checkpoint(path)


def under(prefix: str, state: dict[str, Tensor] = DIGITS) -> dict[str, Tensor]:
    """The state with a prefix."""
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize("arch", [None, "compress:digits_net"])
@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "_forward_module.model."])
def test_a_common_prefix_is_stripped_where_that_makes_it_fit(prefix: str, arch: str | None, tmp_path: Path) -> None:
    content = {"state_dict": {**under(prefix), "criterion.weight": torch.ones(10)}, "epoch": 3}
    checkpoint, found = open_architecture(saved(content, tmp_path / "last.ckpt"), arch)
    assert found.spec == "compress:digits_net"
    assert checkpoint.state.keys() == DIGITS.keys()
    assert checkpoint.prefix == prefix
    assert "1 tensors outside" in checkpoint.ignored[-1]


def test_an_average_is_taken_before_the_network_that_was_averaged(tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in DIGITS.items()}
    content = {**under("online_model."), **under("ema_model.", average)}
    checkpoint, _ = open_architecture(saved(content, tmp_path / "net.pt"))
    assert torch.equal(checkpoint.state["classifier.4.bias"], DIGITS["classifier.4.bias"] + 1)


def test_a_network_that_is_there_twice_is_asked_for(tmp_path: Path) -> None:
    content = {**under("student."), **under("teacher.", {name: value + 1 for name, value in DIGITS.items()})}
    read = saved(content, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="--state-key student"):
        open_architecture(read)
    chosen = load_checkpoint(tmp_path / "net.pt", state_key="teacher")
    assert torch.equal(chosen.state["classifier.4.bias"], DIGITS["classifier.4.bias"] + 1)


def test_hyper_parameters_are_offered(tmp_path: Path) -> None:
    content = {"state_dict": {"rnn.weight_ih_l0": torch.ones(4, 3)}, "hyper_parameters": {"hidden": 64, "rate": 0.1}}
    read = saved(content, tmp_path / "net.ckpt")
    with pytest.raises(UnknownArchitectureError, match=r"--arch-arg hidden=64 --arch-arg rate=0\.1"):
        open_architecture(read)
    with pytest.raises(UnsupportedError, match="--arch-arg hidden=64"):
        open_architecture(read, "tests.checkpoint.test_common_prefixes:needs_hidden")


def needs_hidden(hidden: int) -> torch.nn.Module:
    """A factory with an argument."""
    return torch.nn.Linear(hidden, 2)


def test_what_the_file_has_stands_beside_what_was_expected(tmp_path: Path) -> None:
    state = {"encoder.0.weight": torch.ones(4, 3), "encoder.0.bias": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"`weight` was expected, the file has `encoder\.0\.weight` \(4, 3\)"):
        open_architecture(saved(state, tmp_path / "net.pt"), "torch.nn:Linear", {"in_features": 5, "out_features": 4})


@pytest.mark.parametrize(
    ("spec", "arguments", "change", "words"),
    [
        (
            "compress:digits_net",
            {},
            {"classifier.2.bias": None},
            r"looks like compress:digits_net, .*lacks `classif",
        ),
        ("compress:digits_net", {}, {"extra": torch.ones(3)}, "looks like compress:digits_net, but .*has no `extra`"),
        ("torchvision:resnet18", {}, {"fc.weight": None, "fc.bias": None}, "looks like torchvision:resnet18, but"),
        ("torchvision:resnet18", {}, {"layer1.0.bn1.running_mean": None}, "lacks `layer1.0.bn1.running_mean`"),
        (
            "torchvision:resnet18",
            {},
            {"conv1.weight": torch.ones(64, 1, 7, 7)},
            r"`conv1.weight` is \(64, 1, 7, 7\)",
        ),
        ("torchvision:resnet18", {}, {"aux.weight": torch.ones(3)}, "the network has no `aux.weight`"),
    ],
)
def test_a_network_that_differs_in_a_tensor_is_named_with_the_difference(
    spec: str, arguments: dict[str, Any], change: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    state = {**build_architecture(spec, arguments).state_dict(), **change}
    read = saved({name: value for name, value in state.items() if value is not None}, tmp_path / "net.pt")
    with pytest.raises(UnknownArchitectureError, match=words):
        open_architecture(read)


def test_a_timm_model_is_recognised_by_its_file_name_and_shapes(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    read = saved(timm.create_model("resnet10t", num_classes=4).state_dict(), tmp_path / "my-resnet10t-best.pt")
    _, found = open_architecture(read)
    assert (found.spec, found.arguments) == ("timm:resnet10t", {"num_classes": 4})
    assert found.preprocessing is not None


def test_models_that_compute_differently_under_the_same_names_are_asked_for(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("efficientnet_lite0").state_dict()
    with pytest.raises(UnknownArchitectureError, match=r"tf_efficientnet_lite0, which compute differently"):
        open_architecture(saved(state, tmp_path / "efficientnet_lite0.pth"))

"""Which network a state dict belongs to: named or recognised, completed from the shapes, refused with a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.checkpoint.architecture import open_architecture
from compress.checkpoint.building.builders import build_architecture
from compress.checkpoint.building.torchvision_index import classifier_names, names_digest, read_index
from compress.checkpoint.fitting import load_weights
from compress.checkpoint.reading.read import Checkpoint, load_checkpoint
from compress.errors import CheckpointError, UnknownArchitectureError, UnsupportedError
from compress.models import REFERENCE_NETS
from tests.strangers import Net, SequentialCnn

TORCHVISION = [
    ("resnet18", {}),
    ("resnet50", {}),
    ("wide_resnet50_2", {}),
    ("vgg11_bn", {}),
    ("mobilenet_v2", {}),
    ("squeezenet1_1", {}),
    ("densenet121", {}),
    ("shufflenet_v2_x0_5", {}),
    ("regnet_y_400mf", {}),
    ("convnext_tiny", {}),
    ("swin_t", {}),
    ("vit_b_32", {}),
    ("googlenet", {"aux_logits": False}),
]


def checkpoint_of(state: dict[str, torch.Tensor], name: str = "net.pt", **more: Any) -> Checkpoint:
    """What load_checkpoint would give for a file of that name, tensors on the meta device included."""
    fields: dict[str, Any] = {
        "module": None, "path": Path(name), "sha256": "", "format": "zip", "state_key": None, "prefix": "",
        "dtype": torch.float32, "bytes": 0,
    }  # fmt: skip
    return Checkpoint(state=state, **{**fields, **more})


@pytest.mark.parametrize(("name", "arguments"), TORCHVISION, ids=[name for name, _ in TORCHVISION])
@pytest.mark.parametrize("classes", [1000, 7])
def test_torchvision_models_are_recognised_with_any_number_of_classes(
    name: str, arguments: dict[str, Any], classes: int
) -> None:
    wanted = {**arguments, "num_classes": classes}
    state = build_architecture(f"torchvision:{name}", wanted, memory=False).state_dict()
    found = open_architecture(checkpoint_of(dict(sorted(state.items()))))[1]
    assert found.spec == f"torchvision:{name}"
    assert found.arguments == wanted
    assert "recognised" in found.how
    assert found.preprocessing is not None
    assert found.preprocessing.mean == (0.485, 0.456, 0.406)
    assert found.input_shape is not None
    assert found.input_shape[0] == 3


def test_every_torchvision_classifier_is_in_the_index_under_its_own_names() -> None:
    indexed = {candidate[0] for candidates in read_index().values() for candidate in candidates}
    assert set(classifier_names()) <= indexed


def test_names_without_batch_counters_have_the_same_digest() -> None:
    assert names_digest(["a.weight", "a.num_batches_tracked"]) == names_digest(["a.weight"])
    assert names_digest(["a.weight"]) != names_digest(["b.weight"])


def test_an_old_file_without_batch_counters_is_recognised_and_loaded() -> None:
    network = build_architecture("compress:resnet_cifar10", {"depth": 20})
    state = {name: own for name, own in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = open_architecture(checkpoint_of(state))[1]
    assert found.spec == "compress:resnet_cifar10"
    load_weights(build_architecture(found.spec, found.arguments), state)


REFERENCES: list[tuple[str, dict[str, Any]]] = [
    ("vgg19_cifar10", {"num_classes": 10, "channels": 3, "batch_norm": True, "hidden": 512}),
    ("vgg19_cifar10", {"num_classes": 100, "channels": 3, "batch_norm": False, "hidden": 64}),
    ("vgg19_cifar10", {"num_classes": 10, "channels": 3, "batch_norm": True, "hidden": 0}),
    ("alexnet_cifar10", {"num_classes": 10, "channels": 3, "hidden": 4096}),
    ("resnet_cifar10", {"depth": 20, "num_classes": 10, "channels": 3, "width": 16}),
    ("resnet_cifar10", {"depth": 56, "num_classes": 100, "channels": 3, "width": 16}),
    ("lenet_300_100", {"num_classes": 10, "inputs": 784, "hidden": [300, 100]}),
    ("lenet_300_100", {"num_classes": 5, "inputs": 64, "hidden": [32, 16]}),
    ("mlp", {"widths": [784, 400, 400, 10], "bias": True}),
    ("mlp", {"widths": [20, 9, 8, 7, 6], "bias": False}),
    ("mlp_factorized", {"widths": [784, 400, 400, 10], "hidden": 400}),
    ("mnist_cnn", {"num_classes": 10, "channels": 1, "widths": [8, 16, 32], "hidden": 64, "side": 28}),
    ("mnist_cnn", {"num_classes": 10, "channels": 3, "widths": [8, 16, 32], "hidden": 64, "side": 32}),
    ("digits_net", {"num_classes": 10}),
]


@pytest.mark.parametrize(("name", "arguments"), REFERENCES)
def test_reference_nets_are_recognised_with_their_widths(name: str, arguments: dict[str, Any]) -> None:
    state = build_architecture(f"compress:{name}", arguments, memory=False).state_dict()
    found = open_architecture(checkpoint_of(state))[1]
    assert (found.spec, found.arguments) == (f"compress:{name}", arguments)


def test_every_reference_net_is_among_the_recognised_ones() -> None:
    assert {name for name, _ in REFERENCES} == set(REFERENCE_NETS)


def test_a_named_architecture_takes_its_classes_from_the_file() -> None:
    state = build_architecture("torchvision:resnet18", {"num_classes": 3}, memory=False).state_dict()
    found = open_architecture(checkpoint_of(state), "torchvision:resnet18", {})[1]
    assert found.arguments == {"num_classes": 3}
    assert found.how == "named"


def test_a_named_architecture_that_does_not_fit_lists_the_differences() -> None:
    state = build_architecture("torchvision:resnet18", {}, memory=False).state_dict()
    with pytest.raises(CheckpointError, match=r"does not fit torchvision:resnet34.*lacks.*more differences"):
        open_architecture(checkpoint_of(state), "torchvision:resnet34", {})


def test_wrong_shapes_are_shown() -> None:
    state = {**Net().state_dict(), "fc2.weight": torch.zeros(64, 65)}
    with pytest.raises(CheckpointError, match=r"`fc2\.weight` is \(64, 65\) in the file and \(64, 64\) in the network"):
        open_architecture(checkpoint_of(state), "tests.strangers:Net", {})


def test_a_strangers_class_is_built_with_its_arguments() -> None:
    state = Net(width=9).state_dict()
    found = open_architecture(checkpoint_of(state), "tests.strangers:Net", {"width": 9})[1]
    assert (found.spec, found.arguments, found.input_shape) == ("tests.strangers:Net", {"width": 9}, None)


def test_a_timm_model_is_built_by_name() -> None:
    state = build_architecture("timm:resnet18", {"num_classes": 4}, memory=False).state_dict()
    found = open_architecture(checkpoint_of(state), "timm:resnet18", {})[1]
    assert found.arguments == {"num_classes": 4}
    assert found.input_shape == (3, 224, 224)


def test_an_unknown_architecture_shows_a_complete_command() -> None:
    state = {**SequentialCnn().state_dict(), "scale": torch.ones(1)}
    checkpoint = checkpoint_of(state, "my nets/cnn.pth")
    with pytest.raises(UnknownArchitectureError) as caught:
        open_architecture(checkpoint)
    message = str(caught.value)
    assert "compress 'my nets/cnn.pth' --arch mynet:Net and your other options" in message
    assert "conv_layers.0.weight (32, 3, 3, 3)" in message
    assert "\n" not in message


def test_an_unknown_trusted_module_shows_its_class_in_the_command() -> None:
    checkpoint = checkpoint_of(SequentialCnn().state_dict(), class_name="__main__.TheirNet", trusted=True)
    with pytest.raises(UnknownArchitectureError, match=r"--trust-pickle --arch mynet:TheirNet"):
        open_architecture(checkpoint)


def test_a_trusted_module_of_an_importable_class_needs_no_name(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "net.pt")
    found = open_architecture(load_checkpoint(tmp_path / "net.pt", trust_pickle=True))[1]
    assert found.spec == "tests.strangers:Net"


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("torchvision:resnet19", r"no classifier 'resnet19'; did you mean resnet1"),
        ("resnet18", r"did you mean torchvision:resnet18"),
        ("lenet_300_100", r"did you mean compress:lenet_300_100"),
        ("compress:lenet", r"it has vgg19_cifar10"),
        ("timm:no_such_model", r"timm has no model"),
        ("no_such_module:Net", r"importing 'no_such_module' fails"),
        ("tests.strangers:Gone", r"has no 'Gone'"),
    ],
)
def test_names_that_do_not_exist_are_refused(spec: str, match: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=match):
        build_architecture(spec, {}, trusted=True)


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("tests.strangers:Net", {"depth": 3}),
        ("compress:resnet_cifar10", {"depth": 21}),
        ("torchvision:resnet18", {"num_classes": "many"}),
        ("tests.strangers:torch", {}),
        ("builtins:dict", {}),
    ],
)
def test_architectures_that_cannot_be_built_say_why(spec: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=spec):
        build_architecture(spec, arguments, trusted=True)


def test_where_two_nets_fit_the_files_name_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REFERENCE_NETS, "twin_net", REFERENCE_NETS["digits_net"])
    state = build_architecture("compress:digits_net", {}, memory=False).state_dict()
    assert open_architecture(checkpoint_of(state, "some.pt"))[1].spec == "compress:digits_net"
    found = open_architecture(checkpoint_of(state, "my-twin-net.pt"))[1]
    assert found.spec == "compress:twin_net"
    assert "compress:digits_net would fit too" in found.how


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    build_architecture("compress:digits_net", {})
    assert torch.equal(torch.rand(3), wanted)


def test_loading_sets_every_weight() -> None:
    source, target = (build_architecture("compress:digits_net", {}) for _ in range(2))
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(1)
    load_weights(target, source.state_dict())
    assert all(torch.equal(own, target.state_dict()[name]) for name, own in source.state_dict().items())


def test_loading_into_another_network_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not fit Linear"):
        load_weights(nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})


class Versioned(nn.Linear):
    """Loads only what says which version it is, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_module_that_asks_for_its_version_loads_plain_tensors() -> None:
    module = Versioned(3, 2)
    load_weights(module, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert float(module.weight.detach().sum()) == 6

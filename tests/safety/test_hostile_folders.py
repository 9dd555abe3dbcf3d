"""Folders from strangers: nothing that they name is run, whatever command opens them, and nothing large is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import compress
from compress.cli import main
from compress.demo import CHECKPOINT
from compress.errors import CompressError, OutputError, UnsupportedError, UntrustedCodeError
from compress.models import mlp
from tests.safety.hostile_folders import ARGUMENTS, forge, plant, write_data, write_folder

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "verify": ["verify", "net"],
    "evaluate": ["evaluate", "net", "--eval", "data.npz"],
    "export": ["export", "net", "--to", "hf"],
    "inspect": ["inspect", "net"],
    "run": ["net", "--data", "data.npz", "--keep", "0.5", "--output", "out"],
    "finetune": ["finetune", "net", "--data", "data.npz", "--output", "out"],
    "balance": ["balance", "net", "--output", "balanced.safetensors"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a sound folder and data; what is imported from it and its path entry go at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_folder(tmp_path / "net")
    write_data(tmp_path / "data.npz")
    yield tmp_path
    sys.modules.pop("planted_nets", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_that_a_folder_names(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = plant(here, "planted_nets")
    forge(here / "net", architecture__spec="planted_nets:build", architecture__arguments={"command": "x"})
    before = list(sys.path)
    assert main(COMMANDS[command]) == UntrustedCodeError.exit_code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "'planted_nets:build'" in said[0]
    assert "--trust-code" in said[0]
    assert not mark.exists()
    assert "planted_nets" not in sys.modules
    assert sys.path == before


@pytest.mark.parametrize("spec", ["os:system", "subprocess:Popen", "builtins:exec", "torch.hub:load", "torch:load"])
def test_python_refuses_code_that_a_folder_or_its_hub_layout_names(spec: str, here: Path) -> None:
    forge(here / "net", architecture__spec=spec, architecture__arguments={"command": "touch PWNED"})
    with pytest.raises(UntrustedCodeError, match=spec):
        compress.load(here / "net")
    hub = here / "hub"
    hub.mkdir()
    for name in ("config.json", "model.safetensors"):
        (hub / name).write_bytes((here / "net" / name).read_bytes())
    with pytest.raises(UntrustedCodeError, match=spec):
        compress.load(hub)
    assert not (here / "PWNED").exists()


def test_the_users_word_runs_the_factory(here: Path) -> None:
    (here / "planted_nets.py").write_text("from compress.models import mlp\ndef build(widths): return mlp(widths)\n")
    sound = compress.load(here / "net")(torch.ones(1, 4))
    forge(here / "net", architecture__spec="planted_nets:build")
    assert torch.equal(compress.load(here / "net", trust_code=True)(torch.ones(1, 4)), sound)
    assert main(["verify", "net", "--trust-code"]) == 0
    assert main(["evaluate", "net", "--eval", "data.npz", "--arch", "planted_nets:build"]) == 0


def test_a_model_that_is_given_stands_in_for_the_factory(here: Path) -> None:
    sound = compress.load(here / "net")(torch.ones(1, 4))
    forge(here / "net", architecture__spec="nowhere:build")
    given = mlp([4, 6, 3])
    before = {name: value.clone() for name, value in given.state_dict().items()}
    assert torch.equal(compress.load(here / "net", model=given)(torch.ones(1, 4)), sound)
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("timm:hf-hub:stranger/net", {}),
        ("timm:local-dir:/tmp/net", {}),
        ("timm:resnet18", {"pretrained": True}),
        ("timm:resnet18", {"checkpoint_path": "weights.pt"}),
        ("timm:resnet18", {"pretrained_cfg": {"url": "http://127.0.0.1/x"}}),
        ("timm:resnet18", {"features_only": True, "feature_cls": "list"}),
        ("timm:resnet18", {"norm_layer": "torch.nn.BatchNorm2d"}),
        ("timm:resnet18", {"block": "os.system"}),
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:resnet18", {"pretrained": True}),
        ("torchvision:resnet18", {"norm_layer": "os:system"}),
        ("torchvision:resnet18", {"__class__": 1}),
        ("torchvision:quantized_resnet18", {}),
        ("torchvision:get_model", {"name": "resnet18"}),
        ("compress:mlp", {"widths": "4,6,3"}),
        ("compress:mlp", {"widths": [4, 10**15, 3]}),
        ("compress:mlp", {"widths": [4, 1 << 24, 1 << 24, 3]}),
        ("compress:mlp", {"widths": [4] * 5000}),
        ("compress:resnet_cifar10", {"depth": 6 * 100_000 + 2}),
        ("compress:no_such_net", {}),
        ("transformers:AutoModel", {}),
        ("transformers:pipeline", {"task": "x"}),
        ("transformers:PreTrainedModel", {}),
        ("transformers:TimmWrapperModel", {"architecture": "resnet18"}),
        ("transformers:BertModel", {"_name_or_path": "stranger/net"}),
        ("transformers:BertModel", {"attn_implementation": "stranger/kernel"}),
        ("transformers:BertModel", {"quantization_config": {"quant_method": "gptq"}}),
        ("transformers:BertModel", {"auto_map": {"AutoModel": "net.Net"}}),
        ("transformers:BertModel", {"hidden_act": "../../x.py"}),
        ("transformers:BertModel", {"to_dict": 1}),
        ("transformers:BertModel", {"max_position_embeddings": 1 << 24, "hidden_size": 1 << 22}),
        ("transformers:DetrModel", {}),
        ("transformers.models.bert.modeling_bert:BertModel", {}),
        ("", {}),
        ("compress:", {}),
        ("x" * 200, {}),
    ],
)
def test_builders_of_the_closed_list_take_plain_arguments_only(
    spec: str, arguments: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr("socket.getaddrinfo", connect)
    forge(here / "net", architecture__spec=spec, architecture__arguments=arguments)
    with pytest.raises(CompressError):
        compress.load(here / "net")


@pytest.mark.parametrize(
    "attributes",
    [
        {"layers.0.out_features": "6"},
        {"layers.0.out_features": True},
        {"layers.0.forward": 3},
        {"layers.0.weight": 3},
        {"layers.0.__class__": 3},
        {"layers.0._forward_hooks": 3},
        {"layers.0.training": 1},
        {"layers": 3},
        {"layers.0.nothing": 3},
        {"nowhere.out_features": 6},
        {"layers.0.out_features": [6]},
        {"": 1},
    ],
)
def test_attributes_are_whole_numbers_where_whole_numbers_were(attributes: dict[str, Any], here: Path) -> None:
    forge(here / "net", attributes=attributes)
    with pytest.raises(CompressError):
        compress.load(here / "net")


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers.0.weight": [1 << 38, 4]},
        {"layers.0.weight": [1 << 60, 1 << 60]},
        {"layers.0.weight": [-6, -4]},
        {"layers.0.weight": [24]},
        {"layers.0.weight": []},
        {"layers.0.weight": "6,4"},
        {"layers.0.weight": [6.5, 4]},
        {"layers.0.weight": [1] * 70},
        {"layers.9.weight": [6, 4]},
        {"layers.0": [6, 4]},
        {"..": [6, 4]},
    ],
)
def test_shapes_are_those_of_the_file(shapes: dict[str, Any], here: Path) -> None:
    forge(here / "net", shapes=shapes)
    with pytest.raises(CompressError):
        compress.load(here / "net")


@pytest.mark.parametrize(
    "entry",
    [
        {"architecture__input_shape": [1 << 30, 1 << 30]},
        {"architecture__input_shape": ["4"]},
        {"architecture__input_shape": 4},
        {"architecture__input_dtype": "load"},
        {"architecture__input_dtype": "complex64"},
        {"architecture__batch_size": 1 << 40},
        {"architecture__spec": 3},
        {"architecture__spec": ["os:system"]},
        {"architecture__arguments": [["command", "x"]]},
        {"architecture": "os:system"},
        {"hashes": []},
        {"kept": {"layers.0": "all"}},
        {"data": {"preprocessing": {"mean": "__import__"}}},
        {"data": {"preprocessing": {"resize": 1 << 40}}},
        {"data": {"preprocessing": {"callable": "os:system"}}},
    ],
)
def test_every_entry_of_a_manifest_is_of_its_kind(entry: dict[str, Any], here: Path) -> None:
    forge(here / "net", **entry)
    with pytest.raises(CompressError):
        compress.load(here / "net")
    assert main(["verify", "net"]) in (1, 3, 5)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 1, "format": 1}',
        '{"format": NaN}',
        '{"format": 1e999}',
        '{"format": ' + "9" * 400 + "}",
        '{"format": ' + "9" * 5000 + "}",
        '{"format": ' + "[" * 100 + "]" * 100 + "}",
        '{"format": ' + "[" * 200_000,
        '{"format": "\\ud800"}',
        "\ufeff{}",
        "[]",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_json_of_a_stranger_is_read_strictly(text: str, name: str, here: Path) -> None:
    (here / "net" / name).write_text(text)
    with pytest.raises(OutputError, match=name.replace(".", r"\.")):
        compress.load(here / "net") if name == "config.json" else compress.rebuild_report(here / "net")


def test_pipes_and_devices_in_the_place_of_files_are_refused(here: Path) -> None:
    for name in ("config.json", "model.safetensors", "SHA256SUMS", "report.json"):
        for kind in ("pipe", "device"):
            folder = write_folder(here / f"{name}-{kind}")
            (folder / name).unlink()
            if kind == "pipe":
                os.mkfifo(folder / name)
            else:
                (folder / name).symlink_to("/dev/zero")
            with pytest.raises(OutputError):
                compress.rebuild_report(folder) if name == "report.json" else compress.load(folder)


def test_a_list_of_hashes_is_checked_before_anything_is_built(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.checkpoint.manifest.build_architecture", lambda *_, **__: pytest.fail("built"))
    path = here / "net" / "config.json"
    path.write_text(path.read_text().replace("[ 4 ]", "[ 5 ]"))
    with pytest.raises(OutputError, match="SHA256SUMS says otherwise"):
        compress.load(here / "net")


def test_a_page_is_written_in_the_place_of_a_link_and_never_through_it(here: Path) -> None:
    target = here / "precious"
    target.write_text("mine")
    path = here / "net" / "report.json"
    path.write_text(json.dumps({"format": 1}))
    for name in ("report.md", "report.html", "SHA256SUMS"):
        (here / "net" / name).unlink(missing_ok=True)
        (here / "net" / name).symlink_to(target)
    with pytest.raises(CompressError):
        compress.rebuild_report(here / "net")
    assert target.read_text() == "mine"


@pytest.mark.parametrize("line", ["arch: planted_nets:build", "data: planted_nets:build", "trust_pickle: true",
                                  "trust-code: true", "data: ./planted_nets.py:build", "eval: os:listdir"])  # fmt: skip
def test_a_recipe_inside_a_written_folder_names_no_code(line: str, here: Path) -> None:
    mark = plant(here, "planted_nets")
    recipe = here / "net" / "recipe.yaml"
    recipe.write_text(f"{line}\n")
    with pytest.raises(UntrustedCodeError, match="copy the recipe out"):
        compress.read_recipe(recipe)
    assert main(["run", "net", "--recipe", str(recipe)]) == UntrustedCodeError.exit_code
    assert main(["zoo", str(recipe)]) == UntrustedCodeError.exit_code
    assert not mark.exists()
    (here / "own.yaml").write_text(f"{line}\n")
    assert compress.read_recipe(here / "own.yaml")


PLANTED = ("torch", "numpy", "planted_nets", "sitecustomize", "usercustomize", "typing", "yaml", "safetensors", "timm")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("compress", ["compare", "net"]), ("compress.cli", ["verify", "net"]), (None, ["verify", "net"])],
)
def test_modules_planted_in_the_working_directory_are_not_imported(
    module: str | None, arguments: list[str], here: Path
) -> None:
    marks = [plant(here, name) for name in PLANTED]
    script = [str(Path(sys.executable).with_name("compress"))]
    command = script if module is None else [sys.executable, "-m", module]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *arguments], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert [mark.name for mark in marks if mark.exists()] == []
    assert done.returncode in (0, 1, 3), done.stderr
    assert "Traceback" not in done.stderr


def test_modules_planted_beside_a_zoo_are_not_imported_by_its_processes(here: Path) -> None:
    marks = [plant(here, name) for name in PLANTED]
    zoo = {"output": "out", "defaults": {"data": "digits", "calibration_samples": 60, "keep": 0.5}, "threads": 1}
    models = [{"name": "small", "checkpoint": str(CHECKPOINT), "selection": "magnitude"}]
    (here / "zoo.yaml").write_text(yaml.safe_dump({**zoo, "models": models}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(Path(sys.executable).with_name("compress")), "zoo", "zoo.yaml"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert [mark.name for mark in marks if mark.exists()] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert (here / "out" / "models" / "small" / "model.safetensors").is_file()


def test_a_network_that_fits_loads_as_before(here: Path) -> None:
    assert isinstance(compress.load(here / "net"), nn.Module)
    forge(here / "net", architecture__arguments={**ARGUMENTS, "bias": True})
    assert isinstance(compress.load(here / "net"), nn.Module)
    forge(here / "net", architecture__arguments={**ARGUMENTS, "bias": False})
    with pytest.raises(CompressError, match="does not fit"):
        compress.load(here / "net")


def test_an_original_far_larger_than_its_file_is_refused(here: Path) -> None:
    wide = {"shapes": {"layers.0.weight": [6, 4], "layers.0.bias": [6], "layers.2.weight": [3, 6]}}
    forge(here / "net", architecture__arguments={"widths": [4, 1 << 24, 1 << 20]}, **wide)
    with pytest.raises(UnsupportedError, match="far more"):
        compress.load(here / "net")


class Runs:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("PWNED",)


TRAINING = ["train", "train.yaml", "--data", "data.npz", "--epochs", "1", "--output", "out", "--resume"]


@pytest.mark.parametrize("content", ["pickle", "wrong", "text", "empty"])
def test_the_state_of_a_training_is_never_unpickled(content: str, here: Path) -> None:
    state = here / "out.state"
    state.mkdir()
    if content == "pickle":
        torch.save({"module": Runs(), "optimizer": {}, "curve": [], "best": {}}, state / "training.state")
    elif content == "wrong":
        torch.save({"module": {}, "optimizer": 3, "curve": "x", "best": []}, state / "training.state")
    else:
        (state / "training.state").write_text("" if content == "empty" else "text")
    (here / "train.yaml").write_text("arch: compress:mlp\narch_arg: {widths: [4, 6, 3]}\n")
    assert main(TRAINING) == OutputError.exit_code
    assert not (here / "PWNED").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', "\x00"])
def test_a_damaged_fingerprint_of_a_state_is_one_line(text: str, here: Path) -> None:
    (here / "out.state").mkdir()
    (here / "out.state" / "fingerprint.json").write_text(text)
    (here / "train.yaml").write_text("arch: compress:mlp\narch_arg: {widths: [4, 6, 3]}\n")
    assert main(TRAINING) == OutputError.exit_code

"""What the other commands make of a folder that a training wrote: they take it, or say in one line what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import compress
from compress.cli import main

HELD_OUT = "digits?train=false"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of `compress train`, which nothing changes."""
    place = tmp_path_factory.mktemp("trained")
    recipe = {
        "arch": "compress:mlp", "arch_arg": {"widths": [64, 12, 12, 10]}, "data": "digits", "eval": HELD_OUT,
        "training": {"epochs": 2, "batch_size": 64},
    }  # fmt: skip
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(place / "recipe.yaml"), "--output", str(place / "net")]) == 0
    return place / "net"


@pytest.fixture
def net(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "net"))


def test_evaluate_gives_the_accuracy_that_the_training_reported(written, capsys):
    assert main(["evaluate", str(written), "--eval", HELD_OUT, "--json"]) == 0
    report = json.loads((written / "training.json").read_text())
    assert json.loads(capsys.readouterr().out)["top1"] == report["evaluation"]["trained"]["top1"]


def test_verify_passes_and_compares_costs_and_accuracy_with_the_training(written, capsys):
    assert main(["verify", str(written), "--eval", HELD_OUT, "--json"]) == 0
    names = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"] if check["passed"]}
    assert {"file model.safetensors", "parameters", "macs", "accuracy as reported"} <= names


def test_verify_finds_a_training_report_that_was_changed(net, capsys):
    report = json.loads((net / "training.json").read_text())
    report["evaluation"]["trained"]["top1"] -= 0.1
    (net / "training.json").write_text(json.dumps(report))
    assert main(["verify", str(net), "--eval", HELD_OUT]) == 3
    assert "training.json is changed" in capsys.readouterr().err


def test_a_drop_cannot_be_gated_where_nothing_was_trained_before(written, capsys):
    assert main(["verify", str(written), "--eval", HELD_OUT, "--max-drop", "1"]) == 1
    assert "--max-drop" in capsys.readouterr().err


def test_export_writes_into_the_folder_which_still_verifies(net, capsys):
    assert main(["export", str(net), "--to", "hf"]) == 0
    assert "trained by sgd" in (net / "hf" / "README.md").read_text()
    assert compress.load(net / "hf")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert [one["kind"] for one in json.loads((net / "training.json").read_text())["exports"]] == ["hf"]
    assert not (net / "report.json").exists()
    assert main(["verify", str(net)]) == 0


@pytest.mark.parametrize("command", ["report", "compare"])
def test_reports_of_runs_are_refused_in_one_line_that_says_what_works(command, written, capsys):
    assert main([command, str(written)]) == 1
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    assert "compress FOLDER --data" in message[0]


def test_inspect_and_balance_take_the_folder(net, tmp_path, capsys):
    assert main(["inspect", str(net), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["units"] for layer in found["layers"]][:2] == [12, 12]
    assert main(["balance", str(net), "--output", str(tmp_path / "balanced.safetensors")]) == 0


def test_a_folder_is_compressed_like_the_checkpoint_in_it(written):
    options = {"data": "digits", "keep": 0.5}
    given = ({"checkpoint": str(written)}, {"checkpoint": str(written / "model.safetensors"), "arch": "compress:mlp"})
    found = [compress.run(compress.make_recipe({**options, **one}), dry_run=True).module for one in given]
    assert all(torch.equal(*pair) for pair in zip(*(module.parameters() for module in found), strict=True))


def test_a_cut_folder_is_cut_again_and_its_manifest_counts_from_the_original(net, tmp_path, capsys):
    options = ["--data", "digits", "--eval", HELD_OUT]
    once, twice = str(tmp_path / "once"), str(tmp_path / "twice")
    assert main([str(net), *options, "--keep", "8", "--output", once]) == 0
    assert main([once, *options, "--keep", "5", "--layer", "layers.0", "--output", twice]) == 0
    kept = [json.loads(Path(folder, "config.json").read_text())["kept"] for folder in (once, twice)]
    first, *rest = list(kept[0])
    assert set(kept[1][first]) < set(kept[0][first])
    assert [len(kept[1][name]) for name in kept[0]] == [5, 8]
    assert [kept[1][name] for name in rest] == [kept[0][name] for name in rest]
    assert load_file(Path(twice, "model.safetensors"))["layers.2.weight"].shape == (8, 5)
    assert main(["verify", twice, *options[2:]]) == 0
    capsys.readouterr()
    assert main(["balance", once]) == 1
    assert "was cut" in capsys.readouterr().err


def test_another_architecture_than_the_folders_is_refused(written, tmp_path, capsys):
    command = [str(written), "--arch", "torchvision:resnet18", "--data", "digits", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "leave arch out" in capsys.readouterr().err

"""Regression: real targets and counts reach every command and are scored by their loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from compress.cli import main
from compress.data import open_data
from compress.training.losses import constant_loss, squared_loss


def write_data(place: Path, name: str, seed: int, *, counts: bool = False) -> str:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(160, 4))
    targets = np.maximum(inputs[:, 0], 0) - inputs[:, 1]
    if counts:
        targets = generator.poisson(np.exp(0.5 * targets))
    np.savez(place / f"{name}.npz", inputs=inputs, targets=targets)
    return str(place / f"{name}.npz")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    content = {
        "arch": "compress:mlp",
        "arch_arg": {"widths": [4, 16, 8, 1]},
        "data": write_data(tmp_path, "train", 0),
        "eval": write_data(tmp_path, "test", 1),
        "training": {"loss": "squared", "epochs": 20, "batch_size": 32, "lr": 0.02},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(tmp_path / "recipe.yaml")


def test_a_regression_is_trained_compressed_and_scored_by_its_squared_error(recipe, tmp_path, capsys):
    assert main(["train", recipe, "--output", str(tmp_path / "net"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["evaluation"]
    assert found["trained"]["top1"] is None
    assert found["trained"]["loss"] < 0.2 * found["constant_loss"]
    test, train = str(tmp_path / "test.npz"), str(tmp_path / "train.npz")
    assert main(["evaluate", str(tmp_path / "net"), "--eval", test, "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["squared_error"] == pytest.approx(found["trained"]["loss"], rel=1e-5)
    model = str(tmp_path / "net" / "model.safetensors")
    arguments = ["--arch", "compress:mlp", "--data", train, "--eval", test, "--keep", "0.75"]
    tuned = ["--finetune", "sgd", "--loss", "squared", "--dry-run", "--json"]
    assert main([model, *arguments, *tuned]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["evaluation"]["squared_error"][0] == pytest.approx(scored["squared_error"])
    assert report["finetune"]["curve"][0]["validation_top1"] is None


def test_counts_are_fitted_by_the_poisson_loss(recipe, tmp_path, capsys):
    data, held = (write_data(tmp_path, name, seed, counts=True) for name, seed in (("a", 2), ("b", 3)))
    command = ["train", recipe, "--data", data, "--eval", held, "--method", "pathprox", "--loss", "poisson"]
    assert main([*command, "--output", str(tmp_path / "net")]) == 0
    shown = capsys.readouterr().out
    assert "poisson loss" in shown
    assert "top-1" not in shown.split("written")[0].splitlines()[-2]
    report = json.loads((tmp_path / "net" / "training.json").read_text())["evaluation"]
    assert report["trained"]["loss"] < report["constant_loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loss", "cross_entropy"], "--loss squared"),
        (["--loss", "poisson"], "counts must be 0 or larger"),
        (["--arch-arg", "widths=[4,8,2]"], "1 targets a sample"),
    ],
)
def test_targets_that_do_not_fit_loss_or_network_are_refused_in_one_line(options, words, recipe, tmp_path, capsys):
    assert main(["train", recipe, "--output", str(tmp_path / "net"), *options]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message
    assert not (tmp_path / "net").exists()


def test_labels_for_a_network_of_one_output_are_refused_in_one_line(recipe, tmp_path, capsys):
    np.savez(tmp_path / "classes.npz", inputs=np.ones((20, 4)), labels=np.arange(20) % 2)
    command = ["train", recipe, "--data", str(tmp_path / "classes.npz"), "--output", str(tmp_path / "net")]
    assert main(command) == 1
    assert "under `targets`" in capsys.readouterr().err


def test_a_data_set_with_real_answers_has_targets_not_rounded_labels(tmp_path, monkeypatch):
    code = "class Pairs:\n    def __len__(self): return 3\n    def __getitem__(self, n): return [float(n)] * 2, n / 2\n"
    (tmp_path / "own_pairs.py").write_text(f"{code}def make(): return Pairs()\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = open_data("own_pairs:make")
    assert source.labels is None
    assert source.targets.tolist() == [[0.0], [0.5], [1.0]]


def test_targets_enter_the_fingerprint_of_the_data(tmp_path):
    inputs = np.ones((5, 2))
    for name, last in (("a", 1.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", inputs=inputs, targets=np.array([0, 0, 0, 0, last]))
    assert open_data(str(tmp_path / "a.npz")).fingerprint != open_data(str(tmp_path / "b.npz")).fingerprint


def test_the_best_constant_is_a_minimum_of_its_loss():
    targets = np.random.default_rng(0).poisson(2.0, (50, 2)).astype(np.float32)
    mean = torch.from_numpy(targets.mean(0)).expand(50, 2)
    assert constant_loss("squared", targets) == pytest.approx(float(squared_loss(mean, torch.from_numpy(targets))))
    least = constant_loss("poisson", targets)
    for shift in (-0.1, 0.0, 0.1):
        rate = torch.from_numpy(targets.mean(0)).double().log() + shift
        value = float((rate.exp() - torch.from_numpy(targets).double().mean(0) * rate).sum())
        assert value >= least - 1e-6
        assert shift or value == pytest.approx(least, rel=1e-5)


def test_targets_of_another_shape_than_the_outputs_are_not_broadcast():
    with pytest.raises(ValueError, match="one number for each output"):
        squared_loss(torch.zeros(3, 2), torch.zeros(3))


def test_plateau_takes_targets_and_wants_a_loss_for_them(tmp_path, capsys):
    data = write_data(tmp_path, "train", 0)
    command = ["plateau", "--data", data, "--loss", "squared", "--widths", "1,4", "--steps", "40"]
    assert main(command) == 0
    assert "the plateau starts at width" in capsys.readouterr().out
    assert main(["plateau", "--data", data]) == 2

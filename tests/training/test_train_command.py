"""compress train and finetune: methods, determinism, resume, the search for λ, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import compress
from compress.api.training import train
from compress.cli import main
from compress.errors import InterruptionError
from compress.progress import SilentProgress
from compress.recipe import make_recipe, read_recipe
from compress.report.model import plain_data

MLP = {"arch": "compress:mlp", "arch_arg": {"widths": [64, 12, 12, 10]}, "data": "digits", "eval": "digits?train=false"}


def write_recipe(place: Path, **training: object) -> str:
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MLP, "training": {"epochs": 2, "batch_size": 64, **training}}), encoding="utf-8")
    return str(path)


def trained(place: Path, name: str = "out", **training: object) -> dict[str, object]:
    options = {**read_recipe(write_recipe(place, **training)), "checkpoint": "", "output": str(place / name)}
    return train(make_recipe(options)).report


@pytest.mark.parametrize("method", ["sgd", "pathprox", "lasso", "group_lasso", "l1"])
def test_every_method_learns_and_is_loaded_by_the_rest(method, tmp_path):
    report = trained(tmp_path, method=method, penalty=1e-4, epochs=3)
    assert report.evaluation.trained.top1 > 0.6
    assert report.curve[-1].loss < report.curve[0].loss
    assert compress.load(tmp_path / "out")(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert not (tmp_path / "out.state").exists()


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    command = ["train", write_recipe(tmp_path, method="pathprox", crop=1), "--epochs", "1", "--json"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([*command, "--seed", str(seed), "--output", str(tmp_path / name)]) == 0
    first, second, third = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second
    assert first != third


class _Killed(SilentProgress):
    """Ends the training in its third epoch, as Ctrl-C does."""

    def stage(self, title: str, total: int | None = None) -> None:
        if title.startswith("epoch 3"):
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path):
    recipe = {**read_recipe(write_recipe(tmp_path, epochs=4)), "checkpoint": ""}
    whole = make_recipe({**recipe, "output": str(tmp_path / "whole")})
    killed = make_recipe({**recipe, "output": str(tmp_path / "killed")})
    train(whole)
    with pytest.raises(InterruptionError, match="--resume"):
        train(killed, _Killed())
    assert not (tmp_path / "killed").exists()
    assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "killed")]) == 1
    notes = _Stages()
    train(killed, notes, resume=True)
    assert [title for title in notes.titles if title.startswith("epoch")] == ["epoch 3 of 4", "epoch 4 of 4"]
    names = ("whole", "killed")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1


class _Stages(SilentProgress):
    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []

    def stage(self, title: str, total: int | None = None) -> None:
        self.titles.append(title)


def test_the_best_epoch_by_held_back_loss_is_written_and_patience_stops(tmp_path):
    report = trained(tmp_path, epochs=30, lr=3.0, schedule="constant", momentum=0.0, patience=2)
    losses = [row.validation_loss for row in report.curve]
    assert report.stopped_early
    assert len(losses) < 30
    assert report.validation.loss == pytest.approx(min(losses))


def test_the_search_reaches_the_target_and_records_its_iterations(tmp_path):
    report = trained(tmp_path, method="l1", target_sparsity=0.6, target_tolerance=0.05, epochs=3)
    assert report.nonzeros == pytest.approx(0.4 * report.weights, rel=0.05)
    lines = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    assert lines[0]["targets"] == [round(0.4 * report.weights)]
    assert len(lines) == 1 + report.penalty_search.trainings
    assert {"brackets", "penalties", "levels"} <= set(lines[-1])
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(int(tensor.count_nonzero()) for tensor in state.values() if tensor.ndim >= 2) == report.nonzeros


def test_a_search_that_ran_out_of_trainings_goes_on_when_resumed(tmp_path, capsys):
    options = {"method": "l1", "target_sparsity": 0.6, "target_tolerance": 0.05, "epochs": 3}
    whole = trained(tmp_path, **options)
    command = ["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "again"), "--json"]
    assert main([*command, "--trainings", "1"]) == 3
    assert "--trainings" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["penalty_search"] == plain_data(whole.penalty_search)
    names = ("out", "again")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1
    assert len({(tmp_path / name / "journal.jsonl").read_bytes() for name in names}) == 1


def test_every_layer_reaches_the_share_with_a_penalty_of_its_own(tmp_path):
    report = trained(
        tmp_path, method="l1", target_sparsity=0.5, per_layer=True, target_tolerance=0.15, epochs=2, trainings=30
    )
    for layer in report.layers:
        assert layer.nonzeros == pytest.approx(0.5 * layer.weights, rel=0.15)
    assert len(set(report.penalty_search.penalties)) == 3


def test_a_compressed_folder_is_finetuned_in_its_smaller_shapes(tmp_path, capsys):
    trained(tmp_path, epochs=3)
    cut = str(tmp_path / "cut")
    model = str(tmp_path / "out" / "model.safetensors")
    assert main([model, "--data", "digits", "--keep", "0.5", "--output", cut, "--arch", "compress:mlp"]) == 0
    capsys.readouterr()
    arguments = ["--data", "digits", "--eval", "digits?train=false", "--method", "pathprox", "--epochs", "2", "--json"]
    assert main(["finetune", cut, *arguments, "--output", str(tmp_path / "tuned")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["evaluation"]["trained"]["loss"] < report["evaluation"]["original"]["loss"]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (cut, tmp_path / "tuned"))
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert before["layers.0.weight"].shape[0] == 6
    assert compress.load(tmp_path / "tuned")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("training", "code", "words"),
    [
        ({"method": "magic"}, 2, "pathprox"),
        ({"epochs": 0}, 2, "epochs"),
        ({"patience": 2, "held_back": 0.0}, 2, "held_back"),
        ({"target_sparsity": 0.5}, 2, "l1"),
        ({"method": "l1", "per_layer": True}, 2, "target_sparsity"),
        ({"schedule": "step"}, 2, "milestones"),
        ({"colour": "red"}, 2, "colour"),
        ({"lr": 1e5}, 1, "smaller learning rate"),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_written(training, code, words, tmp_path, capsys):
    assert main(["train", write_recipe(tmp_path, **training), "--output", str(tmp_path / "out")]) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error:")
    assert words in message
    assert not (tmp_path / "out").exists()


def test_data_without_labels_and_a_recipe_without_an_architecture_are_refused(tmp_path, capsys):
    bare = tmp_path / "bare.safetensors"
    shutil.copy(Path(compress.__file__).parent / "data" / "digits_train.safetensors", bare)
    from safetensors.torch import save_file

    save_file({"images": load_file(bare)["images"]}, bare)
    recipe = write_recipe(tmp_path)
    assert main(["train", recipe, "--data", str(bare), "--output", str(tmp_path / "out")]) == 1
    assert "no labels" in capsys.readouterr().err
    (tmp_path / "none.yaml").write_text("data: digits\n", encoding="utf-8")
    assert main(["train", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "arch" in capsys.readouterr().err


def test_evaluation_data_that_the_network_does_not_run_on_are_refused_before_the_training(tmp_path, capsys):
    np.savez(tmp_path / "wide.npz", inputs=np.zeros((40, 1, 8, 9), "f4"), labels=np.arange(40) % 10)
    command = ["train", write_recipe(tmp_path), "--eval", str(tmp_path / "wide.npz"), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "--eval: the network runs on the samples of shape (1, 8, 8)" in said
    assert "epoch" not in said
    assert not (tmp_path / "out").exists()

"""Epochs without penalty at the end, λ that rises, and clipped gradients, as the options of a training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from compress.api.training import train
from compress.cli import main
from compress.data import open_data
from compress.errors import InterruptionError
from compress.progress import SilentProgress
from compress.recipe import TrainingOptions, make_recipe
from compress.training.loop import Length, Lesson, Stepping, fit
from compress.training.losses import squared_loss
from compress.training.session import Session


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(200, 10))
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=3 * inputs[:, 0] - 2 * np.maximum(inputs[:, 1], 0))
    return open_data(str(tmp_path / "data.npz"))


def trained(source, validation=None, **given):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 1))
    options = {"loss": "squared", "epochs": 15, "batch_size": 20, "lr": 0.02, **given}
    chosen = TrainingOptions.model_validate(options).completed()
    return Session(torch.zeros(2, 10), chosen, source, validation).train(module)


@pytest.mark.parametrize(("method", "penalty"), [("l1", 0.05), ("pathprox", 0.5)])
def test_debiasing_lowers_the_loss_and_keeps_every_zero(method, penalty, source):
    found = trained(source, method=method, penalty=penalty, debias=10)
    assert found.undebiased is not None
    pairs = list(zip(found.undebiased.parameters(), found.module.parameters(), strict=True))
    zeros = [before == 0 for before, _ in pairs if before.ndim > 1]
    assert any(bool(one.any()) for one in zeros)
    for (before, after), own in zip([pair for pair in pairs if pair[0].ndim > 1], zeros, strict=True):
        assert torch.equal(after == 0, own)
        assert not torch.equal(before, after)
    losses = [row["loss"] for row in found.fitted.curve]
    assert [row["epoch"] for row in found.fitted.curve] == list(range(1, 26))
    assert losses[-1] < 0.9 * losses[14]


def test_debiasing_that_does_not_help_on_held_back_samples_is_not_kept(source, tmp_path):
    generator = np.random.default_rng(1)
    np.savez(tmp_path / "other.npz", inputs=generator.normal(size=(50, 10)), targets=np.zeros(50))
    other = open_data(str(tmp_path / "other.npz"))
    found = trained(source, other, method="l1", penalty=0.3, debias=3)
    assert found.module is found.undebiased
    assert found.fitted.best_epoch <= 15


def test_the_search_is_debiased_once_at_its_end(source):
    found = trained(source, method="l1", target_sparsity=0.5, target_tolerance=0.1, debias=4)
    assert found.choice.met
    nonzeros = sum(int(weight.count_nonzero()) for weight in found.module.parameters() if weight.ndim > 1)
    assert nonzeros == sum(found.choice.levels)
    assert len(found.fitted.curve) == 15 + 4


class _Killed(SilentProgress):
    """Ends the training in the second epoch of its debiasing."""

    seen = 0

    def stage(self, title: str, total: int | None = None) -> None:
        self.seen += title.startswith("epoch 2")
        if self.seen == 2:
            raise KeyboardInterrupt


def test_a_training_killed_while_it_debiases_goes_on_to_the_same_bytes(source, tmp_path, capsys):
    recipe = {
        "arch": "compress:mlp", "arch_arg": {"widths": [10, 12, 1]}, "data": source.name, "eval": source.name,
        "checkpoint": "", "training": {
            "loss": "squared", "method": "l1", "penalty": 0.3, "epochs": 3, "ramp": 1, "batch_size": 20,
            "lr": 0.02, "debias": 3,
        },
    }  # fmt: skip
    with pytest.raises(InterruptionError):
        train(make_recipe({**recipe, "output": str(tmp_path / "killed")}), _Killed())
    train(make_recipe({**recipe, "output": str(tmp_path / "killed")}), resume=True)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({key: value for key, value in recipe.items() if key != "checkpoint"})
    )
    assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "whole")]) == 0
    assert "3 epochs without penalty: training loss" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    report = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert report["training"]["loss"] < report["undebiased"]["training"]["loss"]
    assert report["undebiased"]["evaluation"]["loss"] > report["evaluation"]["trained"]["loss"]


def test_no_epoch_before_the_penalty_has_risen_is_kept(source):
    found = trained(source, source, method="lasso", penalty=3.0, ramp=6, epochs=12)
    losses = [row["validation_loss"] for row in found.fitted.curve]
    assert losses.index(min(losses)) < 6
    assert found.fitted.best_epoch > 6


def test_gradients_are_scaled_down_to_the_norm_asked_for(source):
    def moved(clip: float) -> float:
        torch.manual_seed(0)
        module = nn.Linear(10, 1)
        before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        fit(module, Lesson(squared_loss, source, batch_size=200), Stepping(optimizer, clip_norm=clip), Length(1))
        return float((nn.utils.parameters_to_vector(module.parameters()).detach() - before).norm())

    assert moved(0.0) > 1
    assert moved(0.5) == pytest.approx(0.5, rel=1e-4)


def test_a_ramp_longer_than_the_training_is_refused():
    with pytest.raises(ValidationError, match="below epochs"):
        TrainingOptions.model_validate({"epochs": 3, "ramp": 3})

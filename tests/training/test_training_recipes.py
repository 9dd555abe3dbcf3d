"""Every training recipe that ships takes one step on data of its network's shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.checkpoint.building.builders import build_architecture
from compress.checkpoint.inputs import describe_inputs
from compress.data import Preprocessing, open_data
from compress.recipe import make_recipe, read_recipe
from compress.training.session import Session

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TRAINING = [path for path in RECIPES if "training" in read_recipe(path)]


def test_the_shipped_trainings_are_those_that_their_page_lists():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert len(TRAINING) >= 5
    assert [path.name for path in TRAINING if path.stem not in text] == []


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_recipe_takes_one_step(path, tmp_path):
    recipe = make_recipe({"checkpoint": "", **read_recipe(path)}, str(path))
    shape, known = describe_inputs(recipe.arch, recipe.arch_arg)
    generator = np.random.default_rng(0)
    if len(shape) == 3:
        images = generator.integers(0, 256, (8, *shape[1:], shape[0])).astype(np.uint8)
        np.savez(tmp_path / "data.npz", images=images, labels=np.arange(8))
    else:
        np.savez(tmp_path / "data.npz", inputs=generator.normal(size=(8, *shape)), targets=generator.normal(size=8))
    source = open_data(str(tmp_path / "data.npz"), known or Preprocessing(mean=recipe.mean, std=recipe.std))
    options = recipe.training.completed().model_copy(update={"epochs": 1, "warmup": 0.0, "patience": None})
    module = build_architecture(recipe.arch, recipe.arch_arg, seed=recipe.seed)
    found = Session(torch.zeros(2, *shape), options, source, seed=recipe.seed).train(module)
    assert np.isfinite(found.fitted.curve[0]["loss"])
    moved = [
        name
        for name, value in found.module.named_parameters()
        if value.ndim >= 2 and not torch.equal(value, module.get_parameter(name))
    ]
    assert len(moved) == sum(value.ndim >= 2 for value in module.parameters())

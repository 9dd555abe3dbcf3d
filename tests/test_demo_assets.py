"""What the package ships: the digits, the trained network, and the script that made it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits

from compress.checkpoint.architecture import open_architecture
from compress.checkpoint.building.builders import build_architecture
from compress.checkpoint.fitting import load_weights
from compress.checkpoint.reading.read import load_checkpoint
from compress.data import open_data, overlap
from compress.demo import CHECKPOINT, DEMO_OPTIONS
from compress.demo.train_digits import accuracy, shift_images, split_digits, train


def test_the_trained_file_is_small_and_recognised() -> None:
    found = load_checkpoint(CHECKPOINT)
    assert found.bytes < 2**20
    assert open_architecture(found)[1].spec == "compress:digits_net"


def test_the_trained_network_gets_98_percent_of_the_test_digits_right() -> None:
    found = load_checkpoint(CHECKPOINT)
    network = build_architecture("compress:digits_net", {"num_classes": 10})
    load_weights(network, found.state)
    assert accuracy(network.eval(), "false") >= 98


def test_training_and_test_digits_are_disjoint() -> None:
    first, second = open_data(DEMO_OPTIONS["data"]), open_data(DEMO_OPTIONS["eval"])
    assert (first.sample_count, second.sample_count) == (1297, 500)
    assert overlap(first, second) == 0


def test_the_packaged_digits_are_those_of_scikit_learn() -> None:
    digits = load_digits()
    for name, part in split_digits(digits.images, digits.target).items():
        source = open_data(f"digits?train={'true' if name == 'train' else 'false'}")
        batch = next(iter(source.batches(source.sample_count)))
        assert np.array_equal((batch.inputs[:, 0].numpy() * 255).round(), part["images"][..., 0])
        assert batch.labels is not None
        assert np.array_equal(batch.labels.numpy(), part["labels"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_digits_name_their_origin_and_licence(split: str) -> None:
    path = CHECKPOINT.parent.parent / "data" / f"digits_{split}.safetensors"
    with safe_open(path, framework="np") as file:
        note = file.metadata()
    assert "UCI" in note["source"]
    assert note["licence"] == "CC BY 4.0"


def test_training_is_deterministic() -> None:
    first, second = (train(epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(own, second[name]) for name, own in first.items())


def test_a_shift_moves_an_image_by_at_most_one_pixel() -> None:
    images = torch.zeros(200, 1, 8, 8)
    images[:, 0, 4, 4] = 1
    moved = shift_images(images, torch.Generator().manual_seed(0))
    assert (moved[:, 0, 3:6, 3:6].sum((1, 2)) == 1).all()
    assert (moved.sum((1, 2, 3)) == 1).all()

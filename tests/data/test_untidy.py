"""Data as people have them: deep pictures, notes of a file manager, parts taken for classes, labels as rows of ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import open_data
from compress.errors import DataError


def inputs_of(spec: object) -> torch.Tensor:
    """All of a source's inputs."""
    return torch.cat([batch.inputs for batch in open_data(str(spec)).batches(4)])


def test_a_picture_of_sixteen_bits_has_the_values_of_its_eight_bit_form(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (6, 6)).astype(np.uint16)
    for place, array in (("deep", values), ("plain", np.round(values / 257).astype(np.uint8))):
        (tmp_path / place).mkdir()
        Image.fromarray(array).save(tmp_path / place / "0.png")
    assert torch.allclose(inputs_of(tmp_path / "deep"), inputs_of(tmp_path / "plain"), atol=0.51 / 255)


def test_a_picture_of_numbers_without_a_range_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((6, 6), np.float32)).save(tmp_path / "0.tif")
    with pytest.raises(DataError, match=r"0\.tif.*range"):
        inputs_of(tmp_path)


def test_hidden_files_and_folders_are_no_samples(tmp_path: Path) -> None:
    for name in ("a", "b", "a/.ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    (tmp_path / "b" / "._0.png").write_bytes(b"a note")
    source = open_data(str(tmp_path))
    assert (source.sample_count, source.class_names) == (2, ("a", "b"))


def test_the_parts_of_a_data_set_are_not_taken_for_its_classes(tmp_path: Path) -> None:
    for part in ("test", "train"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / part / "cat" / "0.png")
    with pytest.raises(DataError, match=r"give one, such as .*test"):
        open_data(str(tmp_path))
    assert open_data(str(tmp_path / "train")).class_names == ("cat",)


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.bool_])
def test_rows_with_a_single_one_are_class_numbers(tmp_path: Path, kind: type) -> None:
    numbers = np.array([2, 0, 1, 1])
    np.savez(tmp_path / "data.npz", inputs=np.ones((4, 3)), labels=np.eye(3, dtype=kind)[numbers])
    labels = open_data(str(tmp_path / "data.npz")).labels
    assert labels is not None
    assert labels.tolist() == numbers.tolist()


def test_rows_of_several_yes_and_no_stay_as_they_are(tmp_path: Path) -> None:
    answers = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    np.savez(tmp_path / "data.npz", inputs=np.ones((3, 3)), labels=answers)
    labels = open_data(str(tmp_path / "data.npz")).labels
    assert labels is not None
    assert labels.tolist() == answers.tolist()


def test_words_for_labels_are_said_to_be_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.ones((4, 3)), labels=np.array(["cat", "dog", "cat", "dog"]))
    with pytest.raises(DataError, match="arrays of words are not read; save the classes' numbers"):
        open_data(str(tmp_path / "data.npz"))


@pytest.mark.parametrize(("options", "labelled"), [("?inputs=a,b", True), ("?inputs=a,b&labels=", False)])
def test_labels_count_where_only_the_inputs_are_named(tmp_path: Path, options: str, labelled: bool) -> None:
    np.savez(tmp_path / "data.npz", a=np.ones((4, 3)), b=np.ones((4, 2)), labels=np.arange(4))
    assert open_data(f"{tmp_path / 'data.npz'}{options}").has_labels is labelled

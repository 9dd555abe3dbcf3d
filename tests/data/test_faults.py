"""Faults of data and of the code that gives it: each one line that says what was found and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, TensorDataset

from compress.data import DataSource, open_data
from compress.data.opening import wrap_object
from compress.errors import DataError


def refused(spec: str) -> str:
    """The line with which data are refused when they are opened and read."""
    with pytest.raises(DataError) as caught:
        read(open_data(spec))
    assert "\n" not in str(caught.value)
    assert ".." not in str(caught.value)
    return str(caught.value)


def read(source: DataSource) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in source.batches(4)])


def test_other_names_in_an_archive_are_listed_with_how_to_rename_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((4, 3)), y=np.arange(4))
    message = refused(str(tmp_path / "data.npz"))
    assert "found `x`, `y`" in message
    assert "numpy.savez(NEW, inputs=old['x'], labels=old['y'])" in message


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_all_names_are_listed_where_only_the_labels_have_theirs(form: str, tmp_path: Path) -> None:
    arrays = {"image": np.ones((4, 3)), "features": np.ones((4, 2)), "labels": np.arange(4)}
    np.savez(tmp_path / "data.npz", **arrays)
    save_file(arrays, tmp_path / "data.safetensors")
    path = str(tmp_path / f"data.{form}")
    message = refused(path)
    assert "found `features`, `image`, `labels`" in message
    (option,) = re.findall(r"PATH(\?\S+?)\.?$", message)
    assert read(open_data(path + option)).shape == (4, 2)


def test_a_checkpoint_given_as_data_is_said_to_hold_no_arrays(tmp_path: Path) -> None:
    torch.save({"images": torch.ones(2, 3)}, tmp_path / "data.pt")
    assert "no .npz file" in refused(str(tmp_path / "data.pt"))


@pytest.mark.parametrize("kind", [float, np.float16, bool, np.int8])
def test_whole_labels_of_any_type_are_labels(tmp_path: Path, kind: Any) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.ones((4, 3)), labels=np.array([0, 1, 1, 0], kind))
    labels = open_data(str(tmp_path / "data.npz")).labels
    assert labels is not None
    assert (labels.tolist(), labels.dtype) == ([0, 1, 1, 0], np.int64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_changed_byte_of_an_array_in_an_archive_is_noticed(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "data.npz"
    save(path, inputs=np.arange(12, dtype="f4").reshape(4, 3))
    content = path.read_bytes()
    end = content.index(b"PK\x01\x02")
    for place in range(end - 40, end - 1):  # in the array's own bytes, in front of the directory of the archive
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError):
            read(open_data(str(path)))


class Items:
    """A data set of given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        if isinstance(self.items[number], Exception):
            raise self.items[number]
        return self.items[number]


SAMPLE = torch.ones(3)
FAULTY: dict[str, tuple[Any, str]] = {
    "items are dicts": (Items({"image": SAMPLE, "label": 1}), "dict of `image`, `label`"),
    "two inputs": (Items(((SAMPLE, torch.ones(2)), 1), ((SAMPLE, torch.ones(2)), 0)), "one array of numbers"),
    "an unequal pair": (Items((SAMPLE, 1), SAMPLE), "without a label"),
    "words as labels": (Items((SAMPLE, "cat"), (SAMPLE, "dog")), "labels must be whole numbers"),
    "labels of different shapes": (Items((SAMPLE, torch.ones(2)), (SAMPLE, torch.ones(3))), "different shapes"),
    "samples of different shapes": (Items(SAMPLE, torch.ones(4)), "different shapes"),
    "words": (Items("cat"), "one array of numbers"),
    "nothing in an item": (Items(()), "one array of numbers"),
    "not finite": (Items(SAMPLE, SAMPLE / 0), "sample 1 holds NaN or Inf"),
    "its own fault": (Items(SAMPLE, KeyError("lost")), "sample 1 cannot be read: KeyError: 'lost'"),
    "no samples": (Items(), "empty"),
    "a ragged list": ({"inputs": [[1, 2], [3]]}, "arrays of numbers"),
    "words in an array": ({"inputs": [["a", "b"]]}, "arrays of numbers"),
    "a sparse tensor": ({"inputs": torch.eye(3).to_sparse()}, "arrays of numbers"),
    "other names": ({"x": np.ones((4, 3)), 7: 1}, "found `7`, `x`"),
    "an iterator": (iter([SAMPLE]), "expected a mapping"),
    "nothing": (None, "expected a mapping"),
    "a number": (3, "expected a mapping"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_what_a_function_may_not_return_is_one_line(name: str) -> None:
    found, words = FAULTY[name]
    with pytest.raises(DataError, match=".*".join(words.split("*"))) as caught:
        read(wrap_object("own:data", found, None))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("own:data: ")


def test_a_function_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_data.py").write_text("def make(**options):\n    return options['count']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "the function fails: KeyError: 'count'" in refused("faulty_data:make")


def test_a_loader_gives_its_data_set() -> None:
    inputs = torch.arange(12.0).reshape(4, 3)
    loader = DataLoader(TensorDataset(inputs, torch.tensor([0, 1, 0, 1])), batch_size=2, shuffle=True)
    source = wrap_object("own:data", loader, None)
    assert torch.equal(read(source), inputs)
    assert source.labels is not None


def test_tokens_in_a_data_set_stay_whole_numbers() -> None:
    assert read(wrap_object("own:data", Items(torch.tensor([1, 2]), torch.tensor([3, 4])), None)).dtype == torch.int64

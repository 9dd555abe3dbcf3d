"""The written folder: what load() accepts and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.api.running import kept_of_original
from compress.artifact.folder import check_reload, load, write_artifact
from compress.checkpoint.building.builders import build_architecture
from compress.checkpoint.manifest import read_artifact, stored_state
from compress.errors import OutputError
from compress.measures.outputs import named_outputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small multilayer perceptron as an artifact, nothing cut."""
    module = build_architecture("compress:mlp", {"widths": [4, 6, 3]})
    config = {"architecture": {"spec": "compress:mlp", "arguments": {"widths": [4, 6, 3]}, "input_shape": [4]}}
    write_artifact(tmp_path, module.state_dict(), {**config, "shapes": {}, "attributes": {}}, {"recipe.yaml": ""})
    return tmp_path


def test_what_was_written_is_what_is_loaded(folder: Path) -> None:
    state = load(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in read_artifact(folder).state.items())


@pytest.mark.parametrize("how", ["as users get it", "as other tests do it"])
def test_another_process_loads_it_and_says_what_does_not_load(
    how: str, folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    if how == "as users get it":
        request.getfixturevalue("fresh_process")
    example, scratch = torch.linspace(-1, 1, 8).reshape(2, 4), tmp_path_factory.mktemp("scratch")
    with torch.inference_mode():
        expected = named_outputs(load(folder)(example))
    assert check_reload(folder, (example,), expected, 1e-6, scratch) <= 1e-6
    with pytest.raises(OutputError, match=r"another output|other outputs"):
        check_reload(folder, (example,), {name: tensor + 1 for name, tensor in expected.items()}, 1e-6, scratch)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"does not load in a fresh process: .*model\.safetensors"):
        check_reload(folder, (example,), expected, 1e-6, scratch)


def test_changed_weights_are_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="was changed"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format": 2}, "format 2"), ({"shapes": None}, "lacks shapes"), ({"hashes": None}, "lacks hashes")],
)
def test_a_foreign_or_damaged_manifest_is_refused(folder: Path, change: dict[str, object], words: str) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(OutputError, match=words):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(OutputError, match=r"config\.json"):
        load(folder)


def test_a_missing_file_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(OutputError, match="cannot be read"):
        load(folder)
    with pytest.raises(OutputError, match="manifest of a folder written by compress: No such file"):
        load(tmp_path / "nowhere")


def test_values_return_to_the_dtype_they_came_in() -> None:
    like = {"a": torch.zeros(2, dtype=torch.float16), "b": torch.zeros(1, dtype=torch.int64)}
    stored = stored_state({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}, like)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"a": torch.float16, "b": torch.int64}


def test_a_value_that_overflows_half_precision_is_refused() -> None:
    with pytest.raises(OutputError, match="overflows"):
        stored_state({"a": torch.tensor([1e6])}, {"a": torch.zeros(1, dtype=torch.float16)})


def test_units_kept_by_several_cuts_have_the_numbers_of_the_first_network() -> None:
    before = {"first": [0, 2, 5], "second": [1, 3], "third": [2]}
    kept = {"first": torch.tensor([1, 2]), "third": torch.tensor([0, 3]), "last": torch.tensor([4])}
    counts = {"first": 3, "second": 2, "third": 4, "last": 6}  # the third counts channels now, and not blocks
    numbers = kept_of_original(before, kept, counts)
    assert numbers == {"first": [2, 5], "second": [1, 3], "third": [0, 3], "last": [4]}

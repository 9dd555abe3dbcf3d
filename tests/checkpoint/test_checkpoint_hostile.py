"""Files made to harm: nothing in them is executed, none takes memory beyond its size, each gets one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint.reading import pickle_scan
from compress.checkpoint.reading.read import Checkpoint, load_checkpoint
from compress.errors import CheckpointError, CompressError, UnsupportedError, UntrustedPickleError


class Execute:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def assert_refused(path: Path, kind: type[CompressError] = CheckpointError, match: str = ".") -> None:
    with pytest.raises(kind, match=match) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def saved(value: Any) -> dict[str, bytes]:
    """The entries of a torch.save archive, by name."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def with_pickle(path: Path, content: bytes) -> None:
    """A torch.save archive whose object is another pickle."""
    entries = saved({"weight": torch.ones(4)})
    write_archive(path, {name: content if name.endswith("data.pkl") else own for name, own in entries.items()})


PAYLOADS: dict[str, Callable[[str], Any]] = {
    "system": lambda mark: Execute(os.system, f"touch {mark}"),
    "eval": lambda mark: Execute(eval, f"open({mark!r}, 'w')"),
    "getattr": lambda mark: Execute(getattr, Execute(__import__, "os"), "system"),
    "open": lambda mark: Execute(open, mark, "w"),
    "nested": lambda mark: {"state_dict": {"weight": torch.ones(2)}, "hook": [Execute(os.system, f"touch {mark}")]},
    "torch": lambda mark: Execute(torch.load, mark),
    "hub": lambda mark: Execute(torch.hub.load, "owner/name", "model"),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickles_that_call_functions_are_refused_unread(tmp_path: Path, payload: str, form: str) -> None:
    mark = tmp_path / "executed"
    value = PAYLOADS[payload](str(mark))
    path = tmp_path / "net.pt"
    if form == "plain":
        path.write_bytes(pickle.dumps(value, protocol=2 if payload != "nested" else 4))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    assert_refused(path, CompressError)
    assert not mark.exists()


def test_the_blocked_names_are_shown(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "x": Execute(os.system, "true")}, tmp_path / "net.pt")
    assert_refused(tmp_path / "net.pt", UntrustedPickleError, rf"{os.system.__module__}\.system.*--trust-pickle")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_names_are_found_in_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    with_pickle(tmp_path / "net.pt", pickle.dumps(Execute(os.system, f"touch {tmp_path / 'mark'}"), protocol))
    assert_refused(tmp_path / "net.pt", UntrustedPickleError, "system")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch mark'\ntR.",
        b"(S'touch mark'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch mark'\no.",
        b"\x80\x02cos\nsystem\n\x8c\x0atouch mark\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch mark\x85R.",
        b"\x80\x02cos\nsystem\n\x8c\x0atouch mark\x85\x81.",
    ],
)
def test_every_opcode_that_calls_is_inert(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_pickle(tmp_path / "net.pt", content)
    assert_refused(tmp_path / "net.pt", UntrustedPickleError, "os.system")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo index of 2³¹
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",  # a byte string of 2⁶⁰
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"x.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",  # nested deeply
        b"\x80\x02.",
        b"",
        b"\xff\xff\xff",
    ],
)
def test_malformed_pickles_are_refused_without_taking_memory(tmp_path: Path, content: bytes) -> None:
    with_pickle(tmp_path / "net.pt", content)
    assert_refused(tmp_path / "net.pt")


def reshaped(path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
    """A file whose tensor has four stored values and declares another shape."""

    class Lying:
        def __reduce__(self) -> Any:
            storage = torch.ones(4).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, offset, size, stride, False, {})

    torch.save({"weight": Lying()}, path)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 40,), (1,), 0),
        ((1 << 20, 1 << 20), (1 << 20, 1), 0),
        ((1 << 40,), (0,), 0),
        ((2, 2), (1, 1 << 50), 0),
        ((4,), (1,), 1),
        ((4,), (1,), -1),
        ((-1,), (1,), 0),
        ((5,), (1,), 0),
        ((2, 2), (2,), 0),
    ],
)
def test_declared_shapes_beyond_the_storage_are_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    reshaped(tmp_path / "net.pt", size, stride, offset)
    assert_refused(tmp_path / "net.pt", CheckpointError, "weight")


def test_a_transposed_view_of_its_own_storage_is_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "net.pt")
    assert load_checkpoint(tmp_path / "net.pt").state["weight"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_constructor_with_a_huge_size_is_not_called(tmp_path: Path) -> None:
    content = b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R."
    with_pickle(tmp_path / "net.pt", content)
    assert_refused(tmp_path / "net.pt", CheckpointError, r"calls torch\.Tensor")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, legacy: bool, fraction: float) -> None:
    path = tmp_path / "net.pt"
    torch.save({"weight": torch.randn(64, 64)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    assert_refused(path, CheckpointError)


def test_a_missing_or_short_storage_is_refused(tmp_path: Path) -> None:
    entries = saved({"weight": torch.ones(1000)})
    short = {name: own[:100] if name.endswith("data/0") else own for name, own in entries.items()}
    write_archive(tmp_path / "short.pt", short)
    assert_refused(tmp_path / "short.pt", CheckpointError, "declares 4000 bytes and holds 100")
    write_archive(tmp_path / "none.pt", {name: own for name, own in entries.items() if not name.endswith("data/0")})
    assert_refused(tmp_path / "none.pt", CheckpointError, "missing")


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    entries = saved({"weight": torch.zeros(4_000_000)})
    write_archive(tmp_path / "net.pt", entries, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "net.pt").stat().st_size < 100_000
    assert_refused(tmp_path / "net.pt", CheckpointError, "would unpack to")


def test_an_archive_with_paths_that_leave_it_writes_nothing(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write_archive(inner / "net.pt", {"../../escaped": b"x", "../escaped/data.pkl": b"x", "/escaped": b"x"})
    assert_refused(inner / "net.pt", CheckpointError)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inner"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"", CheckpointError, "is empty"),
        (b"layers: 3\nhidden: 512\n", CheckpointError, "text file"),
        ("Grüße an alle".encode(), CheckpointError, "text file"),
        (b"<html><body>404</body></html>", CheckpointError, "text file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), UnsupportedError, "HDF5"),
        (b"GGUF" + bytes(100), UnsupportedError, "GGUF"),
        (bytes(600), CheckpointError, "not a checkpoint"),
        (b"PK\x03\x04" + bytes(50), CheckpointError, "truncated or damaged"),
    ],
)
def test_files_that_are_no_checkpoint_are_told_apart(
    tmp_path: Path, content: bytes, kind: type[CompressError], words: str
) -> None:
    (tmp_path / "net.pt").write_bytes(content)
    assert_refused(tmp_path / "net.pt", kind, words)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.pt", CheckpointError, "There is no file")
    assert_refused(tmp_path, CheckpointError, "is not a file")


HEADERS: dict[str, dict[str, Any]] = {
    "overlapping": {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    },
    "beyond": {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
    "lying": {"a": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 32]}},
    "backwards": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    "overflow": {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 32]}},
    "dtype": {"a": {"dtype": "OS", "shape": [4], "data_offsets": [0, 16]}},
    "hole": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_with_false_offsets_are_refused(tmp_path: Path, name: str) -> None:
    header = json.dumps(HEADERS[name]).encode()
    (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    assert_refused(tmp_path / "net.safetensors", CheckpointError, "safetensors")


def test_safetensors_with_a_huge_header_length_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}" + bytes(32))
    assert_refused(tmp_path / "net.safetensors", CheckpointError, "safetensors")


def test_scanning_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap_module.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    scan = pickle_scan.scan_pickle(io.BytesIO(b"\x80\x02ctrap_module\nrun\n)R."), "trap")
    assert scan.blocked == ["trap_module.run"]
    assert not (tmp_path / "mark").exists()


def load_or_refuse(path: Path) -> Checkpoint | str:
    """The checkpoint, or the message with which it is refused; anything else is a fault of the reader."""
    try:
        return load_checkpoint(path)
    except CompressError as error:
        return str(error)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_mutated_files_end_in_one_line_or_are_read(tmp_path: Path, form: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "net.pt"
    state = {"fc.weight": torch.ones(6, 4), "fc.bias": torch.zeros(6)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(250):
        mutated = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8])):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        if draw.random() < 0.2:
            mutated = mutated[: draw.randrange(len(mutated))]
        path.write_bytes(mutated)
        found = load_or_refuse(path)
        if isinstance(found, str):
            assert "\n" not in found
        else:
            assert sum(tensor.numel() for tensor in found.state.values()) < 10_000

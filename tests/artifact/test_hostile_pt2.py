"""`.pt2` archives that would run code when torch reads or calls them: refused, and nothing of them runs."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.artifact.exports.pt2_check import EXPRESSION
from compress.artifact.exports.pt2_file import keeps_weights_raw, load_pt2, write_pt2
from compress.errors import OutputError, UnsupportedError

Members = dict[str, bytes]
pytestmark = pytest.mark.skipif(not keeps_weights_raw(), reason="this torch pickles the weights of a .pt2")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """Every member of a good archive."""
    path = tmp_path_factory.mktemp("good") / "model.pt2"
    write_pt2(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.zeros(2, 3), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def edit(members: Members, part: str, change: Callable[[dict[str, Any]], None]) -> Members:
    """The members with one JSON member changed."""
    name = f"model/{part}"
    value = json.loads(members[name])
    change(value)
    return {**members, name: json.dumps(value).encode()}


def pickled_weight(members: Members, canary: Path) -> Members:
    changed = {**members, "model/data/weights/weight_0": pickle.dumps(Payload(canary))}

    def mark(value: dict[str, Any]) -> None:
        next(iter(value["config"].values()))["use_pickle"] = True

    return edit(changed, "data/weights/model_weights_config.json", mark)


def pickled_constant(members: Members, canary: Path) -> Members:
    changed = {**members, "model/data/constants/opaque_obj_0": pickle.dumps(Payload(canary))}

    def add(value: dict[str, Any]) -> None:
        value["config"]["c"] = {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": False,
            "tensor_meta": None,
        }

    return edit(changed, "data/constants/model_constants_config.json", add)


def pickled_sample(members: Members, canary: Path) -> Members:
    return {**members, "model/data/sample_inputs/model.pt": pickle.dumps(Payload(canary))}


def legacy_weights(members: Members, canary: Path) -> Members:
    return {**members, "model/data/weights/model.pt": pickle.dumps(Payload(canary))}


def system_call(members: Members, canary: Path) -> Members:
    def call(value: dict[str, Any]) -> None:
        node = value["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.mkdir"
        node["inputs"] = [{"name": "path", "arg": {"as_string": str(canary)}, "kind": 1}]

    return edit(members, "models/model.json", call)


def evaluated_expression(members: Members, canary: Path) -> Members:
    code = f"__import__('os').mkdir({str(canary)!r})"

    def put(value: dict[str, Any]) -> None:
        text = json.dumps(value)
        assert '"expr_str": "' in text
        for size in value["graph_module"]["graph"]["tensor_values"].values():
            for side in size["sizes"]:
                if "as_expr" in side:
                    side["as_expr"]["expr_str"] = code

    return edit(members, "models/model.json", put)


def guard_code(members: Members, canary: Path) -> Members:
    code = f"__import__('os').mkdir({str(canary)!r})"
    return edit(members, "models/model.json", lambda value: value.update(guards_code=[code]))


def compiled_code(members: Members, _: Path) -> Members:
    return {**members, "model/data/aotinductor/model/run.so": b"\x7fELF"}


HOSTILE = [
    pickled_weight, pickled_constant, pickled_sample, legacy_weights, system_call, evaluated_expression, guard_code,
    compiled_code,
]  # fmt: skip


def pack(members: Members, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_archive_is_refused_and_runs_nothing(
    members: Members, attack: Callable[[Members, Path], Members], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(UnsupportedError, match="could execute") as caught:
        load_pt2(pack(attack(members, canary), tmp_path / "model.pt2"))
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_the_same_archive_repacked_unchanged_loads(members: Members, tmp_path: Path) -> None:
    found = load_pt2(pack(members, tmp_path / "model.pt2"))
    assert found(torch.zeros(5, 3)).shape == (5, 4)


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(members: Members, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("model/extra/zeros", bytes(80 * 2**20))
    with pytest.raises(OutputError, match="far more than its size"):
        load_pt2(path)


@pytest.mark.parametrize("name", ["model/models/model.json", "model/data/weights/model_weights_config.json"])
@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b"\xff", b"[" * 50_000, b"null"])
def test_a_damaged_member_is_one_fault(members: Members, name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises((OutputError, UnsupportedError)):
        load_pt2(pack({**members, name: content}, tmp_path / "model.pt2"))


def test_arithmetic_on_sizes_is_an_expression_and_a_call_of_something_else_is_not() -> None:
    good = ["s0", "3*s0 + 1", "Mul(Integer(3), Symbol('s34', positive=True, integer=True))", "Max(1, s0)"]
    bad = ["__import__('os')", "s0.__class__", "exec(s0)", "Symbol('a.b')", "lambda: 0", "open(1)", "s0[0]"]
    assert all(EXPRESSION.fullmatch(text) for text in good)
    assert not any(EXPRESSION.fullmatch(text) for text in bad)
    assert not EXPRESSION.fullmatch("1" * 100_000 + "!")

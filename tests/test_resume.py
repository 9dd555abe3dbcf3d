"""A killed run goes on where it stopped, with the bytes that an uninterrupted one writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.compression import sweep as sweeping
from compress.compression.layers.result import Settled
from compress.compression.resume import RunState
from compress.demo import DEMO_OPTIONS
from compress.errors import RecipeError

BASE: dict[str, Any] = {**DEMO_OPTIONS, "calibration_samples": 300, "macs": 0.4}


def recipe(folder: Path, **options: Any) -> compress.Recipe:
    return compress.make_recipe({**BASE, **options, "output": str(folder)})


class Killed(BaseException):
    """What a test puts in the place of a power cut."""


def run_until(kill_at: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumable run that ends when it would solve one more layer than `kill_at`."""
    solve, calls = sweeping.solve_layer, []

    def solve_or_die(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > kill_at:
            raise Killed
        return solve(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "solve_layer", solve_or_die)
        with pytest.raises(Killed):
            compress.run(recipe(folder), resume=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    compress.run(recipe(folder))
    return folder


@pytest.mark.parametrize("kill_at", [0, 1])
def test_a_resumed_run_writes_the_same_network(
    kill_at: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    run_until(kill_at, folder, monkeypatch)
    assert (tmp_path / "out.state" / "curves.safetensors").is_file()
    assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr("compress.compression.searching.curves.record_all", None)  # curves are not made again
        found = compress.run(recipe(folder), resume=True)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "out.state").exists()
    uninterrupted = json.loads((whole / "report.json").read_text())["layers"]
    certificates = [layer["certificate"] for layer in found.report.to_json()["layers"]]
    assert any(certificates)
    assert [layer["certificate"] for layer in uninterrupted] == certificates


@pytest.mark.parametrize(("changed", "named"), [({"macs": 0.5}, "macs"), ({"seed": 1}, "calibration|seed")])
def test_a_changed_run_is_refused_with_what_changed(
    changed: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(0, tmp_path / "out", monkeypatch)
    with pytest.raises(RecipeError, match=named):
        compress.run(recipe(tmp_path / "out", **changed), resume=True)


def test_a_damaged_state_file_is_recomputed(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    run_until(1, folder, monkeypatch)
    for path in (tmp_path / "out.state").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    compress.run(recipe(folder), resume=True)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_whatever_byte_of_a_kept_turn_or_curve_is_damaged_it_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(1, tmp_path / "out", monkeypatch)
    draw = random.Random(0)
    for path in (tmp_path / "out.state").glob("*.safetensors"):
        sound = path.read_bytes()
        state = RunState(path.parent, path.stem.rpartition("-")[0])
        read = state.read_curves if path.stem == "curves" else lambda state=state: state.read_turn(0)
        assert read() is not None
        for _ in range(60):
            damaged = bytearray(sound)
            damaged[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged[: draw.choice((len(sound), len(sound), draw.randrange(len(sound))))])
            assert read() is None
        path.write_bytes(sound)


def test_sweeps_of_other_widths_have_their_own_state(tmp_path: Path) -> None:
    state = RunState.open(tmp_path / "state", {"model": "a"})
    first, second = state.of_sweep("rule", {"a": 1}), state.of_sweep("rule", {"a": 2})
    first.write_turn(0, Settled({}))
    assert first.read_turn(0) is not None
    assert second.read_turn(0) is None

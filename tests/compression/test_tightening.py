"""The default rule: outputs that moved too far hold the layers that moved them most to smaller errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.compression import sweep as sweeping
from compress.compression.layers.decisions import Width, Within, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.problem import Problem
from compress.compression.searching import tightening
from compress.compression.searching.foresight import expected_distance
from compress.compression.searching.tightening import added_distances, common_cap, stricter, sweep_within
from compress.compression.sweep import Compressed, sweep
from compress.demo import DEMO_OPTIONS
from compress.errors import NothingToCompressError
from compress.progress import SilentProgress
from compress.recording import originals
from tests.compression.test_schedule import make_problem

TOLERANCE = 0.3
OPTIONS = LayerOptions(certify=False)


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A wide layer that the outputs hardly feel, and a narrow one that everything behind it reads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide, narrow = nn.Linear(12, 48), nn.Linear(48, 8)
        module = nn.Sequential(wide, nn.ReLU(), narrow, nn.ReLU(), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
        with torch.no_grad():
            wide.weight[12:] = wide.weight[:12].repeat(3, 1)  # four of each
            wide.bias[12:] = wide.bias[:12].repeat(3)
            module[-1].weight *= 4
    return make_problem(module, 12)


@pytest.fixture(scope="module")
def alone(problem: Problem) -> Compressed:
    """What the layers' tolerance alone comes to."""
    return sweep(problem, same_for_all(problem.groups, Within(TOLERANCE)), OPTIONS, SilentProgress())


def moved(compressed: Compressed) -> float:
    assert compressed.held_back is not None
    return compressed.held_back.distance


def held_to_a_quarter(problem: Problem, alone: Compressed) -> tuple[Compressed, str]:
    """What comes of a quarter of what the tolerance alone came to, within it and cut no further; what is said of it."""
    allowed, progress = moved(alone) / 4, SilentProgress()
    found = sweep_within(problem, TOLERANCE, allowed, OPTIONS, progress)
    assert moved(found) <= allowed
    assert found.results[0].is_cut
    assert all(len(now.kept) >= len(before.kept) for now, before in zip(found.results, alone.results, strict=True))
    (note,) = progress.notes
    return found, note


def test_held_back_outputs_stay_within_their_tolerance(problem: Problem, alone: Compressed) -> None:
    found, note = held_to_a_quarter(problem, alone)
    assert f"by {moved(found):.3g}" in note
    assert "would move" in note  # said of what was foreseen and watched


@pytest.mark.parametrize("written", [0, 3])
def test_what_is_decided_does_not_depend_on_room_for_the_original(
    problem: Problem, alone: Compressed, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """With none from the beginning, and where the disk is full after a few tensors."""
    allowed, write, number = moved(alone) / 4, originals.Originals._write, itertools.count()
    expected = sweep_within(problem, TOLERANCE, allowed, OPTIONS, SilentProgress())

    def written_while_there_is_room(self: originals.Originals, file: Any, tensor: torch.Tensor) -> Any:
        if next(number) >= written:
            raise OSError("No space left on device")
        return write(self, file, tensor)

    monkeypatch.setattr(originals.Originals, "_write", written_while_there_is_room)
    if not written:
        monkeypatch.setattr(originals, "KEPT_BYTES", 0)
    progress = SilentProgress()
    found = sweep_within(problem, TOLERANCE, allowed, OPTIONS, progress)
    assert [layer.kept.tolist() for layer in found.results] == [layer.kept.tolist() for layer in expected.results]
    assert "would move" in progress.notes[0]


def test_what_kept_every_unit_is_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(NothingToCompressError, match="--tolerance 1e-06 and --output-tolerance"):
        compress.prune(net, [torch.randn(60, 8)], tolerance=1e-6, progress=False)
    with pytest.raises(NothingToCompressError, match="allow more with --error or --keep"):
        compress.prune(net, [torch.randn(60, 8)], error=1e-6, progress=False)


def test_without_foresight_the_network_is_compressed_anew(
    problem: Problem, alone: Compressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tightening, "expected_distance", lambda *_: 0.0)
    found, note = held_to_a_quarter(problem, alone)
    assert f"by {moved(alone):.3g}" in note
    assert f"by {moved(found):.3g}" in note


def test_where_the_outputs_moved_no_further_nothing_is_measured_or_changed(
    problem: Problem, alone: Compressed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tightening, "measure_cuts", None)
    progress = SilentProgress()
    expected = expected_distance(problem, TOLERANCE, progress, None)
    found = sweep_within(problem, TOLERANCE, 1.01 * max(expected, moved(alone)), OPTIONS, progress)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in alone.state.items())
    assert progress.notes == []


def test_what_no_error_of_a_layer_brings_down_is_warned_of(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tightening, "MOST_AGAIN", 0)
    monkeypatch.setattr(tightening, "expected_distance", lambda *_: 0.0)
    progress = SilentProgress()
    found = sweep_within(problem, TOLERANCE, 1e-6, OPTIONS, progress)
    assert [note.split(":")[0] for note in progress.notes] == ["warning"]
    assert f"{moved(found):.3g}" in progress.notes[0]


def test_what_the_layers_add_is_what_the_network_comes_to(problem: Problem, alone: Compressed) -> None:
    problem = replace(problem, groups=problem.groups[:2])
    found = sweep(problem, same_for_all(problem.groups, Within(TOLERANCE)), OPTIONS, SilentProgress())
    added = added_distances(problem, found, SilentProgress())
    assert list(added) == [layer.name for layer in found.results if layer.is_cut]
    assert all(rise > 0 for rise in added.values())  # else what fell would be left out of the sum
    assert sum(added.values()) == pytest.approx(moved(found))


def test_tolerances_fall_where_most_is_added_and_what_adds_far_more_before_the_last_sweep_stays_whole() -> None:
    groups = [SimpleNamespace(name=name, unit_count=16) for name in "abcd"]
    plan = same_for_all(groups, Within(0.1))  # type: ignore[arg-type]
    added = {"a": 0.001, "b": 0.5, "c": 0.006, "d": 0.0}
    found = stricter(groups, plan, added, 0.011, last=False)  # type: ignore[arg-type]
    errors = {name: decision.error for name, decision in found.items() if isinstance(decision, Within)}
    assert {name for name in errors if errors[name] == 0.1} == {"a", "d"}
    left = {name: added[name] * (errors[name] / 0.1) ** 2 for name in added}
    assert sum(left.values()) == pytest.approx(0.011, rel=1e-3)
    assert left["b"] == pytest.approx(left["c"], rel=1e-3)
    last = stricter(groups, plan, added, 0.011, last=True)  # type: ignore[arg-type]
    assert isinstance(last["b"], Width)
    assert last["b"].count == 16
    assert {name: decision for name, decision in last.items() if name != "b"} == {
        name: decision for name, decision in found.items() if name != "b"
    }
    assert stricter(groups, plan, added, 1.0, last=True) == plan  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [0.1, 1.5, 5.9])
def test_a_common_cap_spends_the_total(total: float) -> None:
    values = [2.0, 1.0, 3.0]
    cap = common_cap(values, total)
    assert sum(min(value, cap) for value in values) == pytest.approx(total)
    assert common_cap(values, 6.1) == math.inf


def test_a_run_that_is_ended_in_a_further_sweep_and_resumed_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    options = {**DEMO_OPTIONS, "calibration_samples": 300, "tolerance": TOLERANCE, "output_tolerance": 0.005}
    first, again = (compress.make_recipe({**options, "output": str(tmp_path / name)}) for name in ("first", "again"))
    notes = compress.run(first).report.notes
    assert any("--output-tolerance" in note for note in notes)
    solve, calls = sweeping.solve_layer, []

    def solve_or_die(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) > 6:  # four layers a sweep
            raise Killed
        return solve(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "solve_layer", solve_or_die)
        with pytest.raises(Killed):
            compress.run(again, resume=True)
    found = compress.run(again, resume=True)
    assert found.report.notes == notes
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert written[0] == written[1]

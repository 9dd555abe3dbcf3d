"""What the original network gives is kept once, and sweeps of the other network alone come to the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import compress.compression.known as known_rows
from compress.compression.known import KnownOriginal, keep_original
from compress.compression.layers.decisions import Keep, Width, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.problem import Problem, record_all
from compress.compression.sweep import Compressed, refine, sweep
from compress.graph.trace import trace_network
from compress.progress import SilentProgress
from compress.recording.originals import Originals
from compress.units.find import find_filters
from tests.compression.test_schedule import Residual, make_problem
from tests.recording.test_filters import Inverted

OPTIONS = LayerOptions(certify=False)


def problem_of(module: nn.Module, channels: int) -> Problem:
    problem = make_problem(module, channels, 8, 8)
    return replace(problem, filters=find_filters(trace_network(module, (torch.randn(2, channels, 8, 8),))))


@pytest.fixture(params=["residual", "inverted"])
def problem(request: pytest.FixtureRequest) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return problem_of(Residual().eval(), 3) if request.param == "residual" else problem_of(Inverted().eval(), 4)


def swept(problem: Problem, known: KnownOriginal | None) -> tuple[Compressed, Compressed]:
    first = sweep(problem, same_for_all(problem.groups, Keep(0.5)), OPTIONS, SilentProgress(), known=known)
    return first, refine(problem, first, OPTIONS, SilentProgress(), sweeps=1, known=known)


def test_sweeps_of_the_compressed_network_alone_come_to_the_same(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = KnownOriginal(problem, rectified=True)
    record_all(problem, SilentProgress(), known.keepers)
    assert known.serves(problem.turns(), rectified=True)
    alone = swept(problem, known)
    monkeypatch.setattr("compress.compression.sweep.keep_original", lambda *_: None)
    for found, wanted in zip(alone, swept(problem, None), strict=True):
        for name, tensor in wanted.state.items():
            torch.testing.assert_close(found.state[name], tensor, rtol=1e-5, atol=1e-6)
        assert found.held_back is not None
        assert wanted.held_back is not None
        assert found.held_back.distance == pytest.approx(wanted.held_back.distance, rel=1e-3)


def test_some_of_the_units_are_recorded_on_rows_that_were_kept_for_all(problem: Problem) -> None:
    known = keep_original(problem, SilentProgress())
    assert known is not None
    group = problem.groups[0]
    plan = {**same_for_all(problem.groups, Keep(0.5)), group.name: Width(2, torch.tensor([0, 1, 3]))}
    found = sweep(problem, plan, OPTIONS, SilentProgress(), facts={}, known=known)
    assert set(found.kept[group.name].tolist()) <= {0, 1, 3}


def test_without_room_both_networks_run(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.recording.originals.KEPT_BYTES", 1000)
    assert known_rows.know_original(problem, rectified=True) is None
    assert keep_original(problem, SilentProgress()) is None
    assert swept(problem, None)[0].results


def test_a_full_disk_only_means_that_nothing_is_known(problem: Problem) -> None:
    known = KnownOriginal(problem, rectified=False)
    known._originals.room = 1000.0
    record_all(problem, SilentProgress(), known.keepers)
    assert not known.serves(problem.turns(), rectified=False)


def test_the_folder_goes_with_the_object() -> None:
    originals = Originals()
    folder = originals.folder
    assert folder.exists()
    del originals
    assert not folder.exists()

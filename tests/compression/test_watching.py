"""A sweep that is watched: what random errors foretell, what the outputs make of each cut, smaller errors for it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.compression.frontier import Frontier
from compress.compression.known import keep_original
from compress.compression.layers.decisions import Decision, Width, Within, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.layers.refit import held_back_error
from compress.compression.layers.result import Watched
from compress.compression.problem import Problem, record_all
from compress.compression.searching import foresight
from compress.compression.searching.damage import Cut, measure_cuts
from compress.compression.searching.foresight import disturbed_layers, expected_distance, joined
from compress.compression.sweep import sweep
from compress.compression.watching import FEWER_SHARES, Watch
from compress.progress import SilentProgress
from compress.recording import originals
from tests.compression.test_schedule import make_problem

OPTIONS = LayerOptions(certify=False)


@pytest.fixture(scope="module")
def problem() -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()]
        module = nn.Sequential(*layers, nn.Linear(16, 4))
    return make_problem(module, 12)


def group_of(name: str = "a", units: int = 16) -> Any:
    return SimpleNamespace(name=name, unit_count=units)


def layer_of(kept: int, units: int = 16) -> Any:
    return SimpleNamespace(is_cut=kept < units, weights={"kept": torch.tensor(kept)})


def test_every_layer_is_disturbed_by_the_error_that_is_asked_for(problem: Problem) -> None:
    recorded = record_all(problem, SilentProgress())
    cuts = disturbed_layers(problem, 0.1)
    assert [cut.name for cut in cuts] == [group.name for group in problem.groups]
    for cut, group in zip(cuts, problem.groups, strict=True):
        moments = recorded.moments[group.name]
        every = torch.arange(group.unit_count)
        error = held_back_error(moments, every, problem.state, {**problem.state, **cut.weights})
        assert error == pytest.approx(0.1, rel=0.25)  # sized on one batch, measured on others
        assert set(cut.weights) == {group.consumers[0].weight, group.consumers[0].bias}


def test_a_layer_that_never_fires_is_not_disturbed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
        with torch.no_grad():
            module[0].bias.fill_(-1e4)
    problem = make_problem(module, 6)
    first, second = disturbed_layers(problem, 0.1)
    assert not first.weights
    assert not second.weights  # behind it nothing moves either
    assert expected_distance(problem, 0.1, SilentProgress(), None) == 0


def test_weights_that_are_too_many_are_left_alone(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expected_distance(replace(problem, memory=1000), 0.1, SilentProgress(), None) == 0
    monkeypatch.setattr(foresight, "LARGEST", 24 * 16)
    assert [bool(cut.weights) for cut in disturbed_layers(problem, 0.1)] == [False, True, True]


def test_disturbances_of_one_tensor_add_up(problem: Problem) -> None:
    name = problem.groups[0].consumers[0].weight
    once = Cut("a", 1, {name: problem.state[name] + 1}, ())
    twice = joined(problem, [once, once])
    torch.testing.assert_close(twice.weights[name], problem.state[name] + 2)


def test_more_is_expected_of_larger_errors(problem: Problem) -> None:
    known = keep_original(problem, SilentProgress())
    small, large = (expected_distance(problem, error, SilentProgress(), known) for error in (0.01, 0.1))
    assert large == pytest.approx(100 * small, rel=0.5)  # distances grow as squares


@pytest.mark.parametrize("added", [0.001, 0.1])
def test_what_adds_more_than_its_part_is_held_to_a_smaller_error(added: float) -> None:
    """Distances grow as the square of the error; 0.02 in all, for ten layers."""
    asked: list[Decision] = []

    def solve(decision: Decision) -> Any:
        asked.append(decision)
        return layer_of(round(16 - 100 * decision.error) if isinstance(decision, Within) else 16)

    def look(layer: Any, samples: int) -> float:
        assert samples == 7
        return added * ((16 - int(layer.weights["kept"])) / 5) ** 2

    watch = Watch(0.02, 10, 7)
    layer = watch.settle(group_of(), Within(0.05), solve, look)
    if added < 0.008:
        assert asked == [Within(0.05)]
        assert not watch.stricter
    else:
        assert asked[1] == Within(pytest.approx(0.05 * math.sqrt(FEWER_SHARES * 0.002 / added), rel=1e-3))
        assert watch.stricter == {"a": asked[-1]}
    assert watch.reached == look(layer, 7) <= 0.008


def test_what_still_adds_too_much_stays_whole() -> None:
    watch = Watch(0.02, 10, 5)
    solved: list[Decision] = []

    def solve(decision: Decision) -> Any:
        solved.append(decision)
        return layer_of(16 if isinstance(decision, Width) else 15)

    layer = watch.settle(group_of(), Within(0.05), solve, lambda *_: 1.0)
    assert not layer.is_cut
    assert isinstance(solved[-1], Width)
    assert solved[-1].count == 16
    assert watch.reached == 0
    resumed = Watch(0.02, 10, 5)
    resumed.go_on(group_of(), watch.watched(group_of()))
    assert resumed.left == 9
    assert isinstance(resumed.stricter["a"], Width)


def test_a_distance_that_is_no_number_changes_nothing() -> None:
    watch = Watch(0.02, 10, 5, reached=0.001)
    watch.settle(group_of(), Within(0.05), lambda _: layer_of(15), lambda *_: math.nan)
    assert watch.reached == 0.001
    assert watch.watched(group_of("b")) == Watched(0.001)


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_seen_in_a_sweep_is_what_the_whole_network_comes_to(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Where the original's outputs are kept, and where there was no room for them."""
    seen: list[tuple[dict[str, Tensor], float]] = []
    look = Frontier.distance

    def looked(self: Frontier, state: dict[str, Tensor], kept: dict[str, Tensor], samples: int) -> float:
        seen.append((state, look(self, state, kept, samples)))
        return seen[-1][1]

    monkeypatch.setattr(Frontier, "distance", looked)
    watch = Watch(1.0, len(problem.groups), problem.held_back.count)
    plan = same_for_all(problem.groups, Within(0.2))
    if not kept:
        monkeypatch.setattr(originals, "KEPT_BYTES", 0)
    known = keep_original(problem, SilentProgress())
    assert (known is not None) == kept
    found = sweep(problem, plan, OPTIONS, SilentProgress(), known=known, watch=watch)
    assert [layer.is_cut for layer in found.results].count(True) == len(seen) > 1
    for state, distance in seen:
        cut = Cut("all", 0, state, ())
        (whole,) = measure_cuts(problem, [cut], samples=problem.held_back.count)
        assert distance == pytest.approx(whole, rel=1e-5)
    assert watch.left == 0
    assert watch.reached == seen[-1][1]

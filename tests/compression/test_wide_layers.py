"""Layers whose units have many columns: chosen by what they give to the outputs, refitted on the columns themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compress.compression.layers.refit as refit
import compress.recording.layer_moments as layer_moments
from compress.compression.layers.decisions import Keep, Width, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.problem import Problem, record_all
from compress.compression.sweep import sweep
from compress.progress import SilentProgress
from tests.compression.test_schedule import make_problem

OPTIONS = LayerOptions(certify=False)


@pytest.fixture
def problem() -> Problem:
    """Twelve units, of which two are read with no weight, in front of a window of 16 taps and three outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(75, 2)]
        module = nn.Sequential(*layers).eval()
        with torch.no_grad():
            module[2].weight[:, [2, 9]] = 0.0  # type: ignore[operator,union-attr,index]
        return make_problem(module, 3, 8, 8)


def test_units_of_many_columns_are_chosen_by_their_contributions(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = problem.groups[0]
    moments = record_all(problem, SilentProgress()).moments[group.name]
    assert moments.for_selection(problem.state).group_size == 16
    monkeypatch.setattr(layer_moments, "WIDE", 100)
    assert moments.for_selection(problem.state).group_size == 3
    plan = {**same_for_all(problem.groups, Keep(1.0)), group.name: Width(10)}
    result = next(each for each in sweep(problem, plan, OPTIONS, SilentProgress()).results if each.name == group.name)
    assert set(range(12)) - set(result.kept.tolist()) == {2, 9}
    assert result.report.fit.held_back_error is not None
    assert result.report.fit.held_back_error < 1e-3


def test_where_columns_are_many_few_ridges_are_tried(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    solve = refit.solve_ridged

    def counted(moments, ridge):  # type: ignore[no-untyped-def]
        tried.append(ridge)
        return solve(moments, ridge)

    monkeypatch.setattr(refit, "solve_ridged", counted)
    monkeypatch.setattr(refit, "WIDE", 10)
    sweep(problem, same_for_all(problem.groups, Keep(0.5)), OPTIONS, SilentProgress())
    assert set(tried) & set(refit.FEW_RIDGES)
    assert not set(tried) & (set(refit.STRONGER_RIDGES) - set(refit.FEW_RIDGES))

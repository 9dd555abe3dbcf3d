"""Latency tables: interpolation, attribution, agreement with the budget's arithmetic. No clock is asserted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.compression.costs import cost_model
from compress.compression.latency import FRACTIONS, LatencyModel, TimedMap, interpolate, measure_latency_model
from tests.compression.test_schedule import make_problem


def test_interpolation_meets_the_table_and_is_linear_between() -> None:
    values = [1.0, 2.0, 5.0, 6.0, 9.0]
    assert [interpolate(values, at) for at in FRACTIONS] == values
    assert interpolate(values, 0.625) == pytest.approx(5.5)
    assert interpolate(values, 0.01) == 1.0


def proportional(out: str, into: str, whole: float) -> TimedMap:
    """A map of 8 by 8 channels whose time is proportional to both."""
    times = tuple(tuple(whole * a * b for b in FRACTIONS) for a in FRACTIONS)
    return TimedMap(((8, ((out, 1),)), (8, ((into, 1),))), times)


def test_the_time_of_a_chain_falls_with_both_sides_of_every_map() -> None:
    model = LatencyModel((proportional("b", "a", 10.0), proportional("c", "b", 6.0)), fixed=1.0)
    assert model.milliseconds({}) == pytest.approx(17.0)
    assert model.milliseconds({"b": 4}) == pytest.approx(1 + 5 + 3)
    assert model.milliseconds({"b": 4}, "c") == pytest.approx(1 + 3)


def test_the_correction_applies_to_cut_networks_only() -> None:
    model = LatencyModel((proportional("b", "a", 10.0),), fixed=0.0, scale=1.5)
    assert model.milliseconds({"a": 0}) == pytest.approx(10.0)
    assert model.milliseconds({"a": 4}) == pytest.approx(7.5)


def test_all_maps_of_a_network_are_timed_and_add_up_to_its_whole_time() -> None:
    module = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    problem = make_problem(module, 6)
    costs = cost_model(problem.program, problem.groups, dict(module.named_parameters()), problem.forward_macs)
    model = measure_latency_model(problem.program, costs.tensors, problem.state, whole=2.5)
    assert len(model.maps) == 3
    assert model.milliseconds({}) == pytest.approx(2.5)
    names = [group.name for group in problem.groups]
    assert [each.depends_on(names[0]) for each in model.maps] == [True, True, False]


def test_a_profile_differs_from_the_total_by_a_constant() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    problem = make_problem(module, 6)
    first, second = (group.name for group in problem.groups)
    costs = cost_model(problem.program, problem.groups, dict(module.named_parameters()), problem.forward_macs)
    table = LatencyModel((proportional(second, first, 10.0),), fixed=1.0)
    model = type(costs)(costs.units, costs.tensors, costs.fixed_macs, table)
    legal = (2, 4, 6)
    for cost in model.costs:
        profile = model.profile(cost, {second: 4}, first, legal)
        totals = torch.tensor([model.total(cost, {first: width, second: 4}) for width in legal], dtype=torch.float64)
        torch.testing.assert_close(profile - profile[0], totals - totals[0])

"""Latency tables: interpolation, attribution, agreement with the budget's arithmetic. No clock is asserted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.execution import Execution
from compress.compression.pricing import latency
from compress.compression.pricing.costs import cost_model
from compress.compression.pricing.latency import (
    LatencyModel,
    TimedMap,
    Timing,
    measure_latency_model,
    spread_rest,
    time_widths,
    timed_widths,
)
from compress.compression.searching import search
from compress.graph.ops import LinearMap
from compress.units.forms import Form
from tests.compression.test_schedule import make_problem


def test_times_between_measured_widths_are_linear_and_nothing_takes_no_time() -> None:
    asked: list[int] = []

    def timed(width: int) -> float:
        asked.append(width)
        return float(width)

    found = time_widths(timed, 200)
    assert found[0] == 0.0
    assert torch.allclose(found[max(1, min(asked)) :], torch.arange(max(1, min(asked)), 201, dtype=torch.float64))
    assert len(asked) < 60


def test_blocks_of_channels_and_what_lies_beside_them_are_timed() -> None:
    assert sorted(timed_widths(9)) == list(range(1, 10))
    assert {63, 64, 128, 127} <= set(timed_widths(768))


def proportional(out: str, into: str, whole: float) -> TimedMap:
    """A map of 8 by 8 channels whose time is proportional to both."""
    times = whole * torch.arange(9, dtype=torch.float64) / 8
    return TimedMap("", ((8, ((out, 1),)), (8, ((into, 1),))), times, times)


def test_what_no_map_explains_is_told_apart_by_a_half_of_the_network() -> None:
    timed = [(proportional("b", "a", 10.0), 100)]
    model = spread_rest(timed, [14.0, 2.5 + 2.0 + 1.0], {"a": 4, "b": 4})  # rest 4: 2 shrink to 1, 2 stay
    assert model.milliseconds({}) == pytest.approx(14.0)
    assert model.maps[0].fixed == pytest.approx(2.0)
    assert model.milliseconds({"a": 8, "b": 8}) == 0.0


def test_a_profile_sees_every_step_of_a_map() -> None:
    steps = torch.tensor([0.0, 2, 2, 2, 2, 3, 3, 3, 3], dtype=torch.float64)
    flat = torch.full((9,), 3.0, dtype=torch.float64)
    model = LatencyModel((TimedMap("", ((8, (("a", 1),)), (8, ())), steps, flat),), 0.0)
    assert model.profile({}, "a", [8, 4, 3, 0]).tolist() == [0.0, 2.0, 3.0, 3.0]


def test_the_time_of_a_chain_falls_with_both_sides_of_every_map() -> None:
    model = LatencyModel((proportional("b", "a", 10.0), proportional("c", "b", 6.0)), fixed=1.0)
    assert model.milliseconds({}) == pytest.approx(17.0)
    assert model.milliseconds({"b": 4}) == pytest.approx(1 + 5 + 3)
    assert model.profile({}, "c", [4]).tolist() == pytest.approx([3.0])


def test_the_correction_applies_to_cut_networks_only() -> None:
    model = LatencyModel((proportional("b", "a", 10.0),), fixed=0.0, scale=1.5)
    assert model.milliseconds({"a": 0}) == pytest.approx(10.0)
    assert model.milliseconds({"a": 4}) == pytest.approx(7.5)


def test_all_maps_of_a_network_are_timed_and_add_up_to_its_whole_time() -> None:
    module = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    problem = make_problem(module, 6)
    costs = cost_model(problem.program, problem.groups, dict(module.named_parameters()), problem.forward_macs)
    model = measure_latency_model(problem.network, problem.groups, costs.tensors, Timing(3, 1), Form())
    assert [each.name for each in model.maps] == ["0", "2", "4"]
    assert model.milliseconds({}) > 0
    names = [group.name for group in problem.groups]
    assert [each.depends_on(names[0]) for each in model.maps] == [True, True, False]


def test_maps_are_timed_as_the_network_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    problem = make_problem(module, 3, 8, 8)
    costs = cost_model(problem.program, problem.groups, dict(module.named_parameters()), problem.forward_macs)
    form = Form(execution=Execution(channels_last=True))
    seen: set[tuple[int, bool, bool]] = set()

    def time_once(linear: LinearMap, shape: tuple[int, ...], weight: Tensor, timing: Timing) -> float:
        laid_out = timing.laid_out(weight)
        seen.add((weight.ndim, timing.channels_last, laid_out.is_contiguous()))
        return 1.0

    monkeypatch.setattr(latency, "time_once", time_once)
    timing = Timing(2, 1, channels_last=True)
    model = measure_latency_model(problem.network, problem.groups, costs.tensors, timing, form)
    assert (4, True, False) in seen
    assert (2, True, True) in seen
    assert costs.original("macs") == problem.forward_macs
    assert model.original > 0
    assert model.original != model.milliseconds({})  # the network was timed as it was given, too


@pytest.mark.parametrize(
    ("timings", "said", "asked"), [([0.58, 0.66], 0.66, 2), ([0.58, 0.57], 0.58, 2), ([0.7], 0.7, 1)]
)
def test_what_seems_fast_enough_is_timed_again(
    monkeypatch: pytest.MonkeyPatch, timings: list[float], said: float, asked: int
) -> None:
    left = iter(timings)
    monkeypatch.setattr(search, "time_allocation", lambda *_: next(left))
    assert search.doubted_time(None, {}, 0.6) == said  # type: ignore[arg-type]
    assert len(list(left)) == len(timings) - asked


def test_a_profile_differs_from_the_total_by_a_constant() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    problem = make_problem(module, 6)
    first, second = (group.name for group in problem.groups)
    costs = cost_model(problem.program, problem.groups, dict(module.named_parameters()), problem.forward_macs)
    table = LatencyModel((proportional(second, first, 10.0),), fixed=1.0)
    model = type(costs)(costs.units, costs.tensors, costs.fixed_macs, table)
    legal = (2, 4, 6)
    for cost in model.costs:
        profile = model.profile(cost, {second: 4}, first, torch.tensor(legal))
        totals = torch.tensor([model.total(cost, {first: width, second: 4}) for width in legal], dtype=torch.float64)
        torch.testing.assert_close(profile - profile[0], totals - totals[0])

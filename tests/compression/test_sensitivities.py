"""What is measured before widths are chosen: divergences, and how many samples they are worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress.compression.known import keep_original
from compress.compression.layers.decisions import Width
from compress.compression.layers.layer import LayerOptions, LayerProblem, solve_layer
from compress.compression.layers.refit import refit_layer
from compress.compression.problem import record_all
from compress.compression.searching.curves import FEWEST_SENSITIVITY_SAMPLES, affordable_samples, find_curve
from compress.compression.searching.damage import Cut, measure_cuts, measure_divergences
from compress.measures.outputs import Distances
from compress.progress import SilentProgress
from tests.compression.test_schedule import Residual, make_problem


@pytest.fixture(name="module")
def fixture_module() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def test_divergences_are_those_of_the_whole_network_with_the_refitted_layer(module: nn.Module) -> None:
    problem = make_problem(module, 3, 6, 6)
    recorded, options = record_all(problem, SilentProgress()), LayerOptions()
    curves = {
        group.name: find_curve(problem, group, recorded.moments[group.name], options)[0] for group in problem.groups
    }
    widths = {name: [3, 7] for name in curves}
    samples = problem.held_back.count
    measured = measure_divergences(problem, recorded.moments, curves, widths, options, samples=samples)
    known = keep_original(problem, SilentProgress())
    assert known is not None
    assert known.held_back_outputs(0) is not None
    assert measured == measure_divergences(
        problem, recorded.moments, curves, widths, options, samples=samples, known=known
    )
    inputs = torch.cat([problem.held_back.read(number)[0] for number in range(len(problem.held_back.sizes()))])
    (output,) = problem.outputs
    with torch.inference_mode():
        before = module(inputs)
        for name, pairs in measured.items():
            for width, distance in pairs:
                kept = curves[name].units(width)
                weights = refit_layer(recorded.moments[name], kept, options.ridge, problem.state, problem.state).weights
                after: Tensor = torch.func.functional_call(module, weights, (inputs,))
                sums = Distances(problem.outputs)
                sums.start({output.name: before}, samples)
                sums.add(0, {output.name: before}, {output.name: after}, samples)
                assert distance == pytest.approx(sums.weighted()[0], rel=1e-3)
        assert [width for pairs in measured.values() for width, _ in pairs] == [3, 7] * len(curves)


def test_sensitivities_take_fewer_samples_the_more_cuts_there_are(module: nn.Module) -> None:
    problem = make_problem(module, 3, 6, 6)
    held_back = replace(problem.held_back, indices=torch.arange(2000))
    problem = replace(problem, calibration=replace(problem.calibration, held_back=held_back))
    few, many = (affordable_samples(problem, cuts) for cuts in (4, 10_000))
    assert many == FEWEST_SENSITIVITY_SAMPLES < few <= problem.held_back.count


@pytest.mark.parametrize(("samples", "batches"), [(1, 1), (14, 1), (25, 3), (41, 4), (10_000, 5)])
def test_cuts_are_measured_on_samples_to_the_nearest_batch(module: nn.Module, samples: int, batches: int) -> None:
    problem = make_problem(module, 3, 6, 6)
    held_back = replace(problem.held_back, indices=torch.arange(45), batch_size=10)
    problem = replace(problem, calibration=replace(problem.calibration, held_back=held_back))
    weight = problem.groups[0].consumers[0].weight
    cut = Cut("all", 0, {weight: problem.state[weight] * 0.5}, ())
    seen: list[int] = []
    (distance,) = measure_cuts(problem, [cut], samples=samples, advance=seen.append)
    assert len(seen) == batches
    assert distance > 0


def test_exchanges_start_from_the_order_of_the_original_network_and_better_it(module: nn.Module) -> None:
    problem = make_problem(module, 3, 6, 6)
    group, options = problem.groups[0], LayerOptions(certify=False)
    moments = record_all(problem, SilentProgress()).moments[group.name]
    state = problem.state
    order, facts = find_curve(problem, group, moments, options)
    worst = replace(order, orders={name: units.flip(0) for name, units in order.orders.items()})
    refit, given = (
        solve_layer(LayerProblem(group, moments, options, state, state, facts, worst, swaps), Width(5)).report.fit
        for swaps in (True, False)
    )
    assert refit.error is not None
    assert given.error is not None
    assert refit.error < given.error

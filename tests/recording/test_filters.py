"""Depthwise convolutions are found, and their filters refitted from what reaches them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress.compression.layers.decisions import Keep, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.problem import Problem
from compress.compression.sweep import sweep
from compress.compression.turns import Filter
from compress.graph.trace import trace_network
from compress.progress import SilentProgress
from compress.recording.filters import FilterRecorder, refit_filters
from compress.recording.record import SamplePlan
from compress.units.find import find_filters
from tests.compression.test_schedule import make_problem


class Inverted(nn.Module):
    """Two inverted residuals and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 12, 1),
                nn.ReLU6(),
                nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
                nn.BatchNorm2d(12),
                nn.ReLU6(),
                nn.Conv2d(12, 4, 1),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return self.head(inputs.mean((2, 3)))


@pytest.fixture
def problem() -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Inverted().eval()
        found = make_problem(module, 4, 8, 8)
        return replace(found, filters=find_filters(trace_network(module, (torch.randn(2, 4, 8, 8),))))


def test_depthwise_convolutions_are_found_with_what_takes_their_constant(problem: Problem) -> None:
    assert [each.weight for each in problem.filters] == ["blocks.0.2.weight", "blocks.1.2.weight"]
    assert [each.shift for each in problem.filters] == ["blocks.0.3.running_mean", "blocks.1.3.running_mean"]


def test_a_scaled_and_shifted_input_is_undone_channel_by_channel(problem: Problem) -> None:
    consumer = problem.filters[0]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 12, 8, 8, generator=generator)
    factors = torch.linspace(0.5, 2, 12)[:, None, None]
    moved = inputs * factors
    moved[:, 5] = torch.randn(32, 8, 8, generator=generator)  # nothing can be done about this one
    state = problem.state
    recorders = [FilterRecorder(consumer, SamplePlan(32, (40,)), seed=seed) for seed in range(2)]
    for recorder in recorders:
        recorder.add({consumer.input: (inputs, moved)}, state, state)
    changed = refit_filters(consumer, *(each.moments() for each in recorders), 1e-9, state, state)
    wanted = state[consumer.weight] / factors[:, None]
    good = torch.arange(12) != 5
    torch.testing.assert_close(changed[consumer.weight][good], wanted[good], rtol=1e-4, atol=1e-5)


def test_channels_that_held_back_samples_like_as_they_are_stay(problem: Problem) -> None:
    consumer, state = problem.filters[0], problem.state
    inputs = torch.randn(16, 12, 8, 8, generator=torch.Generator().manual_seed(1))
    recorders = [FilterRecorder(consumer, SamplePlan(16, (20,)), seed=seed) for seed in range(2)]
    recorders[0].add({consumer.input: (inputs, 2 * inputs)}, state, state)
    recorders[1].add({consumer.input: (inputs, inputs)}, state, state)
    assert refit_filters(consumer, *(each.moments() for each in recorders), 1e-6, state, state) == {}


def test_a_sweep_refits_filters_once_their_input_has_moved(problem: Problem) -> None:
    turns = [turn.consumer.weight for turn in problem.turns() if isinstance(turn, Filter)]
    assert turns == ["blocks.1.2.weight"]  # nothing in front of the first one is ever refitted
    plan = same_for_all(problem.groups, Keep(0.5))
    found = sweep(problem, plan, LayerOptions(certify=False), SilentProgress())
    assert not torch.equal(found.state["blocks.1.2.weight"], problem.state["blocks.1.2.weight"])
    assert torch.equal(found.state["blocks.0.2.weight"], problem.state["blocks.0.2.weight"])

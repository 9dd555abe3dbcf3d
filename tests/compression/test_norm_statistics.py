"""Normalisations over units that are cut: scores are those of the network that is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import compress


def moved(result: compress.PruneResult, net: nn.Module, samples: Tensor) -> float:
    """Squares of what outputs moved by, relative to their spread."""
    with torch.no_grad():
        before, after = net(samples).double(), result.model(samples).double()
    return float((after - before).square().sum() / (before - before.mean(0)).square().sum())


@pytest.mark.parametrize("norm", [nn.LayerNorm(48), nn.GroupNorm(4, 48)], ids=["layer", "group"])
def test_outputs_that_are_said_to_move_are_those_of_the_narrowed_network(norm: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 48), norm, nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 12)).eval()
    with torch.no_grad():
        net[0].weight[::4] *= 6  # units of unlike sizes: statistics move where some go
        net[-1].weight *= 12
    batches = [torch.randn(50, 12) for _ in range(40)]
    result = compress.prune(net, batches, keep=0.5, recover="off", progress=False)
    said = result.report.calibration.held_back.distance
    assert said == pytest.approx(moved(result, net, torch.randn(4000, 12)), rel=0.25)


def test_the_default_rule_keeps_outputs_within_their_tolerance_all_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 12)
    ).eval()
    with torch.no_grad():
        net[0].weight[::4] *= 6
    result = compress.prune(net, [torch.randn(50, 12) for _ in range(8)], tolerance=0.2, recover="off", progress=False)
    assert result.report.calibration.held_back.distance <= 0.02
    assert moved(result, net, torch.randn(4000, 12)) <= 0.03
    assert result.report.layers[-1].kept < 32


def test_what_reads_a_normalisation_is_fitted_to_statistics_over_the_kept_units() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GroupNorm(1, 32),  # over all channels: whichever go, the others' values change
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 6),
    ).eval()
    batches = [torch.randn(50, 3, 8, 8) for _ in range(8)]
    samples = torch.randn(400, 3, 8, 8)
    half = compress.prune(net, batches, macs=0.5, recover="off", progress=False)
    assert moved(half, net, samples) < 1.0  # 9 with a last layer that is fitted to statistics over all units

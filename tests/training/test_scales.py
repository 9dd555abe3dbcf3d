"""What steps of recovery are relative to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compress.graph.program import Program
from compress.graph.trace import trace_network
from compress.training.mimic import tensors_of
from compress.training.scales import FLOOR, measure_units


class Separable(nn.Module):
    """A map that leaves channels apart behind a rectification, normalised, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.apart = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.apart(torch.relu_(self.first(inputs)))))
        return self.head(hidden.mean((2, 3)))


@pytest.fixture
def network() -> Separable:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Separable()
        network.norm.momentum = None  # type: ignore[assignment]
        network(torch.randn(32, 3, 12, 12))  # statistics
        with torch.no_grad():
            network.norm.weight.uniform_(0.5, 2.0)  # type: ignore[union-attr,operator]
            network.norm.bias.uniform_(20.0, 30.0)  # type: ignore[union-attr,operator]
    return network.eval()


INPUTS = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def units_of(network: nn.Module) -> dict[str, Tensor]:
    program = Program.of(trace_network(network, (INPUTS[:2],)))
    return measure_units(program, tensors_of(network), [INPUTS])


def test_shifts_are_moved_relative_to_the_spread_of_what_they_shift(network: Separable) -> None:
    units = units_of(network)
    assert set(units) == {"first.bias", "apart.weight", "norm.bias", "head.bias"}
    with torch.no_grad():
        made = network.first(INPUTS)
    torch.testing.assert_close(units["first.bias"], made.transpose(0, 1).flatten(1).std(1))


def test_a_shift_has_the_same_unit_with_its_normalisation_folded_away(network: Separable) -> None:
    units = units_of(network)
    assert float(units["norm.bias"].max()) < 5.0  # and not 20, its own size
    network.apart, network.norm = fuse_conv_bn_eval(network.apart, network.norm), nn.Identity()
    folded = units_of(network)
    torch.testing.assert_close(folded["apart.bias"], units["norm.bias"], rtol=1e-4, atol=1e-5)


def test_a_step_of_a_map_that_leaves_channels_apart_is_small_beside_what_its_channel_varies_by(
    network: Separable,
) -> None:
    with torch.no_grad():
        network.first.bias += 100.0  # inputs of the map: a mean far above the spread
        given = network.apart(torch.relu(network.first(INPUTS)))
        unit = units_of(network)["apart.weight"]
        assert unit.shape == (16, 1, 1, 1)
        network.apart.weight += unit
        moved = network.apart(torch.relu(network.first(INPUTS))) - given
    relative = moved.square().mean((0, 2, 3)).sqrt() / given.transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(relative, torch.full_like(relative, 3.0), rtol=0.05, atol=0.0)  # √taps, all alike


def test_channels_that_do_not_vary_have_a_unit_above_zero(network: Separable) -> None:
    with torch.no_grad():
        network.first.weight[0] = 0
    unit = units_of(network)["first.bias"]
    assert float(unit[0]) == pytest.approx(FLOOR * float(torch.cat([unit[1:], unit.new_zeros(1)]).mean()), rel=1e-4)

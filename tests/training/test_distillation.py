"""Label-free distillation after a cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.compression.problem import SampleStream
from compress.errors import NonFiniteError
from compress.measures.outputs import Output
from compress.progress import SilentProgress
from compress.training.distillation import distil, rate_share, soft_divergence
from tests.compression.test_schedule import Samples


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A network and the same with noise on its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
        other = copy.deepcopy(original)
        for parameter in other.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return original, other


OUTPUTS = (Output("output", (4,), "classes", class_dim=1),)


def streams() -> tuple[SampleStream, SampleStream]:
    samples = Samples(400, 6)
    return (
        SampleStream(samples, torch.arange(320), 32),  # type: ignore[arg-type]
        SampleStream(samples, torch.arange(320, 400), 40),  # type: ignore[arg-type]
    )


def test_steps_bring_the_outputs_nearer_on_samples_not_stepped_on(pair: tuple[nn.Module, nn.Module]) -> None:
    module, found = distil(*pair, *streams(), 60, OUTPUTS, SilentProgress(), rate=3e-3)
    assert found.divergences[-1][0] == 60
    lowest = min(value for _, value in found.divergences)
    assert lowest < 0.7 * found.divergences[0][1]
    inputs = streams()[1].read(0)
    with torch.inference_mode():
        outputs = [{"output": network(*inputs)} for network in (pair[0], module)]
    again = float(soft_divergence(OUTPUTS, *outputs, {"output": 1.0}, 40).mean())
    assert again == pytest.approx(lowest, rel=0.3)


def test_weights_that_held_back_samples_like_less_are_not_kept(pair: tuple[nn.Module, nn.Module]) -> None:
    module, found = distil(*pair, *streams(), 6, OUTPUTS, SilentProgress(), rate=5.0)
    assert found.kept_step == 0
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, pair[1].state_dict()[name])


def test_the_input_and_all_statistics_stay_as_they_are(pair: tuple[nn.Module, nn.Module]) -> None:
    before = copy.deepcopy(pair[1].state_dict())
    module, _ = distil(*pair, *streams(), 10, OUTPUTS, SilentProgress())
    assert all(torch.equal(before[name], tensor) for name, tensor in pair[1].state_dict().items())
    assert torch.equal(module.state_dict()["1.running_mean"], before["1.running_mean"])


def test_the_same_seed_gives_the_same_weights(pair: tuple[nn.Module, nn.Module]) -> None:
    first, second = (distil(*pair, *streams(), 12, OUTPUTS, SilentProgress(), seed=3)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_stops_it(pair: tuple[nn.Module, nn.Module]) -> None:
    pair[1][0].weight.data.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="step 1"):
        distil(*pair, *streams(), 3, OUTPUTS, SilentProgress())


def test_the_rate_rises_then_falls() -> None:
    shares = [rate_share(step, 50) for step in range(50)]
    assert shares[0] == pytest.approx(0.2)
    assert max(shares) == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0 < shares[-1] < 0.01

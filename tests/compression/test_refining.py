"""Sweeps over a cut network that refit what comes through the next ReLU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.compression.layers.decisions import Keep, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.sweep import refine, sweep
from compress.graph.program import run
from compress.progress import SilentProgress
from compress.recording.residuals import find_rectifier
from tests.compression.test_schedule import Residual, make_problem


@pytest.fixture(scope="module")
def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Residual().eval()
        for block in module.blocks:
            block.norm.running_var.uniform_(0.5, 2)
            block.norm.weight.data.uniform_(0.5, 2)
            block.norm.weight.data[::3] *= -1
    return module


def test_the_corrected_output_is_the_originals_behind_the_relu(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    consumer = next(c for g in problem.groups for c in g.consumers if c.weight == "blocks.1.second.weight")
    rectifier = find_rectifier(problem.program, consumer)  # conv, batch norm, addition, ReLU
    assert rectifier is not None
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(4, 8, 5, 5, generator=generator) for _ in range(2))
    index = torch.arange(25).expand(4, -1)
    wanted = rectifier.path.rows(old, index, linear=False)
    found = rectifier.correction(wanted, new, problem.state, index, linear=False).reshape(4, 5, 5, 8)
    norm = module.blocks[1].norm
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    after = new.double() + (factor * found).permute(0, 3, 1, 2)
    torch.testing.assert_close(after.relu(), old.double().relu(), rtol=1e-5, atol=1e-5)
    untouched = (old <= 0) & (new <= 0)
    assert bool(untouched.any())
    torch.testing.assert_close(after[untouched], new.double()[untouched], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("clip", "low", "high"), [(nn.ReLU6(), 0.0, 6.0), (nn.Hardtanh(), -1.0, 1.0)])
def test_in_front_of_a_clip_nothing_is_asked_of_what_both_networks_clip_alike(
    clip: nn.Module, low: float, high: float
) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), clip, nn.Linear(5, 3)).eval()
    problem = make_problem(chain, 4)
    consumer = next(each for group in problem.groups for each in group.consumers if each.bias == "2.bias")
    rectifier = find_rectifier(problem.program, consumer)
    assert rectifier is not None
    old, new = 4 * torch.randn(2, 50, 5, dtype=torch.float64)
    moved = new + rectifier.correction(old, new, problem.state, None, linear=True)
    torch.testing.assert_close(clip(moved), clip(old))
    alike = ((old >= high) & (new >= high)) | ((old <= low) & (new <= low))
    assert bool(((old >= high) & (new >= high)).any())
    assert torch.equal(moved[alike], new[alike])


def test_only_a_relu_that_alone_reads_the_output_is_found() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.smooth, self.shared, self.last = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.smooth(torch.relu(self.up(inputs)))
            middle = self.shared(torch.relu(nn.functional.gelu(hidden)))
            return self.last(torch.relu(middle)) + middle

    problem = make_problem(Branches().eval(), 4)
    found = {c.weight: find_rectifier(problem.program, c) for g in problem.groups for c in g.consumers}
    assert found["smooth.weight"] is None  # a GELU comes first
    assert found.get("shared.weight") is None  # read twice


def test_refining_brings_the_output_nearer_and_keeps_the_cut(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    options, progress = LayerOptions(certify=False), SilentProgress()
    first = sweep(problem, same_for_all(problem.groups, Keep(4)), options, progress)
    second = refine(problem, first, options, progress, sweeps=2)
    inputs, output = problem.held_back.read(0), problem.program.outputs[0]
    errors = []
    for found in (first, second):
        before, after = run(problem.program, (problem.state, found.state), inputs, [output])[output]
        errors.append(float((before - after).norm() / before.norm()))
    assert errors[1] < errors[0]
    for result, group in zip(first.results, problem.groups, strict=True):
        gone = torch.ones(group.unit_count, dtype=torch.bool)
        gone[result.kept] = False
        (consumer,) = group.consumers
        assert float(second.state[consumer.weight][:, consumer.positions[gone].flatten()].abs().max()) == 0


def test_a_network_that_is_not_cut_is_not_changed(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    options, progress = LayerOptions(certify=False), SilentProgress()
    whole = sweep(problem, same_for_all(problem.groups, Keep(12)), options, progress)
    found = refine(problem, whole, options, progress, sweeps=1)
    for name, tensor in problem.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-4, atol=1e-5)


def test_no_sweep_follows_one_that_gained_nothing(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    options, progress = LayerOptions(certify=False), SilentProgress()
    whole = sweep(problem, same_for_all(problem.groups, Keep(4)), options, progress)
    swept = refine(problem, whole, options, progress, sweeps=20)
    assert 1 <= swept.refined < 20

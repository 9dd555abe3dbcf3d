"""λ for a wanted number of nonzeros: on a convex problem with a known path, and on small networks."""

import json

import pytest
import torch
from torch import nn

from compress.errors import OutputError
from compress.training import ProximalL1
from compress.training.sparsity import Minimiser, choose_penalties, l1_forces, next_penalty


def separable(values):
    """min ½‖w − x‖² + λ‖w‖₁: soft thresholding; w has #{|x_i| > λ} nonzeros, and |∂loss/∂w| = min(λ, |x_i|)."""

    def train(penalties):
        (penalty,) = penalties
        solution = values.sign() * (values.abs() - penalty).clamp_min(0)
        level, forces = l1_forces([solution], [solution - values])
        return Minimiser((level,), (forces,), solution)

    return train


@pytest.mark.parametrize("target", [3, 40, 170])
def test_the_level_of_a_convex_problem_is_met(target):
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = choose_penalties(separable(values), [target], low=0.0, high=10.0, tolerance=0.01)
    assert found.met
    assert int((values.abs() > found.penalties[0]).sum()) == found.levels[0]
    assert abs(found.levels[0] - target) <= 0.01 * target


def test_at_the_minimiser_the_force_is_the_penalty_on_nonzeros_and_at_most_it_elsewhere():
    torch.manual_seed(0)
    module = nn.Linear(8, 3, bias=False).double()
    inputs, outputs = torch.randn(40, 8, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    optimizer = ProximalL1(module.parameters(), lr=0.3, penalty=0.05)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (module(inputs) - outputs).square().sum(1).mean()).backward()
        optimizer.step()
    nonzero = module.weight.detach() != 0
    forces = module.weight.grad.abs()
    assert 0 < int(nonzero.sum()) < nonzero.numel()
    assert torch.allclose(forces[nonzero], torch.tensor(0.05, dtype=torch.float64), atol=1e-9)
    assert float(forces[~nonzero].max()) <= 0.05 + 1e-9


def test_several_layers_reach_levels_of_their_own():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(200, dtype=torch.float64, generator=generator) * scale for scale in (1.0, 5.0)]

    def train(penalties):
        parts = [separable(values)((penalty,)) for values, penalty in zip(layers, penalties, strict=True)]
        return Minimiser(tuple(part.levels[0] for part in parts), tuple(part.forces[0] for part in parts))

    found = choose_penalties(train, [20, 150], low=1e-4, high=50.0, tolerance=0.02)
    assert found.met
    assert found.levels[0] == pytest.approx(20, rel=0.02)
    assert found.levels[1] == pytest.approx(150, rel=0.02)
    assert found.penalties[0] != found.penalties[1]


def test_the_next_penalty_is_the_median_inside_the_bracket_or_its_midpoint():
    forces = torch.tensor([0.1, 0.3, 0.4, 0.8, 5.0])
    assert next_penalty((0.2, 1.0), forces) == pytest.approx(0.4)
    assert next_penalty((1.0, 3.0), forces) == 2.0


def test_an_interrupted_search_continues_where_it_was(tmp_path):
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = choose_penalties(separable(values), [40], low=0.0, high=10.0, tolerance=0.001)
    assert len(whole.history) > 3
    calls = []

    def failing(penalties):
        calls.append(penalties)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return separable(values)(penalties)

    journal = tmp_path / "search.jsonl"
    with pytest.raises(KeyboardInterrupt):
        choose_penalties(failing, [40], low=0.0, high=10.0, tolerance=0.001, journal=journal)
    with journal.open("a") as file:
        file.write('{"number": 3, "brack')  # torn by a crash
    resumed = choose_penalties(separable(values), [40], low=0.0, high=10.0, tolerance=0.001, journal=journal)
    assert resumed.history == whole.history
    assert len(journal.read_text().splitlines()) == len(whole.history) + 1
    assert set(json.loads(journal.read_text().splitlines()[1])) >= {"brackets", "penalties", "levels"}


def test_a_journal_of_another_search_is_refused(tmp_path):
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    choose_penalties(separable(values), [10], low=0.0, high=10.0, journal=tmp_path / "j")
    with pytest.raises(OutputError, match="another search"):
        choose_penalties(separable(values), [11], low=0.0, high=10.0, journal=tmp_path / "j")


def test_a_search_that_runs_out_says_so():
    values = torch.full((100,), 2.0, dtype=torch.float64)  # all go at once: no λ keeps half of them
    found = choose_penalties(separable(values), [50], low=0.0, high=10.0, most=6)
    assert not found.met
    assert len(found.history) == 6


def test_trainings_that_stopped_early_do_not_make_the_search_creep():
    """|∂loss/∂w| just above λ on the nonzeros, and a bracket of nine orders of magnitude."""
    values = 1e-3 * torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = separable(values)

    def early(penalties):
        found = exact(penalties)
        forces = torch.where(found.forces[0] >= penalties[0] * (1 - 1e-9), 1.01 * penalties[0], found.forces[0])
        return Minimiser(found.levels, (forces,))

    found = choose_penalties(early, [40], low=1e-8, high=10.0, tolerance=0.02)
    assert found.met
    assert len(found.history) <= 15

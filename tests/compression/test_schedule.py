"""Refits behind residual connections and of consumers whose input moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress.compression.layers.decisions import Given, Keep, same_for_all
from compress.compression.layers.layer import LayerFacts, LayerOptions
from compress.compression.problem import Calibration, Problem, SampleStream, record_all
from compress.compression.sweep import sweep
from compress.compression.turns import Choose, Refit, left_channels, make_turns
from compress.data.source import Batch
from compress.graph.cost import count_macs
from compress.graph.program import Program, output_values, run
from compress.graph.trace import trace_network
from compress.measures.kinds import Hints, describe_outputs
from compress.measures.outputs import named_outputs
from compress.progress import SilentProgress
from compress.recording.record import record_moments
from compress.recording.residuals import find_residual
from compress.units.find import find_units
from compress.units.network import Network


class Block(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(inputs + self.norm(self.second(torch.relu(self.first(inputs)))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(8, 12) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.stem(inputs)).mean((2, 3)))
        return scores


class Samples:
    """Seeded noise as a data source."""

    def __init__(self, count: int, *shape: int) -> None:
        self.inputs = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))

    def batches(self, size: int, indices: Tensor) -> list[Batch]:
        return [Batch(self.inputs[part], None) for part in indices.split(size)]


def make_problem(module: nn.Module, *shape: int, readers: bool = True) -> Problem:
    probe = torch.randn(2, *shape)
    network = trace_network(module, (probe,))
    groups = find_units(network, module)
    samples = Samples(300, *shape)
    returned = module.eval()(probe)
    nodes = output_values(Program.of(network), returned)
    outputs = describe_outputs(named_outputs(returned), 2, (), Hints())
    state = {name: t.detach() for name, t in [*module.named_parameters(), *module.named_buffers()]}
    outputs = tuple(replace(output, node=nodes[output.name]) for output in outputs)
    return Problem(
        network=Network(module, Program.of(network), state, groups, (probe,), outputs),
        calibration=Calibration(
            SampleStream(samples, torch.arange(240), 60),  # type: ignore[arg-type]
            SampleStream(samples, torch.arange(240, 300), 60),  # type: ignore[arg-type]
        ),
        groups=tuple(group for group in groups if group.prunable),
        forward_macs=count_macs(module, (probe,)),
        memory=2**30,
        readers=tuple(consumer for group in groups for consumer in group.consumers) if readers else (),
    )


@pytest.fixture
def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Residual().eval()
        for block in module.blocks:
            block.norm.running_var.uniform_(0.5, 2)
            block.norm.weight.data.uniform_(0.5, 2)
    return module


def test_a_chain_needs_no_turn_besides_its_groups() -> None:
    chain = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    problem = make_problem(chain, 6)
    assert all(isinstance(turn, Choose) for turn in problem.turns())
    assert len(problem.turns()) == 2


def test_consumers_whose_input_moved_have_a_turn_in_their_place(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    turns = [(turn.read.consumers[0].weight, isinstance(turn, Choose)) for turn in problem.turns()]
    assert turns == [
        ("blocks.0.second.weight", True),
        ("blocks.1.first.weight", False),
        ("blocks.1.second.weight", True),
        ("blocks.2.first.weight", False),
        ("blocks.2.second.weight", True),
        ("head.weight", False),
    ]


def test_a_residual_correction_restores_the_original_sum(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    consumer = next(c for g in problem.groups for c in g.consumers if c.weight == "blocks.1.second.weight")
    residual = find_residual(problem.program, consumer)
    assert residual is not None
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(4, 8, 5, 5, generator=generator) for _ in range(2))
    index = torch.tensor([[0, 7], [3, 3], [24, 1], [2, 9]])
    shortcut = residual.rows(old, index, linear=False)
    found = residual.correction(shortcut, new, problem.state, index, linear=False).reshape(4, 2, 8)
    norm = module.blocks[1].norm
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    for sample in range(4):
        for place in range(2):
            row, column = divmod(int(index[sample, place]), 5)
            total = new[sample, :, row, column].double() + factor * found[sample, place]
            total, wanted = total.float(), old[sample, :, row, column]  # the precision the network computes in
            torch.testing.assert_close(total, wanted)


def test_a_layer_scale_and_a_permutation_before_the_sum_are_undone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
            self.scale = nn.Parameter(torch.linspace(0.5, 2, 6).reshape(6, 1, 1))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.down(torch.relu(self.up(inputs.permute(0, 2, 3, 1))))
            return inputs.relu() + self.scale * hidden.permute(0, 3, 1, 2)

    module = Scaled().eval()
    problem = make_problem(module, 6, 4, 3)
    residual = find_residual(problem.program, problem.groups[0].consumers[0])
    assert residual is not None
    generator = torch.Generator().manual_seed(3)
    old, new = (torch.randn(2, 6, 4, 3, generator=generator) for _ in range(2))
    shortcut = residual.rows(old, None, linear=True)
    found = residual.correction(shortcut, new, problem.state, None, linear=True)
    expected = ((old - new).double() / module.scale.detach().double()).permute(0, 2, 3, 1).reshape(-1, 6)
    torch.testing.assert_close(found, expected)


def test_refitting_what_moved_brings_the_output_nearer(module: nn.Module) -> None:
    errors = []
    for readers in (False, True):
        problem = make_problem(module, 3, 8, 8, readers=readers)
        found = sweep(problem, same_for_all(problem.groups, Keep(5)), LayerOptions(certify=False), SilentProgress())
        inputs = problem.held_back.read(0)
        output = problem.program.outputs[0]
        first, second = run(problem.program, (problem.state, found.state), inputs, [output])[output]
        errors.append(float((first - second).norm() / first.norm()))
    assert errors[1] < errors[0]


def test_channels_that_an_earlier_turn_removed_stay_out(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    (group, *_) = problem.groups
    (turn, *_) = [
        turn
        for turn in make_turns(problem.program, problem.state, problem.groups[1:], problem.readers)
        if isinstance(turn, Refit)
    ]
    consumer = replace(turn.consumer, node=group.consumers[0].node)
    both = Refit(replace(turn.read, unit_count=12, consumers=(consumer,)))
    assert left_channels(both, {group.name: torch.tensor([1, 4])}, problem.groups).tolist() == [1, 4]


def test_recording_only_the_units_in_question_changes_no_refit(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    options = LayerOptions(certify=False)
    plan = same_for_all(problem.groups, Given(torch.tensor([0, 2, 3, 7, 10])))
    progress = SilentProgress()
    whole = sweep(problem, plan, options, progress)
    facts = {
        name: LayerFacts.of(moments.joint(), 1e-3) for name, moments in record_all(problem, progress).moments.items()
    }
    part = sweep(problem, plan, options, progress, facts=facts)
    for name, tensor in whole.state.items():
        torch.testing.assert_close(part.state[name], tensor, rtol=1e-4, atol=1e-5)
    ranks = facts[problem.groups[0].name].bound.rank_features
    assert part.results[0].report.facts.rank_features == ranks


def test_units_that_are_out_of_the_question_still_count_in_the_targets(module: nn.Module) -> None:
    problem = make_problem(module, 3, 8, 8)
    (group, *_) = problem.groups
    units = torch.tensor([1, 4, 5])
    both = []
    for own in (None, units):
        fitting, _ = problem.recorders(group, targets=True, units=own)
        stream = problem.fitting
        record_moments(problem.program, [fitting], stream.read, stream.sizes(), problem.state)
        both.append(fitting.moments(problem.state)[0])
    torch.testing.assert_close(both[1].gram, both[0].subset(units).gram)
    torch.testing.assert_close(both[1].cross, both[0].subset(units).cross)
    assert both[1].energy == pytest.approx(both[0].energy)

"""One interpreter of a traced graph: several networks at once, operations in place, precisions, start values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.graph import program as running
from compress.graph.program import Program, run, run_outputs
from compress.graph.steps import Step
from compress.graph.trace import trace_network


class Written(nn.Module):
    """Two linear layers with something between that writes in place."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.write(self.first(x).relu()))


def _channel(h: Tensor) -> Tensor:
    h[:, 1] = 0.5
    h[:, 2:4].mul_(2.0)
    return h


def _part_of_a_view(h: Tensor) -> Tensor:
    view = h.view(-1, 2, 3)
    view[:, 0, 2].neg_()
    view.add_(1)
    return h


def _half(h: Tensor) -> Tensor:
    first, second = h.split(3, 1)
    before = h * 1
    second.add_(first)
    return h + before.flip(1)


def _result_and_argument(h: Tensor) -> Tensor:
    same = h.add_(1)
    same.mul_(3)
    return h + same


def _copy_of_a_transpose(h: Tensor) -> Tensor:
    copied = h.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)
    copied.add_(1)
    return h + copied


def _earlier_row(h: Tensor) -> Tensor:
    moved = torch.zeros_like(h)
    moved[:, 1:] = h[:, :-1]
    h[:, 0].zero_()
    h[:, 1].fill_(2.0)
    return h + moved


WRITES = [_earlier_row, _channel, _part_of_a_view, _half, _result_and_argument, _copy_of_a_transpose]


def trace(module: nn.Module, inputs: Tensor) -> tuple[Program, dict[str, Tensor]]:
    program = Program.of(trace_network(module.eval(), (inputs,)))
    return program, {name: tensor.detach() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_what_is_written_in_place_is_seen_by_every_view(write: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module = Written(write)
    inputs = torch.randn(5, 4)
    program, state = trace(module, inputs)
    before = {name: tensor.clone() for name, tensor in state.items()}
    given = inputs.clone()
    (found,) = run_outputs(program, state, (given,))
    torch.testing.assert_close(found, module(inputs))
    assert torch.equal(given, inputs)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


class Chain(nn.Module):
    """Three linear layers, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.scale = torch.full((1,), 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.b(self.a(x).relu()).relu()
        return self.c(hidden) * self.scale, hidden


@pytest.fixture
def chain() -> tuple[Chain, Program, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    module, inputs = Chain(), torch.randn(7, 4)
    return module, *trace(module, inputs), inputs


@torch.no_grad()
def test_networks_share_what_lies_upstream_of_their_first_difference(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program, state, inputs = chain
    states = [state, {**state, "b.weight": state["b.weight"] * 2}, {**state, "c.bias": state["c.bias"] + 1}]
    calls: list[str] = []
    compute = running._computed

    def counted(row: Sequence[Step], *arguments: Any) -> Any:
        calls.append(row[-1].name)
        return compute(row, *arguments)

    first, second, third = (step.name for step in program.steps if step.name.startswith("linear"))
    with monkeypatch.context() as patch:
        patch.setattr(running, "_computed", counted)
        together = run(program, states, (inputs,), program.outputs)
    assert [calls.count(name) for name in (first, second, third)] == [1, 2, 3]
    for which, each in enumerate(states):
        alone = run_outputs(program, each, (inputs,))
        assert all(
            torch.equal(together[name][which], value) for name, value in zip(program.outputs, alone, strict=True)
        )
    assert together[program.outputs[1]][0] is together[program.outputs[1]][2]


@torch.no_grad()
def test_a_step_is_computed_otherwise_in_the_last_network_alone(chain: Any) -> None:
    _, program, state, inputs = chain
    first = next(step.name for step in program.steps if step.name.startswith("linear"))
    override = {first: lambda step, args, kwargs: step.target(*args, **kwargs) + 1}
    together = run(program, (state, state), (inputs,), program.outputs, override=override, fast=True)
    own = run_outputs(program, state, (inputs,))
    other = run_outputs(program, state, (inputs,), override=override)
    for name, first_value, last_value in zip(program.outputs, own, other, strict=True):
        assert torch.equal(together[name][0], first_value)
        assert torch.equal(together[name][1], last_value)
        assert not torch.equal(first_value, last_value)


@torch.no_grad()
def test_a_pass_starts_from_known_values(chain: Any) -> None:
    module, program, state, inputs = chain
    (hidden,) = program.frontier(["c.weight"], [program.outputs[0]])
    start = run(program, (state, state), (inputs,), [hidden])
    moved = {**state, "c.weight": state["c.weight"] * 3}
    found = run(program, (state, moved), (), [program.outputs[0]], start=start)[program.outputs[0]]
    torch.testing.assert_close(found[0], module(inputs)[0])
    module.c.weight.data.mul_(3)
    torch.testing.assert_close(found[1], module(inputs)[0])


@torch.no_grad()
def test_constants_and_precisions_go_with_the_weights(chain: Any) -> None:
    module, program, state, inputs = chain
    wide = {name: tensor.double() for name, tensor in state.items()}
    found = run_outputs(program, wide, (inputs.double(),))
    module.scale = module.scale.double()
    for value, wanted in zip(found, module.double()(inputs.double()), strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, wanted)


def test_every_output_tensor_has_a_name(chain: Any) -> None:
    _, program, _, _ = chain
    assert [program.shape(name)[1:] for name in program.outputs] == [(2,), (5,)]


def test_gradients_flow_where_the_caller_wants_them(chain: Any) -> None:
    _, program, state, inputs = chain
    weight = state["b.weight"].clone().requires_grad_()
    run_outputs(program, {**state, "b.weight": weight}, (inputs,))[0].sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("write", WRITES)
def test_gradients_flow_through_what_is_written_in_place(write: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, dtype=torch.float64)
    program, state = trace(Written(write).double(), inputs)

    def outputs(weight: Tensor) -> Tensor:
        (found,) = run_outputs(program, {**state, "first.weight": weight}, (inputs,))
        return found

    assert torch.autograd.gradcheck(outputs, (state["first.weight"].clone().requires_grad_(),))

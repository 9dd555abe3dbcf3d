"""Steps computed at once: the same values as one by one, whichever of them are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.graph.program import Program, run
from compress.graph.trace import trace_network


class Block(nn.Module):
    """An inverted bottleneck with a shortcut and a head."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 8, 1, bias=False)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(size, affine=affine) for size in (8, 8, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu6(self.norms[0](self.wide(x)))
        h = self.norms[1](self.deep(h)).relu()
        h = (self.norms[2](self.narrow(h)) + x).relu()
        return self.head(h.mean((2, 3)).flatten(1))


def traced(affine: bool = True) -> tuple[Block, Program, Tensor]:
    """The block with statistics that are not the default ones, its program and a batch."""
    torch.manual_seed(0)
    block = Block(affine)
    inputs = torch.randn(5, 4, 6, 6)
    block.train()(3 * torch.randn(16, 4, 6, 6) + 1)
    for norm in block.norms:
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return block, Program.of(trace_network(block.eval(), (inputs,))), inputs


@pytest.mark.parametrize("affine", [True, False])
def test_outputs_computed_at_once_are_the_networks(affine: bool) -> None:
    block, program, inputs = traced(affine)
    with torch.inference_mode():
        values = run(program, (block.state_dict(),), (inputs,), program.outputs, fast=True)
        torch.testing.assert_close(values[program.outputs[0]][0], block(inputs))
    assert any(len(joint.steps) == 2 for joint in program.joints)


def test_each_value_that_is_asked_for_is_that_of_steps_one_by_one() -> None:
    block, program, inputs = traced()
    state = block.state_dict()
    with torch.inference_mode():
        one_by_one = run(program, (state,), (inputs,), [step.name for step in program.steps])
        for step in program.steps:
            (alone,) = run(program, (state,), (inputs,), [step.name], fast=True)[step.name]
            torch.testing.assert_close(alone, one_by_one[step.name][0])
        together = run(program, (state,), (inputs,), one_by_one, fast=True)
    for name, (value,) in together.items():
        torch.testing.assert_close(value, one_by_one[name][0])


def test_values_to_start_from_and_inputs_are_left_as_they_are() -> None:
    block, program, inputs = traced()
    state, given = block.state_dict(), inputs.clone()
    with torch.inference_mode():
        names = [step.name for step in program.steps]
        values = run(program, (state,), (inputs,), names)
        before = {name: value[0].clone() for name, value in values.items()}
        for name in names[:-1]:
            after = run(program, (state,), (inputs,), program.outputs, start={name: values[name]}, fast=True)
            torch.testing.assert_close(after[program.outputs[0]][0], before[program.outputs[0]])
            torch.testing.assert_close(values[name][0], before[name], rtol=0, atol=0)
    assert torch.equal(inputs, given)


def test_two_networks_share_what_they_have_in_common() -> None:
    block, program, inputs = traced()
    state = block.state_dict()
    other = {**state, "narrow.weight": 2 * state["narrow.weight"]}
    deep = next(joint.steps[-1].name for joint in program.joints if len(joint.steps) == 2)
    with torch.inference_mode():
        values = run(program, (state, other), (inputs,), [deep, *program.outputs], fast=True)
        apart = run(program, (other,), (inputs,), program.outputs)
    assert values[deep][0] is values[deep][1]
    torch.testing.assert_close(values[program.outputs[0]][1], apart[program.outputs[0]][0])


def test_networks_in_half_precision_are_the_same_to_the_last_digit() -> None:
    block, program, inputs = traced()
    state = {name: tensor.bfloat16() for name, tensor in block.state_dict().items()}
    with torch.inference_mode():
        slow, fast = (
            run(program, (state,), (inputs.bfloat16(),), program.outputs, fast=fast)[program.outputs[0]][0]
            for fast in (False, True)
        )
    assert torch.equal(slow, fast)


def laid_out(value: Tensor, *, together: bool) -> Tensor:
    """A copy of images with their channels apart, or side by side in memory; strides of single places are odd."""
    copy = value.contiguous(memory_format=torch.channels_last if together else torch.contiguous_format).clone()
    return copy.as_strided(
        copy.shape, [7 if size == 1 else step for size, step in zip(copy.shape, copy.stride(), strict=True)]
    )


@pytest.mark.parametrize("together", [True, False])
def test_wherever_a_pass_starts_and_whatever_it_is_asked_for_the_digits_are_the_same(together: bool) -> None:
    block, program, inputs = traced()
    state = block.state_dict()
    assert program.takes_any_layout
    with torch.inference_mode():
        names = [step.name for step in program.steps]
        whole = run(program, (state,), (inputs,), program.outputs, fast=True)[program.outputs[0]][0]
        every = run(program, (state,), (inputs,), names, fast=True)
        assert torch.equal(every[program.outputs[0]][0], whole)
        for name in names:
            kept = every[name][0]
            start = {name: (laid_out(kept, together=together) if kept.ndim == 4 else kept,)}
            after = run(program, (state,), (inputs,), program.outputs, start=start, fast=True)
            assert torch.equal(after[program.outputs[0]][0], whole), name
    again = run(program, (state,), (laid_out(inputs, together=together),), program.outputs, fast=True)
    assert torch.equal(again[program.outputs[0]][0], whole)


def test_a_network_that_turns_its_channels_keeps_the_layout() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).relu().permute(0, 2, 3, 1).flatten(1))

    network, inputs = Turning().eval(), torch.randn(5, 3, 4, 4)
    program = Program.of(trace_network(network, (inputs,)))
    assert not program.takes_any_layout
    with torch.inference_mode():
        (value,) = run(program, (network.state_dict(),), (inputs,), program.outputs, fast=True)[program.outputs[0]]
        torch.testing.assert_close(value, network(inputs))


class Parted(nn.Module):
    """Halves of the channels through layers of their own, weighed against each other, and a head behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.rectifier = nn.GroupNorm(2, 8), nn.PReLU(8)
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        h = self.rectifier(self.norm(torch.cat([self.first(left), self.second(right)], 1)))
        h = h * h.mean((2, 3), keepdim=True).softmax(1)
        h = self.up(h).clamp(-1, 1)
        return self.head(nn.functional.avg_pool2d(h, 2).view(len(x), -1))


def test_parts_of_images_and_views_behind_them_are_as_the_network_has_them() -> None:
    torch.manual_seed(0)
    network, inputs = Parted().eval(), torch.randn(5, 8, 4, 4)
    program, state = Program.of(trace_network(network, (inputs,))), network.state_dict()
    assert program.takes_any_layout
    with torch.inference_mode():
        values = run(program, (state,), (inputs,), [step.name for step in program.steps], fast=True)
        output = values[program.outputs[0]][0]
        torch.testing.assert_close(output, network(inputs))
        for name, (value,) in values.items():
            if isinstance(value, Tensor):
                start = {name: (value.contiguous(),)}
                after = run(program, (state,), (inputs,), program.outputs, start=start, fast=True)
                assert torch.equal(after[program.outputs[0]][0], output), name


def test_gradients_pass_through_images_laid_out_otherwise() -> None:
    block, program, inputs = traced()
    state, gradients = block.state_dict(), []
    for fast in (False, True):
        weight = state["wide.weight"].clone().requires_grad_()
        values = run(program, ({**state, "wide.weight": weight},), (inputs,), program.outputs, fast=fast)
        values[program.outputs[0]][0].square().sum().backward()
        gradients.append(weight.grad)
    assert bool(gradients[0].abs().max() > 0)
    torch.testing.assert_close(gradients[1], gradients[0])

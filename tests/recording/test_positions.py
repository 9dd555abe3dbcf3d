"""Rows at some positions are the same however a value lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.graph.program import Program, run
from compress.graph.trace import trace_network
from compress.recording.positions import rows_at
from compress.recording.readings import channel_windows, find_readings, read_rows, sample_positions
from compress.recording.record import GroupRecorder, SamplePlan
from compress.units.find import find_units


@pytest.mark.parametrize("drawn", [True, False])
def test_rows_of_both_layouts_are_equal(drawn: bool) -> None:
    value = torch.randn(3, 4, 5, 6)
    index = torch.stack([torch.randperm(30)[:7] for _ in range(3)]) if drawn else None
    rows = rows_at(value, index)
    assert torch.equal(rows, rows_at(value.contiguous(memory_format=torch.channels_last), index))
    first = 0 if index is None else int(index[0, 0])
    assert torch.equal(rows[0], value[0].flatten(1)[:, first])


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 2, 0)])
@pytest.mark.parametrize("count", [4, 1000])
def test_patches_of_both_layouts_are_equal(kernel: int, stride: int, padding: int, count: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, kernel, stride, padding)).eval()
    network = trace_network(module, (torch.randn(2, 2, 6, 6),))
    group = find_units(network, module)[0]
    (reading,) = find_readings(group, module.state_dict())
    value = torch.randn(3, 5, 6, 6)
    index = sample_positions(reading, reading.sites[0], value, count, torch.Generator().manual_seed(0))
    together = value.contiguous(memory_format=torch.channels_last)
    for read in (read_rows, channel_windows):
        assert torch.equal(
            read(reading, reading.sites[0], value, index), read(reading, reading.sites[0], together, index)
        )


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_the_original_are_the_same_from_its_outputs_as_from_its_inputs(bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1, bias=bias)).eval()
    inputs = torch.randn(2, 2, 6, 6)
    program = Program.of(trace_network(module, (inputs,)))
    group, state = find_units(program.network, module)[0], module.state_dict()

    def recorder() -> GroupRecorder:
        readings = find_readings(group, state)
        return GroupRecorder(group, readings, SamplePlan(2, (9,)), seed=0, memory=2**30, targets=True)

    with torch.inference_mode():
        values = run(program, (state,), (inputs,), recorder().wanted_originals)
        given = {name: value[0] for name, value in values.items()}
        from_outputs = recorder().original_rows(given, state)
        from_inputs = recorder().original_rows({name: given[name] for name in recorder().wanted}, state)
    assert recorder().wanted_originals > recorder().wanted
    torch.testing.assert_close(from_outputs, from_inputs)


class Shifted(nn.Module):
    """A convolution whose bias forward() computes, of a layer that reads it as it is."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 5, 1), nn.Conv2d(4, 3, 1)
        self.weight = nn.Parameter(torch.randn((5, 4, 1, 1) if transposed else (4, 5, 1, 1)))
        self.bias = nn.Parameter(torch.randn(4))
        self.apply_map = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.apply_map(self.first(x).relu(), self.weight, 2 * self.bias + 1))


@pytest.mark.parametrize("transposed", [True, False])
def test_a_bias_that_is_computed_is_no_part_of_the_originals_rows(transposed: bool) -> None:
    torch.manual_seed(0)
    module, inputs = Shifted(transposed).eval(), torch.randn(2, 2, 4, 4)
    program = Program.of(trace_network(module, (inputs,)))
    group, state = find_units(program.network, module)[0], module.state_dict()
    (consumer,) = group.consumers
    with torch.inference_mode():
        values = run(program, (state,), (inputs,), [step.name for step in program.steps])
        readings = find_readings(group, state)
        recorder = GroupRecorder(group, readings, SamplePlan(2, (16,)), seed=0, memory=2**30, targets=True)
        ((rows,),) = recorder.original_rows({name: value[0] for name, value in values.items()}, state)
        plain = module.apply_map(module.first(inputs).relu(), module.weight)
    assert consumer.node in values
    torch.testing.assert_close(rows, plain.flatten(2).transpose(1, 2).reshape(-1, 4))

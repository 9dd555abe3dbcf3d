"""Rescaling units: which tensors to multiply by γ_k and which to divide, so that the network computes the same.

The factor enters where a unit's homogeneous part begins: at the batch norm's scale and shift where one stands between
producer and activation (its statistics then stay valid, in training too), else at the producer's rows and bias. It is
taken out again in the columns of every consumer. What the graph suggests is tried on the network itself with random
factors; a group that does not pass is left alone, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.graph.meaning import meaning_of
from compress.graph.ops import BatchNorm, Layout, LinearMap, Product, Sum, state_name
from compress.graph.program import Program, run_outputs
from compress.graph.trace import NetworkGraph
from compress.units.groups import UnitGroup

TRIAL_TOLERANCE = 1e-8  # float64


@dataclass(frozen=True, eq=False)
class UnitPart:
    """Where the numbers of units 0…K−1 lie in one tensor: `positions` (K, m) along `dim`, in `groups` blocks.

    A grouped convolution's weight (D, I/groups, …) holds input channel i at column i mod I/groups of the rows of its
    block; `positions` number the I channels.
    """

    name: str
    dim: int
    positions: Tensor
    groups: int = 1

    @cached_property
    def whole(self) -> bool:
        """Whether the units are all channels of `dim`, in order."""
        flat = self.positions.flatten()
        return self.groups == 1 and bool(torch.equal(flat.cpu(), torch.arange(len(flat))))

    def _shaped(self, tensor: Tensor) -> Tensor:
        """A view (groups, rows, channels, rest)."""
        before = math.prod(tensor.shape[: self.dim])
        return tensor.view(self.groups, before // self.groups, tensor.shape[self.dim], -1)

    def squares(self, tensor: Tensor) -> Tensor:
        """Sum of squares (K,) of every unit's numbers, at least in float32."""
        wide = tensor.detach().contiguous()
        sums = self._shaped(wide).square().sum((1, 3), dtype=torch.promote_types(wide.dtype, torch.float32)).flatten()
        units = len(self.positions)
        if self.whole and len(sums) == self.positions.numel():
            return sums if len(sums) == units else sums.view(units, -1).sum(1)
        return sums[self.positions.to(tensor.device)].sum(1)

    def vector(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """`factors` (K,) spread over the channels (groups, 1, channels, 1), 1 elsewhere."""
        count, per_unit = self.groups * tensor.shape[self.dim], self.positions.shape[1]
        repeated = factors if per_unit == 1 else factors.repeat_interleave(per_unit)
        if self.whole and count == self.positions.numel():
            return repeated.view(1, 1, -1, 1)
        spread = torch.ones(count, dtype=factors.dtype, device=factors.device)
        spread[self.positions.flatten().to(factors.device)] = repeated
        return spread.view(self.groups, 1, -1, 1)

    def scale_(self, tensor: Tensor, factors: Tensor) -> None:
        """Multiply every unit's numbers by its factor (K,), in place."""
        with torch.no_grad():
            fit = tensor if tensor.is_contiguous() else tensor.contiguous()
            self._shaped(fit).mul_(self.vector(fit, factors).to(fit))
            if fit is not tensor:
                tensor.copy_(fit)


@dataclass(frozen=True, eq=False)
class Scaling:
    """A group's parts: `weights` and `shifts` are multiplied by γ_k, `outputs` divided by it.

    `weights` are the w_k (producers' rows, or batch norm's scale), `shifts` biases, `outputs` the v_k.
    """

    group: UnitGroup
    weights: tuple[UnitPart, ...]
    shifts: tuple[UnitPart, ...]
    outputs: tuple[UnitPart, ...]

    def apply_(self, state: Mapping[str, Tensor], factors: Tensor) -> None:
        """Rescale the tensors of `state` in place by γ (K,), all positive."""
        for part in (*self.weights, *self.shifts):
            part.scale_(state[part.name], factors)
        for part in self.outputs:
            part.scale_(state[part.name], factors.reciprocal())

    def input_squares(self, state: Mapping[str, Tensor]) -> Tensor:
        """‖w_k‖² (K,)."""
        return torch.stack([part.squares(state[part.name]) for part in self.weights]).sum(0)

    def output_squares(self, state: Mapping[str, Tensor]) -> Tensor:
        """‖v_k‖² (K,)."""
        return torch.stack([part.squares(state[part.name]) for part in self.outputs]).sum(0)


def find_scalings(
    graph: NetworkGraph, groups: Sequence[UnitGroup], state: Mapping[str, Tensor], *, seed: int = 0
) -> tuple[tuple[Scaling, ...], dict[str, str]]:
    """The groups whose units can be rescaled, in network order, and group name -> reason for the others.

    Every scaling is tried: random factors in [½, 2], in float64, on the graph's own example inputs with noise; the
    outputs must agree to 1e-8. Residual streams, which need `couple` to be cut, can be rescaled without it.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = {name: value.detach().cpu() for name, value in state.items()}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in wide.items()}
    inputs = tuple(_noisy(value.cpu(), generator) for value in graph.examples)
    program = Program.of(graph)
    wanted: tuple[object, ...] | None = None
    scalings: list[Scaling] = []
    reasons: dict[str, str] = {}
    for group in groups:
        if not group.homogeneous:
            reasons[group.name] = f"not homogeneous ({group.activation or 'a normalisation over the units'})"
            continue
        drafted = _draft(graph, group)
        if isinstance(drafted, str):
            reasons[group.name] = drafted
            continue
        if wanted is None:
            wanted = run_outputs(program, wide, inputs)
        factors = torch.rand(group.unit_count, generator=generator, dtype=torch.float64) * 1.5 + 0.5
        touched = {part.name for part in (*drafted.weights, *drafted.shifts, *drafted.outputs)}
        trial = dict(wide)
        for name in touched:
            trial[name] = wide[name].clone()
        drafted.apply_(trial, factors)
        for alias, name in graph.aliases.items():
            if name in touched and alias in trial:
                trial[alias] = trial[name]
        if _deviation(wanted, run_outputs(program, trial, inputs)) <= TRIAL_TOLERANCE:
            scalings.append(drafted)
        else:
            reasons[group.name] = "rescaling its units changes the outputs"
    return tuple(scalings), reasons


def _noisy(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.double() + torch.randn(value.shape, generator=generator, dtype=torch.float64)


def _deviation(wanted: Iterable[object], got: Iterable[object]) -> float:
    worst = 0.0
    for expected, output in zip(wanted, got, strict=True):
        if isinstance(expected, Tensor) and isinstance(output, Tensor) and expected.is_floating_point():
            scale = max(float(expected.abs().max()), 1e-300)
            worst = max(worst, float((expected - output).abs().max()) / scale)
    return worst


def _draft(graph: NetworkGraph, group: UnitGroup) -> Scaling | str:
    """What the graph suggests, or why there is nothing."""
    if not group.consumers:
        return "no weight of the network reads it"
    slices = {(part.name, part.dim): part.positions for part in group.slices}
    nodes = {node.name: node for node in graph.graph.nodes}
    weights: dict[tuple[str, int], UnitPart] = {}
    shifts: dict[tuple[str, int], UnitPart] = {}

    def take(target: dict[tuple[str, int], UnitPart], name: str | None, dims: Sequence[int], groups: int = 1) -> bool:
        for dim in dims:
            if name is not None and (name, dim) in slices:
                target[name, dim] = UnitPart(name, dim, slices[name, dim], groups)
                return True
        return False

    seen: set[str] = set()
    stack = [nodes[consumer.input] for consumer in group.consumers]
    while stack:
        node = stack.pop()
        if node.name in seen or node.op != "call_function":
            continue
        seen.add(node.name)
        meaning = meaning_of(graph, node)
        if isinstance(meaning, BatchNorm):
            if meaning.scale is None and (meaning.mean, 0) in slices:
                return "its batch norm has no scale"
            if take(weights, meaning.scale, (0,)):
                take(shifts, meaning.shift, (0,))
            continue
        if isinstance(meaning, LinearMap) and not meaning.indexed:
            if meaning.layout is Layout.CONVOLUTION_TRANSPOSED and meaning.groups > 1:
                return "made by a grouped transposed convolution"
            if meaning.weight is None:
                return "its weights are computed in forward()"
            if take(weights, meaning.weight, (meaning.layout.output_dim,)):
                take(shifts, meaning.bias, (0,))
            continue
        operands = [value for value in node.all_input_nodes if state_name(graph, value) is None]
        parameters = [state_name(graph, value) for value in node.all_input_nodes if value not in operands]
        if isinstance(meaning, Product):
            taken = [take(weights, name, (0, 1, 2)) for name in parameters]
            if any(taken):
                continue
        stack.extend(operands)
        if isinstance(meaning, Sum):
            for name in parameters:
                take(shifts, name, (0, 1, 2))
    if not weights:
        return "no weight of its own makes it"
    outputs: dict[tuple[str, int], UnitPart] = {}
    for consumer in group.consumers:
        dim = consumer.layout.input_dim
        blocks = consumer.groups if consumer.layout is Layout.CONVOLUTION else 1
        outputs[consumer.weight, dim] = UnitPart(consumer.weight, dim, consumer.positions, blocks)
    return Scaling(group, tuple(weights.values()), tuple(shifts.values()), tuple(outputs.values()))

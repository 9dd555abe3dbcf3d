"""Couplings: a network's layers in disjoint pairs, so that each weight belongs to at most one group of units.

A coupling's units have input weights w_k (rows of a producer, or the batch norm scale behind it) and output weights
v_k (columns of a consumer). Pairs are taken greedily in network order, units with an activation before linear ones, as
Yang et al. 2022 (PathProx, appendix A) couple layers 1-2, 3-4, …; behind batch norm w_k is the norm's scale, so that
every convolution can be some coupling's v_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.scaling import Scaling, UnitPart, find_scalings


@dataclass(frozen=True, eq=False)
class Bound:
    """A part of one parameter of a living network: `part` says where the units lie in `tensor`."""

    part: UnitPart
    tensor: nn.Parameter

    def squares(self) -> Tensor:
        """Sum of squares (K,) of every unit."""
        return self.part.squares(self.tensor)

    def scale_(self, factors: Tensor) -> None:
        """Multiply by factors (K,)."""
        self.part.scale_(self.tensor.data, factors)


@dataclass(frozen=True, eq=False)
class Coupling:
    """K units: `inputs` are the w_k, `shifts` what scales with them, `outputs` the v_k.

    Attributes:
        name: of the group of units.
        active: whether a nonlinear activation stands between w and v.
    """

    name: str
    units: int
    active: bool
    inputs: tuple[Bound, ...]
    shifts: tuple[Bound, ...]
    outputs: tuple[Bound, ...]

    def input_norms(self) -> Tensor:
        """‖w_k‖ (K,)."""
        return torch.stack([bound.squares() for bound in self.inputs]).sum(0).sqrt()

    def output_norms(self) -> Tensor:
        """‖v_k‖ (K,)."""
        return torch.stack([bound.squares() for bound in self.outputs]).sum(0).sqrt()

    def path_norm(self) -> Tensor:
        """Σ_k ‖w_k‖‖v_k‖."""
        return (self.input_norms() * self.output_norms()).sum()

    def active_units(self, tolerance: float = 1e-6) -> int:
        """Units whose ‖w_k‖‖v_k‖ is above `tolerance` times the layer's largest."""
        products = self.input_norms() * self.output_norms()
        return int((products > tolerance * products.max()).sum()) if float(products.max()) > 0 else 0


@dataclass(frozen=True, eq=False)
class Couplings:
    """What PathProx works on.

    Attributes:
        pairs: disjoint couplings, in network order.
        links: (i, j, group): the units of `group` are made by the v of pair i and read by the w of pair j; scaling them
            moves path norm from one pair to the other without changing the network.
        skipped: group name -> why its units are in no coupling.
    """

    pairs: tuple[Coupling, ...]
    links: tuple[tuple[int, int, Coupling], ...]
    skipped: dict[str, str]

    def fraction_active(self, tolerance: float = 1e-6) -> float:
        """Active units over all units, of the couplings with an activation (of all, where none has one)."""
        chosen = [pair for pair in self.pairs if pair.active] or list(self.pairs)
        total = sum(pair.units for pair in chosen)
        return sum(pair.active_units(tolerance) for pair in chosen) / total if total else 1.0


def find_couplings(module: nn.Module, inputs: tuple[Tensor, ...] | Tensor) -> Couplings:
    """The disjoint pairs of a network, found from its traced graph.

    Raises:
        TraceError: the network cannot be exported to a graph.
    """
    examples = (inputs,) if isinstance(inputs, Tensor) else inputs
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = {**parameters, **dict(module.named_buffers())}
    graph = trace_network(module, examples)
    scalings, reasons = find_scalings(graph, find_units(graph, module), state)
    order = {scaling.group.name: number for number, scaling in enumerate(scalings)}
    usable = [each for each in scalings if all(part.name in parameters for part in _parts(each))]
    for scaling in scalings:
        if scaling not in usable:
            reasons[scaling.group.name] = "it is scaled by a buffer, which is not trained"
    used: set[str] = set()
    chosen: list[Scaling] = []
    for scaling in sorted(usable, key=lambda scaling: (scaling.group.activation is None, order[scaling.group.name])):
        names = {part.name for part in (*scaling.weights, *scaling.outputs)}
        if names & used or not _alone(scaling):
            reasons[scaling.group.name] = "its weights belong to another coupling"
            continue
        used |= names
        chosen.append(scaling)
    chosen.sort(key=lambda each: order[each.group.name])
    pairs = tuple(_bind(each, parameters) for each in chosen)
    makes = {part.name: number for number, each in enumerate(chosen) for part in each.outputs}
    reads = {part.name: number for number, each in enumerate(chosen) for part in each.weights}
    links = []
    for scaling in usable:
        makers = {makes.get(part.name) for part in scaling.weights}
        readers = {reads.get(part.name) for part in scaling.outputs}
        if len(makers) == len(readers) == 1 and None not in makers | readers and makers != readers:
            links.append((makers.pop() or 0, readers.pop() or 0, _bind(scaling, parameters)))
    return Couplings(pairs, tuple(links), reasons)


def _parts(scaling: Scaling) -> Sequence[UnitPart]:
    return (*scaling.weights, *scaling.shifts, *scaling.outputs)


def _alone(scaling: Scaling) -> bool:
    """Whether no tensor is both input and output of the group (a recurrence, a residual stream)."""
    return not {part.name for part in scaling.weights} & {part.name for part in scaling.outputs}


def _bind(scaling: Scaling, parameters: dict[str, nn.Parameter]) -> Coupling:
    def bound(parts: Sequence[UnitPart]) -> tuple[Bound, ...]:
        return tuple(Bound(part, parameters[part.name]) for part in parts)

    group = scaling.group
    return Coupling(
        name=group.name,
        units=group.unit_count,
        active=group.activation is not None,
        inputs=bound(scaling.weights),
        shifts=bound(scaling.shifts),
        outputs=bound(scaling.outputs),
    )


def weight_decay_objective(module: nn.Module, loss: float, penalty: float) -> float:
    """loss + λ/2 Σ‖W‖² over the tensors of two or more dimensions; biases and norm scales are free."""
    squares = sum(float(value.detach().double().square().sum()) for value in module.parameters() if value.ndim >= 2)
    return loss + penalty / 2 * squares

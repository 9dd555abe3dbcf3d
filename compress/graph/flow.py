"""Channel flow: the atoms of every tensor of a network graph, found by one rule for each operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from compress.graph.atoms import Atoms, Dimension, Factor, Flow, dimension_size, is_tracked
from compress.graph.ops import (
    UNREAD_FORM,
    LinearMap,
    Meaning,
    Normalisation,
    Rule,
    operation_name,
    place_of,
    state_name,
)
from compress.graph.trace import NetworkGraph

_BATCH = 1009  # stands for the symbolic batch: a prime, so that no channel count is mistaken for a multiple of it


@dataclass(frozen=True, eq=False)
class Contraction:
    """A linear map with the atoms of its channels.

    Attributes:
        input_dimension: channels that it sums over, () for a depthwise convolution or a table of rows.
        weight_dimension: the same channels as the weight's columns number them.
        output_dimension: channels that it makes.
    """

    map: LinearMap
    input_dimension: Dimension
    weight_dimension: Dimension
    output_dimension: Dimension


@dataclass(frozen=True, eq=False)
class Statistic:
    """A mean or normalisation over dimensions whose positions can be removed: (dim of its first argument, atoms)."""

    node: fx.Node
    dims: tuple[tuple[int, Dimension], ...]
    normalisation: Normalisation | None


@dataclass(frozen=True, eq=False)
class Touch:
    """Atoms that pass an operation.

    Attributes:
        name: of the operation.
        homogeneous: whether scaling the atoms by γ > 0 scales the result by γ.
        count: of groups, where the kind is GROUPS.
        padding: what of a padding the atoms are, where the operation is one.
    """

    class Kind(Enum):
        """What the operation does with them."""

        ACTIVATION = "a function of every value alone"
        OTHER = "a normalisation, a product, a pooling"
        SUM = "streams of different origin meet"
        SHAPE = "a size that may be written down in Python"
        GROUPS = "counted as groups"

    class Padding(Enum):
        """What of a padding."""

        INSIDE = "what stands between the zeros"
        BEFORE = "the zeros in front"
        AFTER = "the zeros behind"

    node: fx.Node
    dimension: Dimension
    kind: Kind
    name: str
    homogeneous: bool = True
    count: int = 0
    padding: Padding | None = None


class ChannelFlow:
    """Runs the rules over a graph once; afterwards holds every node's flow and what the rules recorded."""

    def __init__(self, graph: NetworkGraph, rules: Mapping[str, Rule]) -> None:
        self.graph = graph
        self.rules = rules
        self.atoms = Atoms()
        self.values: dict[fx.Node, Any] = {}
        self.parameters: dict[str, Flow] = {}
        self.contractions: list[Contraction] = []
        self.statistics: list[Statistic] = []
        self.touches: list[Touch] = []
        self.active: set[fx.Node] = set()  # what depends on the network's inputs
        for node in graph.graph.nodes:
            if node.name in graph.inputs or any(source in self.active for source in node.all_input_nodes):
                self.active.add(node)
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "output":
                for value in graph.outputs:
                    if value is not None:
                        self.pin_flow(self.of(value), "is an output of the network")
            elif node.op == "call_function":
                self.values[node] = self._apply(node)

    def _placeholder(self, node: fx.Node) -> Flow:
        sizes = self.sizes(node)
        name = self.graph.tensors.get(node.name, self.graph.buffers.get(node.name))
        value = node.meta.get("val")
        if name is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return self.fixed(sizes)
        name = self.graph.aliases.get(name, name)
        known = self.parameters.get(name)
        if known is None:
            free = [size > 1 for size in sizes]
            if node.name in self.graph.buffers:  # no file holds it: what is left of it must follow from its shape
                content = self.graph.constants[node.name]
                free = [
                    is_free and bool((content == content.narrow(dim, 0, 1)).all()) for dim, is_free in enumerate(free)
                ]
            known = tuple(
                (Factor(size, self.atoms.fresh(size) if is_free else None),)
                for size, is_free in zip(sizes, free, strict=True)
            )
            self.parameters[name] = known
        return known

    def _apply(self, node: fx.Node) -> Any:
        rule = self.rules.get(operation_name(node))
        lack = "which has no rule"
        if rule is not None:
            try:
                return rule.channels(self, node)
            except UNREAD_FORM:
                lack = "in a form that its rule does not know"
        if isinstance(node.meta.get("val"), (torch.SymInt, int, bool, float)) and not self.tracked_inputs(node):
            return ()
        if rule is not None or not operation_name(node).startswith(("sym_", "_assert", "eq", "ge", "le", "lt", "gt")):
            for source in node.all_input_nodes:
                self.pin_value(self.values.get(source), f"reaches the operation {operation_name(node)}, {lack}")
        return self.unknown_output(node)

    # ---- what the rules use

    def meaning(self, node: fx.Node) -> Meaning | None:
        """What the node computes; None where no rule says it."""
        rule = self.rules.get(operation_name(node)) if node.op == "call_function" else None
        return None if rule is None else rule.read(self.graph, node)

    def of(self, value: Any) -> Flow:
        """The flow of an argument; numbers have no dimensions."""
        if isinstance(value, fx.Node):
            flow = self.values.get(value)
            return flow if isinstance(flow, tuple) else ()
        return ()

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """The node's shape, the symbolic batch replaced by a large prime; () when it is not a tensor."""
        value = node.meta.get("val")
        return tuple(concrete(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()

    def fixed(self, sizes: Iterable[int]) -> Flow:
        """A flow that no unit reaches."""
        return tuple((Factor(size),) for size in sizes)

    def unknown_output(self, node: fx.Node) -> Any:
        """Fixed flows of the node's output or outputs."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return tuple(
                self.fixed(concrete(size) for size in part.shape) if isinstance(part, torch.Tensor) else ()
                for part in value
            )
        return self.fixed(self.sizes(node))

    def tracked_inputs(self, node: fx.Node) -> bool:
        """Whether any tensor argument has positions that can be removed."""
        return any(
            is_tracked(dimension) for source in node.all_input_nodes for dimension in self.of(source) if dimension
        )

    def where(self, node: fx.Node) -> str:
        """The operation and its module, for reasons that people read."""
        return place_of(node)

    def pin(self, dimension: Dimension, reason: str) -> None:
        """Forbid removing any position of the dimension."""
        for factor in dimension:
            self.atoms.pin(factor.label, reason)

    def pin_flow(self, flow: Flow, reason: str) -> None:
        """Forbid removing any position of any dimension."""
        for dimension in flow:
            self.pin(dimension, reason)

    def pin_value(self, value: Any, reason: str) -> None:
        """`pin_flow` for a flow or a tuple of flows."""
        if not isinstance(value, tuple):
            return
        for entry in value:
            if isinstance(entry, Factor):
                self.atoms.pin(entry.label, reason)
            else:
                self.pin_value(entry, reason)

    def join(self, first: Dimension, second: Dimension, node: fx.Node) -> Dimension:
        """Demand that two dimensions of one size lose the same positions."""
        if any(factor.uniform for factor in (*first, *second) if factor.size > 1):
            self.touch_shape(node, first)
            self.touch_shape(node, second)
        return self.atoms.join_dimensions(
            first, second, f"meets something that cannot be cut with it ({self.where(node)})"
        )

    def broadcast(self, flows: list[Flow], node: fx.Node) -> Flow:
        """Dimensions aligned at the right; size-1 dimensions impose nothing, all others are joined."""
        rank = max((len(flow) for flow in flows), default=0)
        dimensions: list[Dimension] = []
        for position in range(-rank, 0):
            present = [flow[position] for flow in flows if len(flow) >= -position]
            wide = [dimension for dimension in present if dimension_size(dimension) != 1]
            if not wide:
                dimensions.append((Factor(1),))
                continue
            joined = wide[0]
            for other in wide[1:]:
                joined = self.join(joined, other, node)
            dimensions.append(joined)
        return tuple(dimensions)

    def touch(
        self,
        node: fx.Node,
        dimension: Dimension,
        kind: Touch.Kind,
        name: str,
        homogeneous: bool = True,
        *,
        count: int = 0,
        padding: Touch.Padding | None = None,
    ) -> None:
        """Record that the dimension's atoms pass an operation."""
        if is_tracked(dimension):
            self.touches.append(Touch(node, dimension, kind, name, homogeneous, count, padding))

    def touch_flow(self, node: fx.Node, flow: Flow, kind: Touch.Kind, name: str, homogeneous: bool = True) -> None:
        """`touch` for every dimension."""
        for dimension in flow:
            self.touch(node, dimension, kind, name, homogeneous)

    def touch_shape(self, node: fx.Node, dimension: Dimension) -> None:
        """Record that a size which may be written down in Python involves the dimension's atoms."""
        self.touch(node, dimension, Touch.Kind.SHAPE, operation_name(node))

    def parameter_name(self, value: Any) -> str | None:
        """State-dict name when the argument is a parameter or buffer itself (tied weights: the first name)."""
        return state_name(self.graph, value)


def concrete(size: Any) -> int:
    """An integer for a size that may be symbolic."""
    if isinstance(size, int):
        return size
    return _at_batch(sympy.sympify(size.node.expr))


@lru_cache(maxsize=1024)
def _at_batch(expression: sympy.Expr) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _BATCH)))

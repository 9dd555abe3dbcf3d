"""What an operation of the graph is: a linear map, a normalisation, a sum, one that changes no value.

A `Rule` says of one operation how channels pass it and what it means; the meaning is one of the values below. Costs,
latencies, norms, surgery and the walk behind a consumer read these values and no names of operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from compress.graph.trace import NetworkGraph, module_path


class Layout(Enum):
    """How the weight of a linear map lies: D outputs, I inputs."""

    LINEAR = "(D, I)"
    LINEAR_TRANSPOSED = "(I, D)"
    CONVOLUTION = "(D, I/groups, taps…)"
    CONVOLUTION_TRANSPOSED = "(I, D/groups, taps…)"

    @property
    def spatial(self) -> bool:
        """A convolution, of (batch, channels, …); else the channels are the last dimension."""
        return self in (Layout.CONVOLUTION, Layout.CONVOLUTION_TRANSPOSED)

    @property
    def input_dim(self) -> int:
        """The weight's dimension that runs over inputs."""
        return 0 if self in (Layout.LINEAR_TRANSPOSED, Layout.CONVOLUTION_TRANSPOSED) else 1

    @property
    def output_dim(self) -> int:
        """The weight's dimension that runs over outputs."""
        return 1 - self.input_dim


@dataclass(frozen=True)
class Window:
    """The window of a convolution, one entry for each spatial dimension; all empty for other linear maps.

    Attributes:
        trailing: zeros behind the last pixel beyond those of `padding` (an even window with padding="same" has one).
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    trailing: tuple[int, ...] = ()


NO_WINDOW = Window()


UNREAD_FORM = (TypeError, ValueError, IndexError, KeyError, AttributeError, ArithmeticError)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear map, with a bias or without.

    Attributes:
        node: its value; `input`: what it is applied to; `matrix`, `offset`: its weight and bias.
        weight, bias: state names of these; None where they are computed, or where there is no bias.
        groups: equal blocks of channels that are mapped each by itself.
        indexed: the input holds numbers of the weight's rows, which are looked up: nothing is multiplied.
    """

    node: fx.Node
    layout: Layout
    input: fx.Node
    matrix: fx.Node
    offset: fx.Node | None
    weight: str | None
    bias: str | None
    groups: int = 1
    window: Window = NO_WINDOW
    indexed: bool = False

    @property
    def taps(self) -> int:
        """Kernel taps, 1 without a window."""
        return math.prod(traced_shape(self.matrix)[2:]) if self.layout.spatial else 1

    @property
    def positions(self) -> int:
        """How often the traced batch multiplies each of the weight's elements, wherever its samples lie."""
        scattered = self.layout is Layout.CONVOLUTION_TRANSPOSED
        shape = traced_shape(self.input if scattered else self.node)
        return math.prod((shape[0], *shape[2:]) if self.layout.spatial else shape[:-1])

    def apply(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """The map of other inputs by another weight, its bias zero."""
        blocks = self.groups if self.layout is Layout.CONVOLUTION_TRANSPOSED else 1
        shift = weight.new_zeros(weight.shape[self.layout.output_dim] * blocks)
        given = {self.input: inputs, self.matrix: weight, self.offset: shift}
        args, keywords = fx.node.map_arg((self.node.args, self.node.kwargs), given.get)
        result: Tensor = self.node.target(*args, **keywords)  # type: ignore[operator]
        return result


@dataclass(frozen=True)
class BatchNorm:
    """A batch normalisation by running statistics: scale·(x − mean)/√(variance + eps) + shift.

    Attributes:
        node: name of its value; `input`: of what it is applied to.
        scale, shift, mean, variance: state names; None where there is no such tensor.
    """

    node: str
    input: str
    scale: str | None
    shift: str | None
    mean: str | None
    variance: str | None
    eps: float


@dataclass(frozen=True)
class Normalisation:
    """A normalisation by statistics of its input, which is the first argument, then a scale and a shift.

    Attributes:
        sizes: whether the second argument repeats the sizes of the normalised dimensions, which are the last ones; the
            scale and the shift run over these. Else they run over dimension 1.
    """

    sizes: bool


@dataclass(frozen=True)
class Identity:
    """The first argument's values as they are, in evaluation mode."""


@dataclass(frozen=True)
class Recast:
    """The first argument's values in another precision."""


@dataclass(frozen=True)
class Rearrangement:
    """Values of the first argument at other places, or some of them.

    Attributes:
        order: where its dimensions are permuted and nothing else, dimension i of the result is `order[i]`.
    """

    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pooling:
    """Means or maxima of the first argument over some of its positions."""


@dataclass(frozen=True)
class Sum:
    """First argument + factor · second argument."""

    factor: float


@dataclass(frozen=True)
class Product:
    """First argument · second argument, elementwise."""


@dataclass(frozen=True)
class Rectification:
    """The first argument, cut off below `low` and above `high`."""

    low: float
    high: float


Meaning: TypeAlias = (
    LinearMap | BatchNorm | Normalisation | Identity | Recast | Rearrangement | Pooling | Sum | Product | Rectification
)


def mean_nothing(network: NetworkGraph, node: fx.Node) -> None:
    """The meaning of operations of which only the channels matter."""


@dataclass(frozen=True)
class Rule:
    """All that is known of an operation.

    Attributes:
        channels: (flow, node) -> how the channels of its inputs become those of its output.
        meaning: (graph, node) -> what it computes; None where that is none of the meanings.
    """

    channels: Callable[..., Any]
    meaning: Callable[[NetworkGraph, fx.Node], Meaning | None] = mean_nothing

    def read(self, network: NetworkGraph, node: fx.Node) -> Meaning | None:
        """The meaning; None too where the operation stands in a form that the rule cannot read."""
        try:
            return self.meaning(network, node)
        except UNREAD_FORM:
            return None


def rules(*names: str, channels: Callable[..., Any], meaning: Callable[..., Any] = mean_nothing) -> dict[str, Rule]:
    """One rule for several operations."""
    return dict.fromkeys(names, Rule(channels, meaning))


def operation_name(node: fx.Node) -> str:
    """`relu` for aten.relu.default and for aten.relu_.default; the Python name for anything else."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = str(getattr(packet, "__name__", packet))
    return name if name.endswith("__") else name.removesuffix("_")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments that the node gives, by the names in its operation's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    return {**dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)), **node.kwargs}


def state_name(network: NetworkGraph, value: object) -> str | None:
    """State name where an argument is a parameter or buffer itself; a tensor with several names goes by its first."""
    name = network.tensors.get(value.name) if isinstance(value, fx.Node) and value.op == "placeholder" else None
    return None if name is None else network.aliases.get(name, name)


def traced_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a value, () when it is no tensor; the batch, where it is symbolic, has its traced size.

    A size that values decide, as how many samples a mask chooses, counts as 1.
    """
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return tuple(size if isinstance(size, int) else int(size.node.hint or 1) for size in sizes)


def same_precision(node: fx.Node) -> bool:
    """Whether the node's value has the precision of its first argument."""
    source = node.args[0] if node.args else None
    values = [operand.meta.get("val") for operand in (node, source) if isinstance(operand, fx.Node)]
    return len({value.dtype for value in values if isinstance(value, torch.Tensor)}) == 1


def draws_randomly(node: fx.Node) -> bool:
    """Whether the node gives other numbers each time; a dropout in evaluation mode does not."""
    given = arguments_of(node)
    switches = [given[name] for name in ("train", "training", "dropout_p") if name in given]
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return seeded and (any(switches) or ("scaled_dot_product" not in operation_name(node) and not switches))


def place_of(node: fx.Node) -> str:
    """The operation and its module, for people to read."""
    path = module_path(node)
    return f"{operation_name(node)} in {path}" if path else operation_name(node)

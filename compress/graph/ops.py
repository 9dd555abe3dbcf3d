"""What an operation of the graph is: a linear map, a batch normalisation, one that changes no value.

Operations are told apart here, by their names and by the names that their schemas give the arguments; what is read off
a node is a value, which costs, latencies, norms and the walk behind a consumer share. A further linear map is one line
of `LINEAR_MAPS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from compress.graph.program import Program
from compress.graph.trace import NetworkGraph

IDENTITIES = frozenset(("dropout", "feature_dropout", "clone", "contiguous", "alias", "detach"))  # in evaluation mode
LINEAR_MAPS = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), ("input", "weight", "bias")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ("input", "weight", "bias")),
    "matmul": ("self", "other", None),
    "mm": ("self", "mat2", None),
    "addmm": ("mat1", "mat2", "self"),
}  # operation -> what its schema calls the input, the weight and the bias
BATCH_NORMS = frozenset(
    ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
)


@dataclass(frozen=True)
class LinearMap:
    """A linear map by a tensor of the network.

    Attributes:
        node: name of its value; `input`: of what it is applied to.
        weight, bias: state names.
        spatial: a convolution, (batch, channels, …); else the channels are the last dimension.
        transposed: the weight's first dimension is the input's channels.
        window: a convolution's arguments behind the bias, as they stand in the graph.
    """

    node: str
    operation: str
    input: str
    weight: str
    bias: str | None
    spatial: bool
    transposed: bool
    window: tuple[Any, ...]

    def positions(self, program: Program) -> int:
        """How often one sample multiplies each of the weight's elements."""
        scattered = self.spatial and self.transposed
        shape = program.shape(self.input if scattered else self.node)
        return math.prod(shape[2:] if self.spatial else shape[1:-1])


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


def operation_of(node: fx.Node) -> str:
    """`relu` for aten.relu.default and for aten.relu_.default; the Python name for anything else."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).removesuffix("_")


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments that the node gives, by the names in its operation's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    return {**dict(zip((each.name for each in schema.arguments), node.args, strict=False)), **node.kwargs}


def state_name(network: NetworkGraph, value: object) -> str | None:
    """State name where an argument is a parameter or buffer itself; a tensor with several names goes by its first."""
    name = network.tensors.get(value.name) if isinstance(value, fx.Node) else None
    return None if name is None else network.aliases.get(name, name)


def linear_maps(network: NetworkGraph) -> tuple[LinearMap, ...]:
    """Every linear map by a tensor of the network, in execution order."""
    found: list[LinearMap] = []
    for node in network.graph.nodes:
        operation = operation_of(node)
        if node.op != "call_function" or operation not in LINEAR_MAPS:
            continue
        given = arguments_of(node)
        source, weight, bias = (given.get(name) if name else None for name in LINEAR_MAPS[operation])
        name = state_name(network, weight)
        if name is None or not isinstance(source, fx.Node):
            continue
        spatial = operation.startswith("conv")
        found.append(
            LinearMap(
                node=node.name,
                operation=operation,
                input=source.name,
                weight=name,
                bias=state_name(network, bias),
                spatial=spatial,
                transposed="transpose" in operation or operation in ("matmul", "mm", "addmm"),
                window=tuple(node.args[3:]) if spatial else (),
            )
        )
    return tuple(found)


def batch_norms(network: NetworkGraph) -> tuple[BatchNorm, ...]:
    """Every batch normalisation by running statistics, in execution order."""
    found: list[BatchNorm] = []
    for node in network.graph.nodes:
        if node.op != "call_function" or operation_of(node) not in BATCH_NORMS:
            continue
        given = arguments_of(node)
        if given.get("training") or not isinstance(given.get("input"), fx.Node):
            continue
        scale, shift, mean, variance = (
            state_name(network, given.get(name)) for name in ("weight", "bias", "running_mean", "running_var")
        )
        found.append(BatchNorm(node.name, given["input"].name, scale, shift, mean, variance, float(given["eps"])))
    return tuple(found)

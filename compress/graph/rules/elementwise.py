"""Operations that act on every value alone: they keep channels apart and couple the channels of their operands."""

from __future__ import annotations

import math

from torch import fx

from compress.graph.atoms import UNIFORM, Factor, Flow, dimension_size, is_tracked
from compress.graph.flow import ChannelFlow, Touch
from compress.graph.ops import (
    Identity,
    Meaning,
    Product,
    Recast,
    Rectification,
    Sum,
    argument,
    operation_name,
    rules,
    same_precision,
)
from compress.graph.trace import NetworkGraph

HOMOGENEOUS = ("relu", "leaky_relu", "rrelu", "abs")
OTHER_ACTIVATIONS = (
    *("gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "elu", "selu", "celu"),
    *("mish", "softplus", "logsigmoid", "log_sigmoid", "softsign", "exp", "log", "log1p", "sqrt", "rsqrt"),
    *("square", "reciprocal", "sin", "cos", "tan", "atan", "erf", "clamp", "clamp_min", "clamp_max", "clip", "pow"),
    *("sign", "floor", "ceil", "round", "zero", "fill", "trunc", "fix", "frac", "sgn", "logit", "sinc", "deg2rad"),
    *("log2", "log10", "exp2", "sinh", "cosh", "asin", "acos", "asinh", "acosh", "atanh", "erfc", "erfinv"),
    *("special_erf", "special_erfc", "special_exp2", "special_expm1", "special_expit", "special_log1p"),
    *("threshold", "hardshrink", "softshrink", "tanhshrink", "expm1", "nan_to_num", "special_logit"),
)
IDENTITY = (
    *("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "positive"),
    *("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
)
RECAST = ("to", "_to_copy", "type_as", "float", "double", "half")
SHAPED = (
    *("neg", "native_dropout", "logical_not", "bitwise_not", "isnan", "isinf", "real", "_assert_tensor_metadata"),
)  # other values of the same shape
BINARY = (
    *("rsub", "maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2", "hypot", "heaviside", "xlogy"),
    *("fmod", "remainder", "floor_divide", "atan2", "lerp", "where"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or"),
    *("masked_fill", "addcmul", "addcdiv"),
)
HARDTANH = {"min_val": -1.0, "max_val": 1.0}
CREATION = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")


def map_identity(flow: ChannelFlow, node: fx.Node) -> Flow:
    """The output has its argument's channels."""
    return flow.of(node.args[0]) if node.args else ()


def map_activation(flow: ChannelFlow, node: fx.Node) -> Flow:
    """A function of every value alone."""
    name = operation_name(node)
    if len(node.all_input_nodes) > 1:
        return map_binary(flow, node)
    source = flow.of(node.all_input_nodes[0])  # of pow the exponent alone may be a tensor
    flow.touch_flow(node, source, Touch.Kind.ACTIVATION, name, name in HOMOGENEOUS)
    return source


def map_binary(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Operands are broadcast against each other; dimensions of the same size lose the same positions."""
    flows = [flow.of(value) for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node)]
    name = operation_name(node)
    if name in ("add", "sub"):
        mark_sums(flow, node)
    result = flow.broadcast([tracked for tracked in flows if tracked], node)
    shifts = any(isinstance(value, (int, float)) and value for value in node.args[:2])
    if shifts or name not in ("add", "sub", "rsub", "where", "masked_fill", "maximum", "minimum"):
        flow.touch_flow(node, result, Touch.Kind.OTHER, name, False)
    return result


def mark_sums(flow: ChannelFlow, node: fx.Node) -> None:
    """Record where two activations of different origin are added: their units become one residual stream."""
    operands = [value for value in node.args[:2] if isinstance(value, fx.Node) and flow.parameter_name(value) is None]
    if len(operands) < 2:
        return
    if not all(value in flow.active for value in operands):  # a shift computed from parameters
        for value in operands:
            flow.touch_flow(node, flow.of(value), Touch.Kind.OTHER, "add", False)
        return
    for first, second in zip(reversed(flow.of(operands[0])), reversed(flow.of(operands[1])), strict=False):
        if dimension_size(first) == dimension_size(second) and is_tracked(first) and is_tracked(second):
            left, right = flow.atoms.flatten(first).atoms, flow.atoms.flatten(second).atoms
            if left is not None and right is not None:
                a, b = flow.atoms.resolve(left), flow.atoms.resolve(right)
                if a.shape != b.shape or (a != b).any():
                    flow.touch(node, first, Touch.Kind.SUM, "add")


def map_product(flow: ChannelFlow, node: fx.Node) -> Flow:
    """mul and div: homogeneous as long as only one operand depends on the units (the other scales them)."""
    flows = [flow.of(value) for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node)]
    dimensions = flow.broadcast([tracked for tracked in flows if tracked], node)
    operands = [value for value in node.args[:2] if isinstance(value, fx.Node)]
    active = [
        value
        for value in operands
        if any(is_tracked(dimension) for dimension in flow.of(value)) and flow.parameter_name(value) is None
    ]
    divides = operation_name(node).startswith("div") and len(operands) == 2 and operands[1] in active
    if len(active) > 1 or divides:
        flow.touch_flow(node, dimensions, Touch.Kind.OTHER, "gate", False)
    return dimensions


def map_prelu(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Its slopes belong to the channels of dimension 1."""
    source, slopes = flow.of(node.args[0]), flow.of(node.args[1])
    flow.touch_flow(node, source, Touch.Kind.ACTIVATION, "prelu")
    if slopes and dimension_size(slopes[0]) > 1 and len(source) > 1:
        joined = flow.join(source[1], slopes[0], node)
        return (source[0], joined, *source[2:])
    return source


def map_creation(flow: ChannelFlow, node: fx.Node) -> Flow:
    """A constant of its argument's shape: any of its positions may go."""
    return tuple((Factor(dimension_size(dimension), UNIFORM),) for dimension in flow.of(node.args[0]))


def map_new(flow: ChannelFlow, node: fx.Node) -> Flow:
    """A constant of a shape given by numbers, which may have been read off another tensor's shape."""
    return tuple((Factor(size, UNIFORM),) if size > 1 else (Factor(size),) for size in flow.sizes(node))


def map_copy(flow: ChannelFlow, node: fx.Node) -> Flow:
    """copy_: the source is broadcast into the destination."""
    return flow.broadcast([flow.of(node.args[0]), flow.of(argument(node, 1, "src"))], node)


def read_identity(network: NetworkGraph, node: fx.Node) -> Identity:
    """Nothing changes in evaluation mode."""
    return Identity()


def read_recast(network: NetworkGraph, node: fx.Node) -> Meaning:
    """The same values, perhaps in another precision."""
    return Identity() if same_precision(node) else Recast()


def read_sum(network: NetworkGraph, node: fx.Node) -> Sum | None:
    """add and sub, with their factor."""
    factor = node.kwargs.get("alpha", 1)
    if len(node.args) < 2 or not isinstance(factor, (int, float)):
        return None
    return Sum(-float(factor) if operation_name(node) == "sub" else float(factor))


def read_product(network: NetworkGraph, node: fx.Node) -> Product | None:
    """mul."""
    return Product() if len(node.args) == 2 else None


def read_rectification(network: NetworkGraph, node: fx.Node) -> Rectification:
    """relu, relu6, hardtanh."""
    if operation_name(node) == "relu":
        return Rectification(0.0, math.inf)
    if operation_name(node) == "relu6":
        return Rectification(0.0, 6.0)
    low, high = (float(argument(node, 1 + at, name, bound)) for at, (name, bound) in enumerate(HARDTANH.items()))
    return Rectification(low, high)


RULES = {
    **rules(*IDENTITY, channels=map_identity, meaning=read_identity),
    **rules(*RECAST, channels=map_identity, meaning=read_recast),
    **rules(*SHAPED, channels=map_identity),
    **rules(*HOMOGENEOUS, *OTHER_ACTIVATIONS, channels=map_activation),
    **rules("relu", "relu6", "hardtanh", channels=map_activation, meaning=read_rectification),
    **rules(*BINARY, channels=map_binary),
    **rules("add", "sub", channels=map_binary, meaning=read_sum),
    **rules("mul", "multiply", channels=map_product, meaning=read_product),
    **rules("div", "divide", "true_divide", channels=map_product),
    **rules(*CREATION, channels=map_creation),
    **rules("new_zeros", "new_ones", "new_empty", "new_full", "zeros", "ones", "empty", "full", channels=map_new),
    **rules("prelu", "_prelu_kernel", channels=map_prelu),
    **rules("copy", channels=map_copy),
}

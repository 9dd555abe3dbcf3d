"""Operations that sum over channels: linear maps, convolutions, matrix products, attention, embeddings.

A linear map needs no rule of its own for its channels: `linear_rule` takes what it means, and the rest follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from compress.graph.atoms import Dimension, Flow, dimension_size, is_tracked
from compress.graph.flow import ChannelFlow, Contraction, Touch
from compress.graph.ops import (
    NO_WINDOW,
    Layout,
    LinearMap,
    Rule,
    Window,
    argument,
    arguments_of,
    operation_name,
    rules,
    state_name,
    traced_shape,
)
from compress.graph.trace import NetworkGraph


def linear_rule(*names: str, meaning: Callable[[NetworkGraph, fx.Node], LinearMap | None]) -> dict[str, Rule]:
    """The rule of linear maps: where `meaning` gives none, a product of two activations."""
    return rules(*names, channels=map_channels, meaning=meaning)


def map_channels(flow: ChannelFlow, node: fx.Node) -> Flow:
    """The output has the input's dimensions, its channels are those that the weight makes."""
    linear = flow.meaning(node)
    if not isinstance(linear, LinearMap):
        return map_product_of_matrices(flow, node)
    x = flow.of(linear.input)
    if not linear.layout.spatial:
        return (*x[:-1], contract(flow, linear, x[-1]))
    w = flow.of(linear.matrix)
    at = len(x) - len(w) + 1
    for dimension in w[2:]:
        flow.pin(dimension, f"is a spatial dimension of {flow.where(node)}")
    channels = contract(flow, linear, x[at]) if linear.groups == 1 else contract_groups(flow, linear, x[at])
    moves = (*linear.window.padding, *linear.window.trailing, *(step - 1 for step in linear.window.stride))
    if linear.taps == 1 and not any(moves):
        return (*x[:at], channels, *x[at + 1 :])  # every place by itself, like a linear map
    for dimension in x[at + 1 :]:
        flow.pin(dimension, f"is a spatial dimension of {flow.where(node)}")
    return (*x[:at], channels, *flow.fixed(flow.sizes(node)[at + 1 :]))


def contract(flow: ChannelFlow, linear: LinearMap, channels: Dimension) -> Dimension:
    """Join the input's channels with the weight's input dimension; the output's channels are the weight's other one."""
    weight = flow.of(linear.matrix)
    read, output = weight[linear.layout.input_dim], weight[linear.layout.output_dim]
    joined = flow.join(channels, read, linear.node)
    if linear.weight is None:
        flow.pin(joined, f"is read by {flow.where(linear.node)}, whose weight is computed and not a parameter")
    output = join_bias(flow, linear, output)
    flow.contractions.append(Contraction(linear, channels, read, output))
    return output


def contract_groups(flow: ChannelFlow, linear: LinearMap, channels: Dimension) -> Dimension:
    """Channels = (groups, channels per group) on both sides: whole groups go, or the same channels of all."""
    w, node, plain = flow.of(linear.matrix), linear.node, linear.layout is Layout.CONVOLUTION
    # dimension 0 of the weight runs over all groups: rows, or inputs when transposed
    inner = flow.atoms.split_dimension(channels, linear.groups)
    outer = flow.atoms.split_dimension(w[0], linear.groups)
    if inner is None or outer is None:
        reason = f"is grouped in a way that does not divide its channels ({flow.where(node)})"
        for dimension in (channels, *w):
            flow.pin(dimension, reason)
        return w[linear.layout.output_dim]
    which = flow.join(inner[0], outer[0], node)
    per_group_input, per_group_output = (inner[1], outer[1]) if plain else (inner[1], w[1])
    read = w[1] if plain else outer[1]
    if dimension_size(per_group_input) > 1:
        per_group_input = flow.join(per_group_input, read, node)
    output: Dimension = (*which, *per_group_output)
    if linear.weight is None:
        flow.pin(per_group_input, f"is read by {flow.where(node)}, whose weight is computed and not a parameter")
    output = join_bias(flow, linear, output)
    flow.touch(node, which, Touch.Kind.GROUPS, "groups", count=linear.groups)
    reads = dimension_size(per_group_input) > 1
    flow.contractions.append(
        Contraction(linear, (*inner[0], *inner[1]) if reads else (), read if reads else (), output)
    )
    return output


def join_bias(flow: ChannelFlow, linear: LinearMap, made: Dimension) -> Dimension:
    """The output's channels are those of the bias too."""
    bias = flow.of(linear.offset)
    return flow.join(made, bias[0], linear.node) if bias else made


def read_linear(network: NetworkGraph, node: fx.Node) -> LinearMap | None:
    """x Wᵀ + b over the last dimension."""
    return make_map(network, node, Layout.LINEAR, node.args[0], node.args[1], argument(node, 2, "bias"))


def read_convolution(network: NetworkGraph, node: fx.Node) -> LinearMap | None:
    """A convolution in one to three dimensions, plain, grouped, depthwise or transposed."""
    given = arguments_of(node)
    transposed = given.get("transposed", operation_name(node).startswith("conv_transpose"))
    layout = Layout.CONVOLUTION_TRANSPOSED if transposed else Layout.CONVOLUTION
    weight = given["weight"]
    window = read_window(given, traced_shape(weight)[2:])
    groups = int(given.get("groups", 1))
    return make_map(network, node, layout, given["input"], weight, given.get("bias"), groups, window)


def read_matmul(network: NetworkGraph, node: fx.Node) -> LinearMap | None:
    """x W with a matrix of the network on the right."""
    left, right = node.args[:2]
    if state_name(network, right) is None or len(traced_shape(right)) != 2:  # type: ignore[arg-type]
        return None
    return make_map(network, node, Layout.LINEAR_TRANSPOSED, left, right, None)


def read_addmm(network: NetworkGraph, node: fx.Node) -> LinearMap | None:
    """b + x W with a vector b and a matrix of the network."""
    bias, left, right = node.args[:3]
    scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    vector = isinstance(bias, fx.Node) and len(traced_shape(bias)) == 1
    if scaled or not vector or state_name(network, right) is None:
        return None
    return make_map(network, node, Layout.LINEAR_TRANSPOSED, left, right, bias)


def read_embedding(network: NetworkGraph, node: fx.Node) -> LinearMap | None:
    """Rows of a table chosen by the input: a linear map of unit vectors."""
    table, indices = node.args[:2]
    return make_map(network, node, Layout.LINEAR_TRANSPOSED, indices, table, None, indexed=True)


def make_map(
    network: NetworkGraph,
    node: fx.Node,
    layout: Layout,
    source: Any,
    matrix: Any,
    offset: Any,
    groups: int = 1,
    window: Window = NO_WINDOW,
    *,
    indexed: bool = False,
) -> LinearMap | None:
    """The map by these arguments of the node; None where one that it needs is no value of the graph."""
    if not isinstance(source, fx.Node) or not isinstance(matrix, fx.Node):
        return None
    return LinearMap(
        node=node,
        layout=layout,
        input=source,
        matrix=matrix,
        offset=offset if isinstance(offset, fx.Node) else None,
        weight=state_name(network, matrix),
        bias=state_name(network, offset),
        groups=groups,
        window=window,
        indexed=indexed,
    )


def read_window(given: dict[str, Any], kernel: tuple[int, ...]) -> Window:
    """Stride, padding and dilation of a convolution whose kernel has this extent, by the names of its arguments."""
    rank = len(kernel)

    def spread(value: object, default: int) -> tuple[int, ...]:
        if value is None:
            return (default,) * rank
        if isinstance(value, int):
            return (value,) * rank
        sizes = tuple(int(size) for size in value)  # type: ignore[attr-defined]
        return sizes * rank if len(sizes) == 1 else sizes

    stride, dilation = spread(given.get("stride"), 1), spread(given.get("dilation"), 1)
    padding = given.get("padding")
    trailing = (0,) * rank
    if padding == "valid":
        padding = 0
    elif padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        padding = [total // 2 for total in totals]
        trailing = tuple(total % 2 for total in totals)
    return Window(stride, spread(padding, 0), dilation, trailing)


def map_product_of_matrices(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Two activations multiplied: what is summed over cannot be cut."""
    reason = f"is summed over in a product of two activations ({flow.where(node)})"
    a, b = flow.of(node.args[0]), flow.of(node.args[1])
    if len(node.args) > 2 or len(a) < 2 or len(b) < 2:
        for source in node.all_input_nodes:
            flow.pin_flow(flow.of(source), reason)
        return flow.fixed(flow.sizes(node))
    flow.pin(a[-1], reason)
    flow.pin(b[-2], reason)
    batch = flow.broadcast([a[:-2], b[:-2]], node)
    result = (*batch, a[-2], b[-1])
    flow.touch_flow(node, result, Touch.Kind.OTHER, "matmul", False)
    return result


def map_baddbmm(flow: ChannelFlow, node: fx.Node) -> Flow:
    """input + a b for batches of matrices."""
    a, b = flow.of(node.args[1]), flow.of(node.args[2])
    reason = f"is summed over in a product of two activations ({flow.where(node)})"
    flow.pin(a[-1], reason)
    flow.pin(b[-2], reason)
    product = (*flow.broadcast([a[:-2], b[:-2]], node), a[-2], b[-1])
    return flow.broadcast([product, flow.of(node.args[0])], node)


def map_einsum(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Letters that appear in the result pass through; letters that are summed over cannot be cut."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or "." in equation or not isinstance(operands, (list, tuple)):
        for source in node.all_input_nodes:
            flow.pin_flow(flow.of(source), f"reaches {flow.where(node)} with an ellipsis")
        return flow.fixed(flow.sizes(node))
    left, _, right = equation.replace(" ", "").partition("->")
    letters: dict[str, Dimension] = {}
    for term, operand in zip(left.split(","), operands, strict=True):
        for letter, dimension in zip(term, flow.of(operand), strict=True):
            known = letters.get(letter)
            if known is None or dimension_size(known) == 1:
                letters[letter] = dimension
            elif dimension_size(dimension) != 1:
                letters[letter] = flow.join(known, dimension, node)
    for letter, dimension in letters.items():
        if letter not in right:
            flow.pin(dimension, f"is summed over in {flow.where(node)}")
    result = tuple(letters[letter] for letter in right)
    flow.touch_flow(node, result, Touch.Kind.OTHER, "einsum", False)
    return result


def map_attention(flow: ChannelFlow, node: fx.Node) -> Flow:
    """scaled_dot_product_attention: heads pass, query and key widths are summed over, the value width comes out."""
    query, key, value = (flow.of(node.args[index]) for index in range(3))
    mask = flow.of(argument(node, 3, "attn_mask"))
    reason = f"is summed over in the attention scores ({flow.where(node)})"
    for dimension in (query[-1], key[-1]):
        flow.pin(dimension, reason)
    for dimension in (query[-2], key[-2], value[-2]):
        flow.pin(dimension, f"is a position of the sequence in {flow.where(node)}")
    grouped = bool(argument(node, 7, "enable_gqa", False))
    if grouped and dimension_size(query[-3]) != dimension_size(key[-3]):
        kept = flow.join(key[-3], value[-3], node)
        halves = flow.atoms.split_dimension(query[-3], dimension_size(kept))
        if halves is None:
            flow.pin_flow((query[-3], kept), reason)
            heads: Dimension = query[-3]
        else:
            heads = (*flow.join(halves[0], kept, node), *halves[1])
        batch: Flow = (*flow.broadcast([query[:-3], key[:-3], value[:-3]], node), heads)
    else:
        batch = flow.broadcast([query[:-2], key[:-2], value[:-2]], node)
    if len(mask) > 2:
        flow.broadcast([batch, mask[:-2]], node)
    result = (*batch, query[-2], value[-1])
    flow.touch_flow(node, result, Touch.Kind.OTHER, "attention", False)
    return result


def map_embedding(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Rows of a table chosen by the input."""
    table, indices = flow.of(node.args[0]), flow.of(node.args[1])
    flow.pin(table[0], f"is chosen by an index ({flow.where(node)})")
    meaning = flow.meaning(node)
    if isinstance(meaning, LinearMap) and meaning.weight is not None and is_tracked(table[1]):
        flow.contractions.append(Contraction(meaning, (), (), table[1]))
    return (*indices, table[1])


def map_weight_norm(flow: ChannelFlow, node: fx.Node) -> Flow:
    """w = g v / ‖v‖ with the norm taken over all dimensions but one."""
    direction, length = flow.of(node.args[0]), flow.of(node.args[1])
    dim = int(argument(node, 2, "dim", 0)) % len(direction)
    for index, dimension in enumerate(direction):
        if index != dim:
            flow.pin(dimension, f"is part of a weight norm ({flow.where(node)})")
    joined = direction[dim]
    if dimension_size(length[min(dim, len(length) - 1)]) > 1:
        joined = flow.join(direction[dim], length[min(dim, len(length) - 1)], node)
    return (*direction[:dim], joined, *direction[dim + 1 :])


RULES = {
    **linear_rule("linear", meaning=read_linear),
    **linear_rule("conv1d", "conv2d", "conv3d", "convolution", meaning=read_convolution),
    **linear_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", meaning=read_convolution),
    **linear_rule("matmul", "mm", "bmm", meaning=read_matmul),
    **linear_rule("addmm", meaning=read_addmm),
    **rules("baddbmm", channels=map_baddbmm),
    **rules("einsum", channels=map_einsum),
    **rules("scaled_dot_product_attention", channels=map_attention),
    **rules("embedding", channels=map_embedding, meaning=read_embedding),
    **rules("_weight_norm", "_weight_norm_interface", channels=map_weight_norm),
}

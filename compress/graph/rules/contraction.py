"""Operations that sum over channels: linear maps, convolutions, matrix products, attention, embeddings."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from compress.graph.atoms import Dimension, Flow, dimension_size, is_tracked
from compress.graph.flow import ChannelFlow, Contraction, Touch, argument, operation_name


def contract(
    flow: ChannelFlow,
    node: fx.Node,
    kind: str,
    source: Any,
    weight: Any,
    bias: Any,
    dims: tuple[int, int],
    channels: Dimension,
    *,
    taps: int = 1,
    groups: int = 1,
) -> Dimension:
    """Join the input's channels with the weight's input dimension; the output's channels are the weight's other one."""
    weight_flow = flow.of(weight)
    input_dim, output_dim = dims
    name = flow.parameter_name(weight)
    read, made = weight_flow[input_dim], weight_flow[output_dim]
    joined = flow.join(channels, read, node)
    if name is None:
        flow.pin(joined, f"is read by {flow.where(node)}, whose weight is computed and not a parameter")
    if bias is not None and flow.of(bias):
        made = flow.join(made, flow.of(bias)[0], node)
    flow.contractions.append(
        Contraction(
            node=node,
            kind=kind,
            input=source,
            weight=name,
            bias=flow.parameter_name(bias),
            input_dimension=channels,
            weight_dimension=read,
            weight_dim=input_dim,
            output_dimension=made,
            taps=taps,
            groups=groups,
        )
    )
    return made


def map_linear(flow: ChannelFlow, node: fx.Node) -> Flow:
    """x Wᵀ + b over the last dimension."""
    source, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    x = flow.of(source)
    return (*x[:-1], contract(flow, node, "linear", source, weight, bias, (1, 0), x[-1]))


def map_convolution(flow: ChannelFlow, node: fx.Node) -> Flow:
    """A convolution in one to three dimensions, plain, grouped or depthwise."""
    name = operation_name(node)
    source, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if name == "convolution":
        transposed, groups = bool(argument(node, 6, "transposed", False)), int(argument(node, 8, "groups", 1))
    elif name.startswith("conv_transpose"):
        transposed, groups = True, int(argument(node, 6, "groups", 1))
    else:
        transposed, groups = False, int(argument(node, 6, "groups", 1))
    x, w, sizes = flow.of(source), flow.of(weight), flow.sizes(node)
    spatial = len(w) - 2
    at = len(x) - spatial - 1
    for dimension in (*x[at + 1 :], *w[2:]):
        flow.pin(dimension, f"is a spatial dimension of {flow.where(node)}")
    taps = math.prod(dimension_size(dimension) for dimension in w[2:])
    dims = (0, 1) if transposed else (1, 0)
    kind = "conv_transpose" if transposed else "conv"
    if groups == 1:
        channels = contract(flow, node, kind, source, weight, bias, dims, x[at], taps=taps)
    else:
        channels = _contract_groups(flow, node, kind, source, weight, bias, dims, x[at], taps, groups)
    return (*x[:at], channels, *flow.fixed(sizes[at + 1 :]))


def _contract_groups(
    flow: ChannelFlow,
    node: fx.Node,
    kind: str,
    source: Any,
    weight: Any,
    bias: Any,
    dims: tuple[int, int],
    channels: Dimension,
    taps: int,
    groups: int,
) -> Dimension:
    """Channels = (groups, channels per group) on both sides: whole groups go, or the same channels of all."""
    w = flow.of(weight)
    grouped = w[0]  # the dimension of the weight that runs over all groups: rows, or inputs when transposed
    inner = flow.atoms.split_dimension(channels, groups)
    outer = flow.atoms.split_dimension(grouped, groups)
    if inner is None or outer is None:
        reason = f"is grouped in a way that does not divide its channels ({flow.where(node)})"
        for dimension in (channels, *w):
            flow.pin(dimension, reason)
        return w[dims[1]]
    which = flow.join(inner[0], outer[0], node)
    per_group_input, per_group_output = (inner[1], outer[1]) if dims == (1, 0) else (inner[1], w[1])
    read = w[1] if dims == (1, 0) else outer[1]
    if dimension_size(per_group_input) > 1:
        per_group_input = flow.join(per_group_input, read, node)
    made: Dimension = (*which, *per_group_output)
    if flow.parameter_name(weight) is None:
        flow.pin(per_group_input, f"is read by {flow.where(node)}, whose weight is computed and not a parameter")
    if bias is not None and flow.of(bias):
        made = flow.join(made, flow.of(bias)[0], node)
    flow.touch(node, which, Touch.Kind.GROUPS, "groups", count=groups)
    reads = dimension_size(per_group_input) > 1
    flow.contractions.append(
        Contraction(
            node=node,
            kind=kind,
            input=source,
            weight=flow.parameter_name(weight),
            bias=flow.parameter_name(bias),
            input_dimension=(*inner[0], *inner[1]) if reads else (),
            weight_dimension=read if reads else (),
            weight_dim=dims[0],
            output_dimension=made,
            taps=taps,
            groups=groups,
        )
    )
    return made


def map_matmul(flow: ChannelFlow, node: fx.Node) -> Flow:
    """A product of two tensors; with a matrix of the network on the right it is a linear map."""
    left, right = node.args[0], node.args[1]
    a, b = flow.of(left), flow.of(right)
    if len(b) == 2 and flow.parameter_name(right) is not None:
        return (*a[:-1], contract(flow, node, "matmul", left, right, None, (0, 1), a[-1]))
    reason = f"is summed over in a product of two activations ({flow.where(node)})"
    if len(a) < 2 or len(b) < 2:
        for dimension in (*a, *b):
            flow.pin(dimension, reason)
        return flow.fixed(flow.sizes(node))
    flow.pin(a[-1], reason)
    flow.pin(b[-2], reason)
    batch = flow.broadcast([a[:-2], b[:-2]], node)
    result = (*batch, a[-2], b[-1])
    flow.touch_flow(node, result, Touch.Kind.OTHER, "matmul", False)
    return result


def map_addmm(flow: ChannelFlow, node: fx.Node) -> Flow:
    """bias + x W."""
    bias, left, right = node.args[:3]
    a = flow.of(left)
    if flow.parameter_name(right) is None or len(flow.of(bias)) != 1:
        flow.pin_flow(
            (*a, *flow.of(right), *flow.of(bias)),
            f"is summed over in a product of two activations ({flow.where(node)})",
        )
        return flow.fixed(flow.sizes(node))
    return (*a[:-1], contract(flow, node, "matmul", left, right, bias, (0, 1), a[-1]))


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
    name = flow.parameter_name(node.args[0])
    if name is not None and is_tracked(table[1]):
        flow.contractions.append(
            Contraction(node, "embedding", node.args[1], name, None, (), (), 0, table[1], 1, 1)  # type: ignore[arg-type]
        )
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
    "linear": map_linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), map_convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), map_convolution),
    **dict.fromkeys(("matmul", "mm", "bmm"), map_matmul),
    "addmm": map_addmm,
    "baddbmm": map_baddbmm,
    "einsum": map_einsum,
    "scaled_dot_product_attention": map_attention,
    "embedding": map_embedding,
    "_weight_norm": map_weight_norm,
    "_weight_norm_interface": map_weight_norm,
}

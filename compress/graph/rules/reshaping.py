"""Operations that rearrange dimensions: the channels go where their values go."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from compress.graph.atoms import UNIFORM, Dimension, Factor, Flow, dimension_size, is_tracked
from compress.graph.flow import ChannelFlow
from compress.graph.ops import Rearrangement, argument, operation_name, rules
from compress.graph.trace import NetworkGraph


def regroup(flow: ChannelFlow, node: fx.Node, source: Flow, sizes: tuple[int, ...]) -> Flow:
    """A row-major view: the sequence of all factors is cut at other places, splitting factors where needed."""
    remaining: list[Factor] = [factor for dimension in source for factor in dimension if factor.size != 1]
    dimensions: list[Dimension] = []
    for position, size in enumerate(sizes):
        if size == 1:
            dimensions.append((Factor(1),))
            continue
        taken = flow.atoms.split_dimension(tuple(remaining), size)
        if taken is None:
            reason = f"is viewed in a way that mixes its positions ({flow.where(node)})"
            flow.pin(tuple(remaining), reason)
            return (*dimensions, *_repair(flow, tuple(remaining), sizes[position:]))
        head, tail = taken
        dimensions.append(head)
        remaining = list(tail)
    return tuple(dimensions)


def _repair(flow: ChannelFlow, remaining: Dimension, sizes: tuple[int, ...]) -> Flow:
    """After a view that fits no factorisation: fixed dimensions until both sides line up again."""
    total = dimension_size(remaining)
    for skip in range(1, len(sizes) + 1):
        block = math.prod(sizes[:skip])
        if total % block:
            continue
        halves = flow.atoms.split_dimension(remaining, block) if block <= total else None
        if halves is not None:
            rest: list[Dimension] = []
            tail = halves[1]
            for size in sizes[skip:]:
                taken = flow.atoms.split_dimension(tail, size)
                if taken is None:
                    return flow.fixed(sizes)
                rest.append(taken[0] or (Factor(1),))
                tail = taken[1]
            return (*flow.fixed(sizes[:skip]), *rest)
    return flow.fixed(sizes)


def map_view(flow: ChannelFlow, node: fx.Node) -> Flow:
    """view, reshape, flatten, unflatten."""
    source, sizes = flow.of(node.args[0]), flow.sizes(node)
    dimensions = regroup(flow, node, source, sizes)
    literal = operation_name(node) != "flatten"
    if literal:
        for dimension in dimensions:
            flow.touch_shape(node, dimension)
    return dimensions


def map_permute(flow: ChannelFlow, node: fx.Node) -> Flow:
    """permute."""
    x = flow.of(node.args[0])
    return tuple(x[dim] for dim in read_permutation(flow.graph, node).order or ())


def read_permutation(network: NetworkGraph, node: fx.Node) -> Rearrangement:
    """permute."""
    order = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    return Rearrangement(tuple(int(dim) for dim in order))  # type: ignore[arg-type]


def read_rearrangement(network: NetworkGraph, node: fx.Node) -> Rearrangement:
    """Any other."""
    return Rearrangement()


def map_transpose(flow: ChannelFlow, node: fx.Node) -> Flow:
    """transpose, swapaxes."""
    x = list(flow.of(node.args[0]))
    first, second = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    x[first], x[second] = x[second], x[first]
    return tuple(x)


def map_matrix_transpose(flow: ChannelFlow, node: fx.Node) -> Flow:
    """t, numpy_T."""
    return tuple(reversed(flow.of(node.args[0])))


def map_last_transpose(flow: ChannelFlow, node: fx.Node) -> Flow:
    """mT: the last two dimensions change places."""
    *outer, rows, columns = flow.of(node.args[0])
    return (*outer, columns, rows)


def map_movedim(flow: ChannelFlow, node: fx.Node) -> Flow:
    """movedim."""
    x = flow.of(node.args[0])
    source = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])  # type: ignore[arg-type]
    target = [node.args[2]] if isinstance(node.args[2], int) else list(node.args[2])  # type: ignore[arg-type]
    moved = {int(to) % len(x): int(of) % len(x) for of, to in zip(source, target, strict=True)}
    rest = iter(index for index in range(len(x)) if index not in moved.values())
    return tuple(x[moved[index]] if index in moved else x[next(rest)] for index in range(len(x)))


def map_squeeze(flow: ChannelFlow, node: fx.Node) -> Flow:
    """squeeze: dimensions of size 1 vanish."""
    x = flow.of(node.args[0])
    dims = argument(node, 1, "dim")
    if dims is None:
        chosen = list(range(len(x)))
    else:
        chosen = [int(dim) % len(x) for dim in ([dims] if isinstance(dims, int) else dims)]
    return tuple(d for index, d in enumerate(x) if index not in chosen or dimension_size(d) != 1)


def map_unsqueeze(flow: ChannelFlow, node: fx.Node) -> Flow:
    """unsqueeze: a new dimension of size 1."""
    x = list(flow.of(node.args[0]))
    x.insert(int(node.args[1]) % (len(x) + 1), (Factor(1),))  # type: ignore[arg-type]
    return tuple(x)


def map_expand(flow: ChannelFlow, node: fx.Node) -> Flow:
    """expand: repeated values along a dimension may be cut anywhere."""
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    offset = len(sizes) - len(x)
    dimensions: list[Dimension] = []
    for index, size in enumerate(sizes):
        known = x[index - offset] if index >= offset else (Factor(1),)
        if dimension_size(known) == size:
            dimensions.append(known)
            flow.touch_shape(node, known)
        else:
            dimensions.append((Factor(size, UNIFORM),))
    return tuple(dimensions)


def map_repeat(flow: ChannelFlow, node: fx.Node) -> Flow:
    """repeat, tile: copies one after the other, (copies, positions)."""
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    offset = len(sizes) - len(x)
    dimensions: list[Dimension] = []
    for index, size in enumerate(sizes):
        known = x[index - offset] if index >= offset else (Factor(1),)
        old = dimension_size(known)
        dimensions.append(known if old == size else (Factor(size // old, UNIFORM), *known))
    return tuple(dimensions)


def map_repeat_interleave(flow: ChannelFlow, node: fx.Node) -> Flow:
    """repeat_interleave by a number: (positions, copies)."""
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    if len(x) != len(sizes) or not isinstance(node.args[1], int):
        flow.pin_flow(x, f"is repeated by {flow.where(node)}")
        return flow.fixed(sizes)
    return tuple(
        known if dimension_size(known) == size else (*known, Factor(size // dimension_size(known), UNIFORM))
        for known, size in zip(x, sizes, strict=True)
    )


def map_concatenation(flow: ChannelFlow, node: fx.Node) -> Flow:
    """cat: channels one after the other; all other dimensions lose the same positions."""
    parts = [flow.of(value) for value in node.args[0]]  # type: ignore[union-attr]
    parts = [part for part in parts if part and not (len(part) == 1 and dimension_size(part[0]) == 0)]
    dim = int(argument(node, 1, "dim", 0)) % len(parts[0])
    dimensions: list[Dimension] = []
    for index in range(len(parts[0])):
        if index == dim:
            dimensions.append(flow.atoms.concatenate([part[index] for part in parts]))
            continue
        joined = parts[0][index]
        for part in parts[1:]:
            joined = flow.join(joined, part[index], node)
        dimensions.append(joined)
    return tuple(dimensions)


def map_stack(flow: ChannelFlow, node: fx.Node) -> Flow:
    """stack: a new dimension, all others lose the same positions."""
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    joined = list(flow.broadcast([flow.of(part) for part in parts], node))
    joined.insert(int(argument(node, 1, "dim", 0)) % (len(joined) + 1), (Factor(len(parts)),))
    return tuple(joined)


def map_pixel_shuffle(flow: ChannelFlow, node: fx.Node) -> Flow:
    """(C·r², H, W) -> (C, H·r, W·r)."""
    x, scale = flow.of(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    outer = flow.atoms.split_dimension(x[-3], dimension_size(x[-3]) // scale**2)
    if outer is None:
        flow.pin(x[-3], f"is rearranged by {flow.where(node)}")
    elif is_tracked(outer[1]):
        flow.pin(outer[1], f"becomes a spatial position in {flow.where(node)}")
    channels = flow.fixed([dimension_size(x[-3]) // scale**2])[0] if outer is None else outer[0]
    return (*x[:-3], channels, *flow.fixed(flow.sizes(node)[-2:]))


def map_pixel_unshuffle(flow: ChannelFlow, node: fx.Node) -> Flow:
    """(C, H·r, W·r) -> (C·r², H, W)."""
    x, scale = flow.of(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    for dimension in x[-2:]:
        flow.pin(dimension, f"is a spatial dimension of {flow.where(node)}")
    return (*x[:-3], (*x[-3], Factor(scale**2)), *flow.fixed(flow.sizes(node)[-2:]))


def map_windows(flow: ChannelFlow, node: fx.Node) -> Flow:
    """im2col: (B, C, H, W) -> (B, C·taps, places)."""
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    for dimension in x[-2:]:
        flow.pin(dimension, f"is a spatial dimension of {flow.where(node)}")
    channels = (*x[-3], Factor(sizes[-2] // dimension_size(x[-3])))
    return (*x[:-3], channels, *flow.fixed(sizes[-1:]))


def map_folding(flow: ChannelFlow, node: fx.Node) -> Flow:
    """col2im: (B, C·taps, places) -> (B, C, H, W), what windows share added up."""
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    halves = flow.atoms.split_dimension(x[-2], sizes[-3])
    flow.pin(x[-1], f"is a spatial dimension of {flow.where(node)}")
    flow.pin(x[-2] if halves is None else halves[1], f"becomes a spatial position in {flow.where(node)}")
    channels = flow.fixed(sizes[-3:-2])[0] if halves is None else halves[0]
    return (*x[:-2], channels, *flow.fixed(sizes[-2:]))


RULES = {
    **rules("view", "reshape", "_unsafe_view", "flatten", channels=map_view, meaning=read_rearrangement),
    **rules("unflatten", "view_as", "reshape_as", channels=map_view, meaning=read_rearrangement),
    **rules("permute", channels=map_permute, meaning=read_permutation),
    **rules("transpose", "swapaxes", "swapdims", channels=map_transpose, meaning=read_rearrangement),
    **rules("t", "numpy_T", channels=map_matrix_transpose, meaning=read_rearrangement),
    **rules("mT", channels=map_last_transpose, meaning=read_rearrangement),
    **rules("movedim", "moveaxis", channels=map_movedim, meaning=read_rearrangement),
    **rules("squeeze", channels=map_squeeze, meaning=read_rearrangement),
    **rules("unsqueeze", channels=map_unsqueeze, meaning=read_rearrangement),
    **rules("expand", "expand_as", "broadcast_to", channels=map_expand, meaning=read_rearrangement),
    **rules("repeat", "tile", channels=map_repeat),
    **rules("repeat_interleave", channels=map_repeat_interleave),
    **rules("cat", "concat", "concatenate", channels=map_concatenation),
    **rules("stack", channels=map_stack),
    **rules("pixel_shuffle", channels=map_pixel_shuffle, meaning=read_rearrangement),
    **rules("pixel_unshuffle", channels=map_pixel_unshuffle, meaning=read_rearrangement),
    **rules("im2col", channels=map_windows),
    **rules("col2im", channels=map_folding),
}

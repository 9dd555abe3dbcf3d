"""Operations that take parts of a tensor: equal parts of the channels stay tied to each other, others cannot be cut."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import fx

from compress.graph.atoms import Dimension, Factor, Flow, dimension_size, is_tracked
from compress.graph.flow import ChannelFlow, Touch, concrete
from compress.graph.ops import Rearrangement, argument, operation_name, rules
from compress.graph.trace import NetworkGraph


def _take_part(flow: ChannelFlow, node: fx.Node, dimension: Dimension, start: int, size: int) -> Dimension:
    """Positions [start, start + size): the i-th position of every equal part goes together, or nothing can go."""
    total = dimension_size(dimension)
    if total == size:
        return dimension
    if not is_tracked(dimension):
        return (Factor(size, flow.atoms.flatten(dimension).label),)
    if size > 1 and total % size == 0 and start % size == 0:
        halves = flow.atoms.split_dimension(dimension, total // size)
        if halves is not None:
            reason = f"is taken in equal parts by {flow.where(node)}: no cut of these tied channels leaves equal parts"
            flow.pin(halves[0], reason)
            flow.touch_shape(node, halves[1])
            flow.touch_shape(node, dimension)
            return halves[1]
    flow.pin(dimension, f"is indexed at fixed positions by {flow.where(node)}")
    return (Factor(size),)


def _parts(flow: ChannelFlow, node: fx.Node, dim: int, sizes: list[int]) -> tuple[Flow, ...]:
    x = flow.of(node.args[0])
    start, parts = 0, []
    for size in sizes:
        parts.append((*x[:dim], _take_part(flow, node, x[dim], start, size), *x[dim + 1 :]))
        start += size
    return tuple(parts)


def map_split(flow: ChannelFlow, node: fx.Node) -> tuple[Flow, ...]:
    """chunk, split, split_with_sizes, tensor_split."""
    x = flow.of(node.args[0])
    dim = int(argument(node, 2, "dim", 0)) % len(x)
    sizes = [concrete(part.shape[dim]) for part in node.meta["val"]]
    if operation_name(node) != "split_with_sizes" or len(set(sizes)) == 1 or not is_tracked(x[dim]):
        return _parts(flow, node, dim, sizes)
    parts: list[Flow] = []
    for start, size in zip(accumulate([0, *sizes]), sizes, strict=False):
        part = (flow.atoms.cut(x[dim], slice(start, start + size)),)
        flow.touch_shape(node, part)
        parts.append((*x[:dim], part, *x[dim + 1 :]))
    return tuple(parts)


def map_glu(flow: ChannelFlow, node: fx.Node) -> Flow:
    """glu: the first half of a dimension times the sigmoid of the second."""
    x = flow.of(node.args[0])
    dim = int(argument(node, 1, "dim", -1)) % len(x)
    half = dimension_size(x[dim]) // 2
    value, gate = _parts(flow, node, dim, [half, half])
    result = (*x[:dim], flow.join(value[dim], gate[dim], node), *x[dim + 1 :])
    flow.touch_flow(node, result, Touch.Kind.ACTIVATION, "glu", False)
    return result


def map_slice(flow: ChannelFlow, node: fx.Node) -> Flow:
    """slice of one dimension."""
    x = flow.of(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(x)
    total, size = dimension_size(x[dim]), flow.sizes(node)[dim]
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    if total == size:
        return x
    if not isinstance(start, int) or step != 1:
        flow.pin(x[dim], f"is indexed at fixed positions by {flow.where(node)}")
        return (*x[:dim], (Factor(size),), *x[dim + 1 :])
    part = _take_part(flow, node, x[dim], start % total if start < 0 else start, size)
    return (*x[:dim], part, *x[dim + 1 :])


def map_narrow(flow: ChannelFlow, node: fx.Node) -> Flow:
    """narrow(x, dim, start, length)."""
    x = flow.of(node.args[0])
    dim, start = int(node.args[1]) % len(x), node.args[2]  # type: ignore[arg-type]
    size = flow.sizes(node)[dim]
    if not isinstance(start, int):
        flow.pin(x[dim], f"is indexed at fixed positions by {flow.where(node)}")
        return (*x[:dim], (Factor(size),), *x[dim + 1 :])
    return (*x[:dim], _take_part(flow, node, x[dim], start, size), *x[dim + 1 :])


def map_select(flow: ChannelFlow, node: fx.Node) -> Flow:
    """One position of a dimension."""
    x = flow.of(node.args[0])
    dim = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    flow.pin(x[dim], f"is indexed at fixed positions by {flow.where(node)}")
    return (*x[:dim], *x[dim + 1 :])


def map_unbind(flow: ChannelFlow, node: fx.Node) -> tuple[Flow, ...]:
    """Every position of a dimension as a tensor of its own."""
    x = flow.of(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(x)
    flow.pin(x[dim], f"is taken apart by {flow.where(node)}")
    return tuple((*x[:dim], *x[dim + 1 :]) for _ in range(dimension_size(x[dim])))


def map_getitem(flow: ChannelFlow, node: fx.Node) -> Any:
    """One of several outputs of an operation."""
    whole = flow.values.get(node.args[0])  # type: ignore[arg-type]
    if isinstance(whole, tuple) and whole and isinstance(node.args[1], int):
        return whole[node.args[1]]
    return flow.fixed(flow.sizes(node))


def read_part(network: NetworkGraph, node: fx.Node) -> Rearrangement:
    """Some of the first argument's values."""
    return Rearrangement()


def map_index(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Advanced indexing: indexed dimensions cannot be cut, the others pass."""
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    used = [position for position, index in enumerate(indices) if index is not None]
    masks = any(
        isinstance(index, fx.Node) and "bool" in str(getattr(index.meta.get("val"), "dtype", "")) for index in indices
    )
    if masks:
        flow.pin_flow(x, f"is chosen by a mask ({flow.where(node)})")
        return flow.fixed(sizes)
    for position in used:
        flow.pin(x[position], f"is chosen by an index ({flow.where(node)})")
    together = used == list(range(used[0], used[-1] + 1))
    new = len(sizes) - (len(x) - len(used))
    rest = [dimension for position, dimension in enumerate(x) if position not in used]
    at = used[0] if together else 0
    return (*rest[:at], *flow.fixed(sizes[at : at + new]), *rest[at:])


def map_index_select(flow: ChannelFlow, node: fx.Node) -> Flow:
    """index_select: the indexed dimension cannot be cut."""
    x = flow.of(node.args[0])
    dim = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    flow.pin(x[dim], f"is chosen by an index ({flow.where(node)})")
    return (*x[:dim], (Factor(flow.sizes(node)[dim]),), *x[dim + 1 :])


def map_gather(flow: ChannelFlow, node: fx.Node) -> Flow:
    """gather, scatter and scatter_add: positions of one dimension chosen by numbers, which cannot be cut; others pass.

    The numbers have the extents of the values: where they were spread along a dimension, its positions may go.
    """
    x, index, source = flow.of(node.args[0]), flow.of(node.args[2]), flow.of(argument(node, 3, "src"))
    dim = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    dimensions = list(x)
    for other in (index, source):
        for at, dimension in enumerate(other):
            if at == dim or dimension_size(dimension) != dimension_size(dimensions[at]):
                flow.pin(dimension, f"is chosen by an index ({flow.where(node)})")
                flow.pin(x[at], f"is chosen by an index ({flow.where(node)})")
            else:
                dimensions[at] = flow.join(dimensions[at], dimension, node)
    flow.pin(x[dim], f"is chosen by an index ({flow.where(node)})")
    sizes = flow.sizes(node)
    return tuple(
        dimension if at != dim and dimension_size(dimension) == sizes[at] else (Factor(sizes[at]),)
        for at, dimension in enumerate(dimensions)
    )


def map_index_add(flow: ChannelFlow, node: fx.Node) -> Flow:
    """index_add and index_copy: rows written to numbered places of one dimension, which cannot be cut; others pass."""
    x, source = flow.of(node.args[0]), flow.of(argument(node, 3, "source"))
    dim = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    for flowing in (x, source):
        flow.pin(flowing[dim], f"is chosen by an index ({flow.where(node)})")
    rest = [dimension if at == dim else flow.join(dimension, source[at], node) for at, dimension in enumerate(x)]
    return tuple(rest)


def map_ordering(flow: ChannelFlow, node: fx.Node) -> object:
    """sort, topk and kthvalue along one dimension, whose positions cannot be cut; the others pass."""
    x = flow.of(node.args[0])
    at = 2 if operation_name(node) in ("topk", "kthvalue") else 1
    dim = int(argument(node, at, "dim", -1)) % len(x)
    flow.pin(x[dim], f"is ordered by {flow.where(node)}")
    flow.touch_flow(node, x, Touch.Kind.OTHER, operation_name(node), False)
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    results: list[Flow] = []
    for value in values:
        left = flow.fixed([concrete(value.shape[dim])]) if value.ndim == len(x) else ()
        results.append((*x[:dim], *left, *x[dim + 1 :]))
    return tuple(results) if isinstance(node.meta["val"], (tuple, list)) else results[0]


def map_roll(flow: ChannelFlow, node: fx.Node) -> Flow:
    """roll and flip move positions: the moved dimensions cannot be cut."""
    x = flow.of(node.args[0])
    dims = argument(node, 2, "dims", []) if "roll" in str(node.target) else argument(node, 1, "dims")
    moved = [dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims)] or list(range(len(x)))
    for dim in moved:
        flow.pin(x[dim], f"is moved by {flow.where(node)}")
    return x


RULES = {
    **rules("getitem", channels=map_getitem, meaning=read_part),
    **rules("chunk", "split", "split_with_sizes", "tensor_split", channels=map_split),
    **rules("glu", channels=map_glu),
    **rules("slice", channels=map_slice),
    **rules("narrow", channels=map_narrow),
    **rules("select", channels=map_select, meaning=read_part),
    **rules("unbind", channels=map_unbind),
    **rules("index", channels=map_index),
    **rules("index_select", channels=map_index_select),
    **rules("gather", "scatter_add", "scatter", channels=map_gather),
    **rules("index_add", "index_copy", channels=map_index_add),
    **rules("sort", "topk", "argsort", "kthvalue", channels=map_ordering),
    **rules("roll", "flip", channels=map_roll),
}

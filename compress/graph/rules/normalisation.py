"""Normalisations and reductions: per-channel ones keep channels apart, others compute statistics over channels."""

from __future__ import annotations

from torch import fx

from compress.graph.atoms import Dimension, Factor, Flow, dimension_size, is_tracked
from compress.graph.flow import ChannelFlow, Statistic, Touch
from compress.graph.ops import BatchNorm, Normalisation, argument, arguments_of, operation_name, rules, state_name
from compress.graph.rules.elementwise import map_binary
from compress.graph.rules.spatial import read_pooling
from compress.graph.trace import NetworkGraph


def record_statistic(flow: ChannelFlow, node: fx.Node, dims: list[int]) -> None:
    """Note that the node's result depends on all positions of the given dimensions of its first argument."""
    norm = flow.meaning(node)
    source = flow.of(node.args[0])
    tracked = tuple((dim, source[dim]) for dim in dims if is_tracked(source[dim]))
    if tracked:
        flow.statistics.append(Statistic(node, tracked, norm if isinstance(norm, Normalisation) else None))
        for _, dimension in tracked:
            flow.touch(node, dimension, Touch.Kind.OTHER, operation_name(node), False)


def _join_affine(flow: ChannelFlow, node: fx.Node, dimension: Dimension, values: list[object]) -> Dimension:
    for value in values:
        affine = flow.of(value)
        if affine:
            dimension = flow.join(dimension, affine[0], node)
    return dimension


def _pin_averaged(flow: ChannelFlow, node: fx.Node, dimensions: Flow) -> None:
    flow.pin_flow(dimensions, f"is averaged over by {flow.where(node)}")


def map_batch_norm(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Scale, shift and running statistics belong to the channels of dimension 1."""
    x = flow.of(node.args[0])
    if not isinstance(flow.meaning(node), BatchNorm):
        _pin_averaged(flow, node, (x[0], *x[2:]))
        flow.touch(node, x[1], Touch.Kind.OTHER, "batch_norm in training mode", False)
    channels = _join_affine(flow, node, x[1], list(node.args[1:5]))
    return (x[0], channels, *x[2:])


def read_batch_norm(network: NetworkGraph, node: fx.Node) -> BatchNorm | None:
    """By running statistics; None for one that takes those of the batch."""
    given = arguments_of(node)
    source = given.get("input")
    if given.get("training") or not isinstance(source, fx.Node):
        return None
    scale, shift, mean, variance = (
        state_name(network, given.get(name)) for name in ("weight", "bias", "running_mean", "running_var")
    )
    return BatchNorm(node.name, source.name, scale, shift, mean, variance, float(given["eps"]))


def map_layer_norm(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Statistics over the last dimensions (layer_norm and rms_norm)."""
    x = flow.of(node.args[0])
    count = len(node.args[1])  # type: ignore[arg-type]
    record_statistic(flow, node, list(range(len(x) - count, len(x))))
    dimensions = list(x)
    for value in (argument(node, 2, "weight"), argument(node, 3, "bias")):
        affine = flow.of(value)
        for offset, dimension in enumerate(affine):
            at = len(x) - len(affine) + offset
            if dimension_size(dimension) > 1:
                dimensions[at] = flow.join(dimensions[at], dimension, node)
    for dimension in dimensions[len(x) - count :]:
        flow.touch(node, dimension, Touch.Kind.SHAPE, operation_name(node))
    return tuple(dimensions)


def map_group_norm(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Channels = (groups, channels per group): whole groups go exactly, channels within change the statistics."""
    x = flow.of(node.args[0])
    groups = int(node.args[1])  # type: ignore[arg-type]
    channels = x[1]
    _pin_averaged(flow, node, x[2:])
    halves = flow.atoms.split_dimension(channels, groups)
    if halves is None:
        flow.pin(channels, f"does not divide into the groups of {flow.where(node)}")
        return x
    if groups > 1:
        flow.touch(node, halves[0], Touch.Kind.GROUPS, "groups", count=groups)
    if is_tracked(halves[1]):
        flow.statistics.append(Statistic(node, ((1, (Factor(groups), *halves[1])),), read_group_norm(flow.graph, node)))
        flow.touch(node, halves[1], Touch.Kind.OTHER, "group_norm", False)
    flow.touch(node, channels, Touch.Kind.SHAPE, "group_norm")
    channels = _join_affine(
        flow, node, (*halves[0], *halves[1]), [argument(node, 2, "weight"), argument(node, 3, "bias")]
    )
    return (x[0], channels, *x[2:])


def read_layer_norm(network: NetworkGraph, node: fx.Node) -> Normalisation:
    """Statistics over the last dimensions, whose sizes it repeats."""
    return Normalisation(sizes=True)


def read_group_norm(network: NetworkGraph, node: fx.Node) -> Normalisation:
    """Statistics over the channels of a group."""
    return Normalisation(sizes=False)


def map_instance_norm(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Every channel of dimension 1 is normalised alone."""
    x = flow.of(node.args[0])
    _pin_averaged(flow, node, x[2:])
    channels = _join_affine(flow, node, x[1], list(node.args[1:5]))
    flow.touch(node, channels, Touch.Kind.OTHER, "instance_norm", False)
    flow.touch(node, channels, Touch.Kind.SHAPE, "instance_norm")  # without a scale only a number says how many
    return (x[0], channels, *x[2:])


def _reduced_dims(node: fx.Node, rank: int) -> tuple[list[int], bool]:
    dims = argument(node, 1, "dim")
    keep = argument(node, 2, "keepdim", False)
    if operation_name(node) in ("var", "std", "var_mean", "std_mean"):
        keep = node.kwargs.get("keepdim", argument(node, 3, "keepdim", False))
        if isinstance(dims, bool):
            dims = None
    if operation_name(node) == "linalg_vector_norm":
        dims, keep = argument(node, 2, "dim"), argument(node, 3, "keepdim", False)
    if operation_name(node) == "norm":
        dims, keep = argument(node, 2, "dim"), argument(node, 3, "keepdim", False)
    if dims is None or dims == []:
        return list(range(rank)), bool(keep)
    chosen = [dims] if isinstance(dims, int) else list(dims)
    return [dim % rank for dim in chosen], bool(keep)


def _reduce(flow: ChannelFlow, x: Flow, dims: list[int], keep: bool) -> Flow:
    if keep:
        return tuple((Factor(1),) if index in dims else dimension for index, dimension in enumerate(x))
    return tuple(dimension for index, dimension in enumerate(x) if index not in dims)


def map_mean(flow: ChannelFlow, node: fx.Node) -> object:
    """Means, variances and norms: over channels they become statistics of the kept channels."""
    x = flow.of(node.args[0])
    dims, keep = _reduced_dims(node, len(x))
    record_statistic(flow, node, dims)
    result = _reduce(flow, x, dims, keep)
    if operation_name(node) not in ("mean",):
        flow.touch_flow(node, result, Touch.Kind.OTHER, operation_name(node), False)
    return (result, result) if operation_name(node) in ("var_mean", "std_mean") else result


def map_reduction(flow: ChannelFlow, node: fx.Node) -> object:
    """Sums, extrema and orderings: units must not be among what is reduced."""
    if isinstance(argument(node, 1, "other"), fx.Node):  # the greater or smaller of two values
        return map_binary(flow, node)
    x = flow.of(node.args[0])
    dims, keep = _reduced_dims(node, len(x))
    for dim in dims:
        flow.pin(x[dim], f"is reduced over by {flow.where(node)}")
    result = _reduce(flow, x, dims, keep)
    if operation_name(node) not in ("sum", "amax", "amin", "max", "min"):
        flow.touch_flow(node, result, Touch.Kind.OTHER, operation_name(node), False)
    value = node.meta.get("val")
    return tuple(result for _ in value) if isinstance(value, (tuple, list)) else result


def map_softmax(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Normalised over one dimension, whose positions compete and cannot be cut; the others pass."""
    x = flow.of(node.args[0])
    dim = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    flow.pin(x[dim], f"competes in {flow.where(node)}")
    flow.touch_flow(node, x, Touch.Kind.OTHER, operation_name(node), False)
    return x


RULES = {
    **rules("batch_norm", channels=map_batch_norm, meaning=read_batch_norm),
    **rules("layer_norm", "rms_norm", channels=map_layer_norm, meaning=read_layer_norm),
    **rules("group_norm", channels=map_group_norm, meaning=read_group_norm),
    **rules("instance_norm", channels=map_instance_norm),
    **rules("mean", channels=map_mean, meaning=read_pooling),
    **rules("var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", channels=map_mean),
    **rules("amax", channels=map_reduction, meaning=read_pooling),
    **rules("sum", "amin", "max", "min", "argmax", "argmin", channels=map_reduction),
    **rules("prod", "any", "all", "logsumexp", channels=map_reduction),
    **rules("softmax", "_softmax", "log_softmax", "cumsum", channels=map_softmax),
}

"""Operations on the spatial dimensions: channels pass, spatial sizes change."""

from __future__ import annotations

from torch import fx

from compress.graph.atoms import Factor, Flow, is_tracked
from compress.graph.flow import ChannelFlow, Touch
from compress.graph.ops import Pooling, argument, operation_name, rules
from compress.graph.trace import NetworkGraph


def map_spatial(flow: ChannelFlow, node: fx.Node) -> object:
    """Pooling and resizing of the last dimensions."""
    name = operation_name(node)
    rank = next((int(digit) for digit in reversed(name) if digit in "123"), 2)
    source, value = flow.of(node.args[0]), node.meta["val"]
    for dimension in source[len(source) - rank :]:
        flow.pin(dimension, f"is a spatial dimension of {flow.where(node)}")
    sizes = flow.sizes(node) or tuple(value[0].shape)
    result = (*source[: len(source) - rank], *flow.fixed(int(size) for size in sizes[len(source) - rank :]))
    if "bicubic" in name:
        flow.touch_flow(node, result, Touch.Kind.OTHER, name, True)
    return tuple(result for _ in value) if isinstance(value, (tuple, list)) else result


def map_unpool(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Values put back to the places that a pooling took them from: these have the channels of the values."""
    name = operation_name(node)
    rank = next(int(digit) for digit in reversed(name) if digit in "23")
    source, places = flow.of(node.args[0]), flow.of(node.args[1])
    for part in (source, places):
        for dimension in part[len(part) - rank :]:
            flow.pin(dimension, f"is a spatial dimension of {flow.where(node)}")
    rest = [flow.join(*pair, node) for pair in zip(source[:-rank], places[:-rank], strict=True)]
    return (*rest, *flow.fixed(flow.sizes(node)[-rank:]))


def map_pad(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Padding with a constant puts units of its own around the channels; any other padding pins them.

    The widths of the padding stand in forward(): removing its units needs an attribute that says them, removing the
    channels between them (whose positions behind the padding go with them) needs widths that do not depend on them.
    """
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    padding = list(node.args[1])  # type: ignore[arg-type]
    mode = argument(node, 2, "mode", "constant") if operation_name(node) == "pad" else operation_name(node)
    dimensions = list(x)
    for pair in range(len(padding) // 2):
        dim = len(x) - 1 - pair
        before, after = padding[2 * pair], padding[2 * pair + 1]
        if before == 0 and after == 0:
            continue
        numbers = isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0
        if not numbers or "constant" not in str(mode) or not is_tracked(x[dim]):
            flow.pin(x[dim], f"is padded by {flow.where(node)}")
            dimensions[dim] = flow.fixed([sizes[dim]])[0]
            continue
        sides = [(Factor(width, flow.atoms.fresh(width)),) if width else () for width in (before, after)]
        parts = (x[dim], Touch.Padding.INSIDE), (sides[0], Touch.Padding.BEFORE), (sides[1], Touch.Padding.AFTER)
        for part, place in parts:
            flow.touch(node, part, Touch.Kind.SHAPE, "pad", padding=place)
        dimensions[dim] = flow.atoms.concatenate([part for part in (sides[0], x[dim], sides[1]) if part])
    if any(isinstance(value, (int, float)) and value for value in node.args[2:]):
        flow.touch_flow(node, tuple(dimensions), Touch.Kind.OTHER, "pad", False)
    return tuple(dimensions)


def read_pooling(network: NetworkGraph, node: fx.Node) -> Pooling:
    """Pools."""
    return Pooling()


RULES = {
    **rules(
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("max_pool2d_with_indices", "max_pool3d_with_indices"),
        channels=map_spatial,
        meaning=read_pooling,
    ),
    **rules(
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "lp_pool2d"),
        *("upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_nearest_exact2d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        channels=map_spatial,
    ),
    **rules("max_unpool2d", "max_unpool3d", channels=map_unpool),
    **rules("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", channels=map_pad),
}

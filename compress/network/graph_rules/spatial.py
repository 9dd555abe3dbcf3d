"""Operations on the spatial dimensions: channels pass, spatial sizes change."""

from __future__ import annotations

from torch import fx

from compress.network.channels import Flow
from compress.network.flow import ChannelFlow, operation_name


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
        flow.touch_flow(node, result, "other", name, True)
    return tuple(result for _ in value) if isinstance(value, (tuple, list)) else result


def map_pad(flow: ChannelFlow, node: fx.Node) -> Flow:
    """Padding: a dimension that grows cannot be cut."""
    x, sizes = flow.of(node.args[0]), flow.sizes(node)
    padding = list(node.args[1])  # type: ignore[arg-type]
    result = list(x)
    for pair in range(len(padding) // 2):
        dim = len(x) - 1 - pair
        if padding[2 * pair] != 0 or padding[2 * pair + 1] != 0:
            flow.pin(x[dim], f"is padded by {flow.where(node)}")
            result[dim] = flow.fixed([sizes[dim]])[0]
    if any(isinstance(value, (int, float)) and value for value in node.args[2:]):
        flow.touch_flow(node, tuple(result), "other", "pad", False)
    return tuple(result)


RULES = {
    **dict.fromkeys(
        (
            *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool2d"),
            *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"),
            *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
            *("max_pool2d_with_indices", "max_pool3d_with_indices"),
            *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"),
            *("upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_nearest_exact2d"),
        ),
        map_spatial,
    ),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), map_pad),
}

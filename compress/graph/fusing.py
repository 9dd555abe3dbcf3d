"""Steps that are computed at once where nobody wants the values between them: the same digits in less time.

A ReLU behind a convolution, a batch norm or a sum is taken in place, one pass less over the memory. Convolutions of
images run faster on channels that lie together (`torch.channels_last`). The last digits of a step depend on how its
arguments lie in memory, and a run that goes on from kept values must end in the same bytes as one that was never ended:
every image is therefore laid out in one way, wherever it comes from. Batch norms are not folded into convolutions: the
last digits would be others wherever the value between is asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.graph.steps import Read, Step, Value

aten: Any = torch.ops.aten
CONVOLUTION = aten.conv2d.default
BATCH_NORM = aten.batch_norm.default
STARTS = (CONVOLUTION, aten.conv1d.default, aten.conv3d.default, BATCH_NORM, aten.add.Tensor)  # their results are new
IN_PLACE: dict[Any, Callable[..., Tensor]] = {
    aten.relu.default: aten.relu_.default,
    aten.relu6.default: aten.relu6_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.silu.default: aten.silu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
}
BLIND = {
    *STARTS,
    *IN_PLACE,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.cat.default,
    aten.slice.Tensor,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.group_norm.default,
    aten.conv_transpose2d.input,
    aten.pixel_shuffle.default,
    aten.prelu.default,
    aten.elu.default,
    aten.mish.default,
    aten.softplus.default,
    aten.clamp.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.sym_size.int,
    operator.getitem,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.dropout.default,
    aten.linear.default,
}  # operations that mean the same however their arguments lie in memory, and that take any layout
STRICT: dict[Any, Any] = {aten.view.default: aten.reshape.default}  # asks for a layout -> the same for any


@dataclass(frozen=True, eq=False)
class Joint:
    """Steps in a row, each the only reader of the one before it."""

    steps: tuple[Step, ...]

    def usable(self, needed: Collection[str], wanted: Collection[str], known: Collection[str]) -> tuple[Step, ...]:
        """The first of the steps, up to one whose value is wanted; none where there are fewer than two."""
        count = 0
        for step in self.steps:
            if step.name not in needed or step.name in known:
                break
            count += 1
            if step.name in wanted:
                break
        return self.steps[:count] if count > 1 else ()


def find_joints(
    steps: Sequence[Step], readers: Mapping[str, Sequence[Step]], outputs: Collection[str]
) -> tuple[Joint, ...]:
    """Every convolution, batch norm or sum with the ReLU behind it that alone reads it."""
    joints: list[Joint] = []
    inside: set[str] = set()
    for step in steps:
        if step.target not in STARTS or step.name in inside:
            continue
        row = [step]
        while len(following := readers.get(row[-1].name, ())) == 1 and row[-1].name not in outputs:
            follower = following[0]
            given = (follower.args[0], follower.inputs.count(row[-1].name))
            if follower.target not in IN_PLACE or given != (Read(row[-1].name), 1):
                break
            row.append(follower)
        if len(row) > 1:
            inside.update(each.name for each in row)
            joints.append(Joint(tuple(row)))
    return tuple(joints)


def compute_jointly(steps: Sequence[Step], resolve: Callable[[Any], Any]) -> Value:
    """The value of the last of a joint's steps.

    Args:
        resolve: what a step's arguments stand for.
    """
    first, *others = steps
    value = first.target(*resolve(first.args), **resolve(first.kwargs))
    for step in others:
        target: Any = IN_PLACE.get(step.target, step.target)
        value = target(value, *resolve(step.args[1:]), **resolve(step.kwargs))
    return value


def takes_any_layout(steps: Sequence[Step]) -> bool:
    """Whether images may lie in memory as convolutions have them fastest, whatever the network does with them."""
    return all(step.target in BLIND for step in steps) and any(step.target == CONVOLUTION for step in steps)


def channels_together(value: Value) -> Value:
    """Images (B, C, H, W) with their channels side by side in memory, in the same strides whatever these were.

    Any other value as it is. Strides of dimensions with one place say nothing, but operations choose their way by them.
    """
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    _, channels, height, width = value.shape
    strides = (channels * height * width, 1, width * channels, channels)
    if value.stride() == strides:
        return value
    return value.contiguous(memory_format=torch.channels_last).as_strided(value.shape, strides)

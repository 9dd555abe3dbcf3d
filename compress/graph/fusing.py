"""Steps that are computed at once where nobody wants the values between them, and a faster layout of images.

A batch norm behind a convolution is folded into its weights, and a ReLU behind either is taken in place: as exact as
the network itself, but not the same last digits, and each value that is left out is one pass less over the memory.
Convolutions of images run faster on channels that lie together (`torch.channels_last`).
"""

from __future__ import annotations

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
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.dropout.default,
    aten.linear.default,
}  # operations whose results do not depend on how their arguments lie in memory, and that take any layout


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
    """Every convolution, batch norm or sum with the batch norm and the ReLU behind it that alone read it."""
    joints: list[Joint] = []
    inside: set[str] = set()
    for step in steps:
        if step.target not in STARTS or step.name in inside:
            continue
        row = [step]
        while len(following := readers.get(row[-1].name, ())) == 1 and row[-1].name not in outputs:
            follower = following[0]
            joins = follower.target in IN_PLACE or (_folds(follower) and len(row) == 1 and _is_convolution(step))
            if not joins or follower.args[0] != Read(row[-1].name) or follower.inputs.count(row[-1].name) != 1:
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
    args, kwargs = list(resolve(first.args)), resolve(first.kwargs)
    exact = args[1].dtype in (torch.float32, torch.float64) if _is_convolution(first) else False
    if exact and others and _folds(others[0]):
        weight, bias = args[1], args[2] if len(args) > 2 else kwargs.pop("bias", None)
        scale, shift, mean, variance = resolve(others[0].args[1:5])
        args[1:3] = fold(weight, bias, scale, shift, mean, variance, eps=others[0].args[7])
        others = others[1:]
    value = first.target(*args, **kwargs)
    for step in others:
        target: Any = IN_PLACE.get(step.target, step.target)
        value = target(value, *resolve(step.args[1:]), **resolve(step.kwargs))
    return value


def fold(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight (D, …) and bias (D,) of a convolution that does what a batch norm by running statistics does behind it."""
    factor = (variance.double() + eps).rsqrt()
    if scale is not None:
        factor = factor * scale.double()
    constant = -mean.double() if bias is None else bias.double() - mean.double()
    constant = constant * factor
    if shift is not None:
        constant = constant + shift.double()
    return weight * factor.to(weight).reshape(-1, *(1,) * (weight.ndim - 1)), constant.to(weight)


def takes_any_layout(steps: Sequence[Step]) -> bool:
    """Whether images may lie in memory as convolutions have them fastest, whatever the network does with them."""
    return all(step.target in BLIND for step in steps) and any(step.target == CONVOLUTION for step in steps)


def channels_together(value: Tensor) -> Tensor:
    """Images (B, C, H, W) with their channels side by side in memory; any other value as it is."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def _is_convolution(step: Step) -> bool:
    return step.target in STARTS[:3]


def _folds(step: Step) -> bool:
    """Whether the step is a batch norm by running statistics."""
    if step.target != BATCH_NORM or len(step.args) < 8:
        return False
    statistics = step.args[3:5]
    return all(isinstance(each, Read) for each in statistics) and step.args[5] is False

"""Steps that are computed at once where nobody wants the values between them: the same digits in less time.

A ReLU behind a convolution, a batch norm or a sum is taken in place, one pass less over the memory. Two faster ways
were tried and taken back, as a run that goes on from a state must end in the same bytes as one that was never ended:
a batch norm folded into its convolution has other last digits wherever the value between is asked for, and images whose
channels lie together (`torch.channels_last`) wherever a pass starts from kept values.
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

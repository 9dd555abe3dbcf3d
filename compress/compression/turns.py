"""In which order a network is compressed: each group of units in its turn, each consumer again where its input moved.

A consumer right behind its group is refitted with it. One that reads units further back (of a residual stream), that
reads units of several groups (a concatenation), or whose units all stay, sees its input change when the layers in front
are compressed; it is refitted, on all input channels that are left, when the sweep arrives there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.graph.program import Program
from compress.units.groups import Consumer, UnitGroup


@dataclass(frozen=True, eq=False)
class Turn:
    """One step of a sweep.

    Attributes:
        group: the units; its consumers are those that are refitted in this step.
        chooses: the units are chosen here. Otherwise the "units" are the input channels of one consumer, and those stay
            that no earlier turn removed.
    """

    group: UnitGroup
    chooses: bool


def make_schedule(
    program: Program, state: Mapping[str, Tensor], cut: Sequence[UnitGroup], readers: Sequence[Consumer] = ()
) -> tuple[Turn, ...]:
    """Turns of a front-to-back sweep.

    Args:
        cut: groups whose units are chosen, front to back.
        readers: consumers that may be refitted once something in front of them changed; others stay as they are.
    """
    order = {step.name: place for place, step in enumerate(program.steps)}
    events: list[tuple[float, int, Turn]] = []
    place = -1.0
    for number, group in enumerate(cut):
        first = min(order[consumer.node] for consumer in group.consumers)
        place = max(place, first - 0.5)  # never before the group in front of it
        events.append((place, number, Turn(group, chooses=True)))
    sites: dict[str, set[str]] = {}
    for consumer in [*readers, *(consumer for group in cut for consumer in group.consumers)]:
        sites.setdefault(consumer.weight, set()).add(consumer.node)
    depends: dict[str, set[str]] = {}
    for consumer in {consumer.node: consumer for consumer in readers}.values():
        whole = whole_input(consumer, state) if len(sites[consumer.weight]) == 1 else None
        if whole is not None:
            depends[consumer.node] = leaves(program, consumer.input)
            events.append((order[consumer.node], len(cut), Turn(whole, chooses=False)))
    turns: list[Turn] = []
    moved: dict[str, int] = {}  # state name -> number of the turn that last changed it
    fitted: dict[str, list[int]] = {}  # consumer's node -> numbers of the turns that refitted it
    for _, _, turn in sorted(events, key=lambda event: event[:2]):
        if not turn.chooses:
            (consumer,) = turn.group.consumers
            before = fitted.get(consumer.node, [])
            since = before[0] if before else -1
            moving = any(moved.get(name, -1) > since for name in depends[consumer.node] - changed_tensors(consumer))
            if not moving and len(before) < 2:
                continue
        for consumer in turn.group.consumers:
            fitted.setdefault(consumer.node, []).append(len(turns))
            moved.update(dict.fromkeys(changed_tensors(consumer), len(turns)))
        turns.append(turn)
    return tuple(turns)


def whole_input(consumer: Consumer, state: Mapping[str, Tensor]) -> UnitGroup | None:
    """All input channels of one consumer as a group of units; None for a grouped or transposed convolution."""
    if consumer.groups != 1 or consumer.kind == "conv_transpose":
        return None
    channels = state[consumer.weight].shape[0 if consumer.kind == "linear_transposed" else 1]
    everything = replace(consumer, positions=torch.arange(channels)[:, None])
    name = consumer.weight.rpartition(".")[0]
    return UnitGroup(name=name, producers=(name,), unit_count=channels, slices=(), consumers=(everything,))


def left_channels(turn: Turn, kept: Mapping[str, Tensor], cut: Sequence[UnitGroup]) -> Tensor:
    """Input channels (m,) of the turn's consumer that no group has lost, sorted.

    Args:
        kept: group name -> units that stay, of the groups settled so far.
    """
    (consumer,) = turn.group.consumers
    left = torch.ones(turn.group.unit_count, dtype=torch.bool)
    for group in cut:
        if group.name not in kept:
            continue
        gone = torch.ones(group.unit_count, dtype=torch.bool)
        gone[kept[group.name]] = False
        for reader in group.consumers:
            if reader.node == consumer.node:
                left[reader.positions[gone].flatten()] = False
    return left.nonzero().flatten()


def changed_tensors(consumer: Consumer) -> set[str]:
    """State names that refitting a consumer may change."""
    return {name for name in (consumer.weight, consumer.bias, consumer.shift) if name is not None}


def leaves(program: Program, name: str) -> set[str]:
    """State tensors that a node's value depends on."""
    needed = program.upstream([name])
    return {tensor for leaf in needed if (tensor := program.tensor(leaf)) is not None}

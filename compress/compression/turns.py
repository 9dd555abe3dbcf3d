"""In which order a network is compressed: each group of units in its turn, each consumer again where its input moved.

A consumer right behind its group is refitted with it. One that reads units further back (of a residual stream), that
reads units of several groups (a concatenation), or whose units all stay, sees its input change when the layers in front
are compressed; it is refitted, on all input channels that are left, when the sweep arrives there. So is one behind a
normalisation over units of which some went: the others' values change with what the statistics are taken over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.graph.ops import Layout
from compress.graph.program import Program
from compress.units.groups import Consumer, ReadUnits, UnitGroup


@dataclass(frozen=True, eq=False)
class Choose:
    """The units of a group are chosen, and the consumers right behind it refitted."""

    group: UnitGroup

    @property
    def read(self) -> ReadUnits:
        """What is recorded: the group's units."""
        return self.group


@dataclass(frozen=True, eq=False)
class Refit:
    """One consumer is refitted on all its input channels that are left."""

    read: ReadUnits

    @property
    def consumer(self) -> Consumer:
        """The consumer; its positions are all input channels."""
        (consumer,) = self.read.consumers
        return consumer


@dataclass(frozen=True, eq=False)
class Filter:
    """The filters of a depthwise convolution are refitted, channel by channel."""

    consumer: Consumer

    @property
    def read(self) -> ReadUnits:
        """What is recorded: all channels."""
        return ReadUnits(self.consumer.weight.rpartition(".")[0], len(self.consumer.positions), (self.consumer,))


Turn = Choose | Refit | Filter


def make_turns(
    program: Program,
    state: Mapping[str, Tensor],
    cut: Sequence[UnitGroup],
    readers: Sequence[Consumer] = (),
    filters: Sequence[Consumer] = (),
    lowered: Sequence[Consumer] = (),
) -> tuple[Turn, ...]:
    """Turns of a front-to-back sweep.

    Args:
        cut: groups whose units are chosen, front to back.
        readers: consumers that may be refitted once something in front of them changed; others stay as they are.
        filters: depthwise convolutions that may be refitted likewise.
        lowered: readers whose weights are given a low rank: each has a turn, behind those of the groups that it reads.
    """
    order = {step.name: place for place, step in enumerate(program.steps)}
    events: list[tuple[float, int, Turn]] = []
    place = -1.0
    for number, group in enumerate(cut):
        first = min(order[consumer.node] for consumer in group.consumers)
        place = max(place, first - 0.5)  # never before the group in front of it
        events.append((place, number, Choose(group)))
    sites: dict[str, set[str]] = {}
    for consumer in [*readers, *(consumer for group in cut for consumer in group.consumers)]:
        sites.setdefault(consumer.weight, set()).add(consumer.node)
    depends: dict[str, set[str]] = {}
    last: dict[str, float] = {}  # consumer's node -> place of the last group that it reads
    for place, number, _ in events:
        last.update({consumer.node: place for consumer in cut[number].consumers})
    always = {consumer.node for consumer in lowered}
    counted = counting_steps(cut)
    for consumer in {consumer.node: consumer for consumer in [*readers, *lowered]}.values():
        whole = whole_input(consumer, state) if len(sites.get(consumer.weight, ())) <= 1 else None
        if whole is not None:
            depends[consumer.node] = leaves(program, consumer.input, counted)
            behind = last.get(consumer.node, 0) if consumer.node in always else 0
            events.append((max(order[consumer.node], behind), len(cut), Refit(whole)))
    for consumer in filters:
        depends[consumer.node] = leaves(program, consumer.input, counted)
        events.append((order[consumer.node], len(cut), Filter(consumer)))
    turns: list[Turn] = []
    moved: dict[str, float] = {}  # state name, or step that counts units -> number of the turn that last changed it
    fitted: dict[str, list[int]] = {}  # consumer's node -> numbers of the turns that refitted it
    for _, _, turn in sorted(events, key=lambda event: event[:2]):
        if not isinstance(turn, Choose) and turn.consumer.node not in always:
            before = fitted.get(turn.consumer.node, [])
            since = before[0] if before else -1
            changed = changed_tensors(turn.consumer)
            moving = any(moved.get(name, -1) > since for name in depends[turn.consumer.node] - changed)
            if not moving and len(before) < 2:
                continue
        for consumer in turn.read.consumers:
            fitted.setdefault(consumer.node, []).append(len(turns))
            moved.update(dict.fromkeys(changed_tensors(consumer), len(turns)))
        if isinstance(turn, Choose):  # after its consumers were fitted to statistics over all units
            moved.update(dict.fromkeys(counting_steps([turn.group]), len(turns) + 0.5))
        turns.append(turn)
    return tuple(turns)


def whole_input(consumer: Consumer, state: Mapping[str, Tensor]) -> ReadUnits | None:
    """All input channels of one consumer, one unit each; None for a grouped or transposed convolution."""
    if consumer.groups != 1 or consumer.layout is Layout.CONVOLUTION_TRANSPOSED:
        return None
    channels = state[consumer.weight].shape[consumer.layout.input_dim]
    everything = replace(consumer, positions=torch.arange(channels)[:, None])
    return ReadUnits(consumer.weight.rpartition(".")[0], channels, (everything,))


def left_channels(turn: Refit, kept: Mapping[str, Tensor], cut: Sequence[UnitGroup]) -> Tensor:
    """Input channels (m,) of the turn's consumer that no group has lost, sorted.

    Args:
        kept: group name -> units that stay, of the groups settled so far.
    """
    left = torch.ones(turn.read.unit_count, dtype=torch.bool)
    for group in cut:
        if group.name not in kept:
            continue
        gone = torch.ones(group.unit_count, dtype=torch.bool)
        gone[kept[group.name]] = False
        for reader in group.consumers:
            if reader.node == turn.consumer.node:
                left[reader.positions[gone].flatten()] = False
    return left.nonzero().flatten()


def changed_tensors(consumer: Consumer) -> set[str]:
    """State names that refitting a consumer may change."""
    return {name for name in (consumer.weight, consumer.bias, consumer.shift) if name is not None}


def counting_steps(groups: Iterable[UnitGroup]) -> set[str]:
    """Names of the steps that take statistics over the units of these groups."""
    return {statistic.node for group in groups for statistic in group.statistics}


def leaves(program: Program, name: str, steps: Collection[str] = ()) -> set[str]:
    """State tensors that a node's value depends on, and those of `steps`."""
    needed = program.upstream([name])
    return needed.intersection(steps) | {tensor for leaf in needed if (tensor := program.tensor(leaf)) is not None}

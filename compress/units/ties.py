"""Groups that can only be cut together: one unit of the tie is the same share of every group in it.

An attention whose forward() takes the width of its heads from the width of the stream (torch's MultiheadAttention,
torchvision's Swin) can lose neither a head nor a channel of the stream alone. Cut together it works: with n heads in
every layer, unit j of n is head j of every layer and the j-th n-th of the stream's channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from compress.units.drafts import Draft
from compress.units.groups import AttributeRule, UnitGroup


def tie_drafts(drafts: Sequence[Draft], refused: Iterable[int]) -> list[Draft]:
    """A draft for every set of refused drafts that meet in a module whose forward() writes their sizes down.

    The drafts of a set are folded to the greatest common divisor of their unit counts; sets in which that is below 2
    are left out. Where members of a set are views of the same tensor, there is a draft for the outermost views and one
    for those of most units, of which one can be cut.
    """
    tied: list[Draft] = []
    for meeting in _meeting(drafts, sorted(refused)):
        outermost = _apart(drafts, sorted(meeting, key=lambda index: (*reversed(drafts[index].rank), index)))
        finest = _apart(drafts, sorted(meeting, key=lambda index: (-drafts[index].group.unit_count, index)))
        same: list[int] = []
        for members in (outermost, finest) if finest != outermost else (outermost,):
            draft = _tie([drafts[index] for index in members])
            if draft is not None:
                draft.siblings.update(members, same)
                same.append(len(drafts) + len(tied))
                tied.append(draft)
    return tied


def _tie(parts: Sequence[Draft]) -> Draft | None:
    """The draft of several that are cut together; None where they cannot be."""
    count = math.gcd(*(part.group.unit_count for part in parts))
    if len(parts) < 2 or count < 2:
        return None
    shapes, unnamed = (
        _common([rule for part, rules in held for rule in _folded_rules(rules, part.group.unit_count // count)])
        for held in ([(part, part.shapes) for part in parts], [(part, part.unnamed) for part in parts])
    )
    return Draft(
        atoms=[atom for part in parts for atom in part.atoms],
        group=_join([part.group for part in parts], count),
        shapes=shapes,
        suspicious=True,
        kind=tuple(sorted({name for part in parts for name in part.kind})),
        rank=parts[0].rank,
        unnamed=unnamed,
        siblings=set().union(*(part.siblings for part in parts)),
        homes=frozenset().union(*(part.homes for part in parts)),
        readers=frozenset().union(*(part.readers for part in parts)),
    )


def _meeting(drafts: Sequence[Draft], indices: Sequence[int]) -> list[list[int]]:
    """The indices in connected sets, in ascending order: a home of one is a home of the other, or holds its reader."""
    sets: list[list[int]] = []
    for index in indices:
        near = [known for known in sets if any(_meet(drafts[index], drafts[other]) for other in known)]
        sets = [known for known in sets if known not in near]
        sets.append(sorted([index, *(other for known in near for other in known)]))
    return sorted(sets)


def _apart(drafts: Sequence[Draft], order: Sequence[int]) -> list[int]:
    """Those of which no two share a position, in ascending order; of two that do that which comes first in `order`."""
    chosen: list[int] = []
    for index in order:
        if not drafts[index].siblings.intersection(chosen):
            chosen.append(index)
    return sorted(chosen)


def _meet(first: Draft, second: Draft) -> bool:
    return bool(first.homes & (second.homes | second.readers) or second.homes & first.readers)


def _join(groups: Sequence[UnitGroup], count: int) -> UnitGroup:
    folds = [group.unit_count // count for group in groups]
    activations = [group.activation for group in groups if group.activation is not None]
    return replace(
        groups[0],
        producers=tuple(dict.fromkeys(producer for group in groups for producer in group.producers)),
        unit_count=count,
        slices=tuple(
            replace(part, positions=_fold(part.positions, count)) for group in groups for part in group.slices
        ),
        consumers=tuple(
            replace(consumer, positions=_fold(consumer.positions, count))
            for group in groups
            for consumer in group.consumers
        ),
        attributes=_common(
            [rule for group, fold in zip(groups, folds, strict=True) for rule in _folded_rules(group.attributes, fold)]
        ),
        statistics=tuple(
            replace(part, positions=_fold(part.positions, count)) for group in groups for part in group.statistics
        ),
        activation="+".join(dict.fromkeys(activations)) or None,
        homogeneous=all(group.homogeneous for group in groups),
        coupled=True,
    )


def _fold(positions: Tensor, count: int) -> Tensor:
    """(K, m) positions of K units as those of `count` units, K / count neighbours each."""
    return positions.reshape(count, -1)


def _folded_rules(rules: Iterable[AttributeRule], fold: int) -> list[AttributeRule]:
    return [replace(rule, per_unit=rule.per_unit * fold) for rule in rules]


def _common(rules: Iterable[AttributeRule]) -> tuple[AttributeRule, ...]:
    """One rule for each number; where two disagree on how fast it falls there is none."""
    rule_of: dict[tuple[str, str, int | None], AttributeRule | None] = {}
    for rule in rules:
        key = (rule.module, rule.name, rule.index)
        known = rule_of.setdefault(key, rule)
        if known is not None and known.per_unit != rule.per_unit:
            rule_of[key] = None
    return tuple(rule for rule in rule_of.values() if rule is not None)

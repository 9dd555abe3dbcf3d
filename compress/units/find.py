"""Which units a network has, and which can be cut: drafts from the channel flow, of which the unsure are tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from compress.graph.flow import ChannelFlow
from compress.graph.meaning import batch_norms
from compress.graph.rules import RULES
from compress.graph.trace import NetworkGraph
from compress.units.drafts import Draft, depthwise_consumers, draft_groups
from compress.units.groups import Consumer, Skip, SkipKind, UnitGroup
from compress.units.ties import tie_drafts
from compress.units.trial import Trial


def find_units(graph: NetworkGraph, module: nn.Module, *, couple: bool = False) -> tuple[UnitGroup, ...]:
    """All groups of units of a traced network in topological order, prunable or with the reason why not.

    With `couple`, residual streams (units that several layers add into) are prunable too. Groups whose shapes may be
    written down in Python are tried on a copy with random weights, and refused when it does not compute what the masked
    network computes; then all together on the network itself, since forward() may compute with a size. No two prunable
    groups share a position of a tensor.
    """
    norms = {norm.variance: norm for norm in batch_norms(graph) if norm.variance is not None}
    groups = choose_prunable(graph, module, draft_groups(ChannelFlow(graph, RULES), module, couple=couple))
    complete = tuple(
        replace(group, norms=tuple(norms[part.name] for part in group.slices if part.name in norms)) for group in groups
    )
    return (*complete, *skip_rest(graph, module, complete))


def skip_rest(graph: NetworkGraph, module: nn.Module, groups: Sequence[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Layers with a weight matrix that are in none of the groups, each skipped with its reason."""
    listed = {producer for group in groups for producer in group.producers}
    sliced = {(part.name, part.dim) for group in groups for part in group.slices}
    placeholders = {node.name: node for node in graph.graph.nodes if node.op == "placeholder"}
    read = {name for placeholder, name in graph.tensors.items() if placeholders[placeholder].users}
    rest = []
    for name, layer in module.named_modules():
        weight = f"{name}.weight" if name else "weight"
        tensor = dict(layer.named_parameters(recurse=False)).get("weight")
        dim = 1 if getattr(layer, "transposed", False) else 0  # of the layer's outputs
        if tensor is None or tensor.ndim < 2 or name in listed or (weight, dim) in sliced:
            continue
        if graph.aliases.get(weight, weight) not in read:
            skip = Skip(SkipKind.UNREAD, "forward() does not use it")
        elif tensor.shape[dim] == 1:
            skip = Skip.of(SkipKind.SINGLE)
        else:
            skip = Skip(SkipKind.PINNED, "nothing in forward() tells its units apart")
        rest.append(
            UnitGroup(
                name=name or weight,
                unit_count=int(tensor.shape[dim]),
                consumers=(),
                producers=(name,),
                slices=(),
                skip=skip,
            )
        )
    return tuple(rest)


def find_filters(graph: NetworkGraph) -> tuple[Consumer, ...]:
    """The depthwise convolutions of a traced network, front to back: maps that read every channel by itself."""
    return depthwise_consumers(ChannelFlow(graph, RULES))


def choose_prunable(graph: NetworkGraph, module: nn.Module, drafts: Sequence[Draft]) -> tuple[UnitGroup, ...]:
    """The drafts' groups; of groups that share positions one stays prunable, and none that fails its trial."""
    drafts, untied = list(drafts), len(drafts)
    groups = [draft.group for draft in drafts]
    rejected: set[int] = set()
    accepted: dict[int, UnitGroup] = {}
    counted: set[int] = set()
    trial: Trial | None = None
    while True:
        chosen = _choose_apart(drafts, groups, rejected)
        waiting = [index for index in chosen if drafts[index].suspicious and index not in accepted]
        if not waiting and len(drafts) == untied:
            for draft in tie_drafts(drafts, rejected):
                for index in draft.siblings:
                    drafts[index].siblings.add(len(drafts))
                drafts.append(draft)
                groups.append(draft.group)
            if len(drafts) > untied:
                continue
        trial = trial or Trial(graph, module, drafts)
        if waiting:
            accepted.update(trial.search(waiting))
            rejected.update(index for index in waiting if index not in accepted)
            continue
        refused = trial.refuse({index: accepted.get(index, groups[index]) for index in chosen})
        if not refused:
            break
        rejected |= refused
        counted |= {index for index in refused if not drafts[index].suspicious}
    judged: dict[int, UnitGroup] = {}
    final = set(chosen)
    for index, group in enumerate(groups):
        if not group.prunable or index in final:
            judged[index] = accepted.get(index, group)
        elif index < untied and index in rejected:
            kind = SkipKind.COUNTED if index in counted else SkipKind.BAKED
            judged[index] = group.skipped(Skip(kind, kind.value + _stream_hint(drafts[:untied], index)))
        elif index < untied:
            taken = next(other for other in sorted(drafts[index].siblings) if other in final)
            name = groups[taken].name.partition("#")[0]
            judged[index] = group.skipped(Skip(SkipKind.TAKEN, f"its weights are cut as part of {name}"))
    return _without_repeats(drafts, judged)


def _without_repeats(drafts: Sequence[Draft], groups: Mapping[int, UnitGroup]) -> tuple[UnitGroup, ...]:
    """In topological order; skipped groups that are another view of listed groups' positions are left out."""
    listed: set[int] = set()
    seen: set[str] = set()
    for index in sorted(groups, key=lambda index: (_rank(groups[index]), index)):
        group = groups[index]
        if group.prunable or not drafts[index].siblings & listed or not seen.issuperset(group.producers):
            listed.add(index)
            seen.update(group.producers)
    shown = [groups[index] for index in sorted(listed, key=lambda index: (drafts[index].rank, index))]
    taken: set[str] = set()
    names: dict[int, str] = {}
    for place in sorted(range(len(shown)), key=lambda place: (not shown[place].prunable, place)):
        base = shown[place].name.partition("#")[0]
        count = 1
        while (name := base if count == 1 else f"{base}#{count}") in taken:
            count += 1
        taken.add(name)
        names[place] = name
    return tuple(replace(group, name=names[place]) for place, group in enumerate(shown))


def _rank(group: UnitGroup) -> int:
    """Prunable groups first, then those that failed their trial, then the rest."""
    if group.skip is None:
        return 0
    return 1 if group.skip.kind in (SkipKind.BAKED, SkipKind.COUNTED) else 2


def _stream_hint(drafts: Sequence[Draft], index: int) -> str:
    """What to try when a residual stream that was left alone meets the refused draft in one module."""
    homes = drafts[index].homes
    for draft in drafts:
        skip = draft.group.skip
        if (draft.homes | draft.readers) & homes and skip is not None and skip.kind is SkipKind.STREAM:
            return f", perhaps with the residual stream {draft.group.producers[0]}: use --couple"
    return ""


def _choose_apart(drafts: Sequence[Draft], groups: Sequence[UnitGroup], rejected: set[int]) -> list[int]:
    """Prunable groups of which no two share a position: outermost first."""
    chosen: set[int] = set()
    order = sorted(range(len(drafts)), key=lambda index: (drafts[index].rank[1], drafts[index].rank[0], index))
    for index in order:
        if groups[index].prunable and index not in rejected and not drafts[index].siblings & chosen:
            chosen.add(index)
    return sorted(chosen)

"""Which drafts can really be cut: views written down in Python are tried on a small copy with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.network.graph import NetworkGraph
from compress.network.surgery import copy_with, masked_outputs, module_outputs, narrow, relative_deviation
from compress.network.units import UnitGroup, _Draft, with_reason

_BAKED = "a size in forward() is fixed in Python and no attribute changes it"
_TOLERANCE = 2e-3  # float32, random weights: a wrong view is wrong by its whole size


def choose_prunable(graph: NetworkGraph, module: nn.Module, drafts: Sequence[_Draft]) -> tuple[UnitGroup, ...]:
    """The drafts' groups; of groups that share positions one stays prunable, and none that fails its trial."""
    groups = [draft.group for draft in drafts]
    rejected: set[int] = set()
    accepted: dict[int, UnitGroup] = {}
    while True:
        chosen = _choose_apart(drafts, groups, rejected)
        trials = [index for index in chosen if drafts[index].suspicious and index not in accepted]
        if not trials:
            break
        trial = _Trial(graph, module, drafts)
        passed = trial.search(trials)
        accepted.update(passed)
        failed = [index for index in trials if index not in passed]
        rejected.update(failed)
        if not failed:
            break
    result: list[UnitGroup] = []
    final = set(_choose_apart(drafts, groups, rejected))
    for index, group in enumerate(groups):
        if group.skip_reason is not None or index in final:
            result.append(accepted.get(index, group))
        elif index in rejected:
            result.append(with_reason(group, _BAKED))
        else:
            taken = next(other for other in sorted(drafts[index].siblings) if other in final)
            result.append(with_reason(group, f"its weights are cut as part of {groups[taken].name.partition('#')[0]}"))
    return _without_repeats(drafts, result)


def _without_repeats(drafts: Sequence[_Draft], groups: Sequence[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Skipped groups that are another view of a listed group's positions are left out."""
    order = sorted(range(len(groups)), key=lambda index: (_rank(groups[index]), index))
    listed: set[int] = set()
    for index in order:
        if groups[index].skip_reason is None or not drafts[index].siblings & listed:
            listed.add(index)
    shown = [group for index, group in enumerate(groups) if index in listed]
    taken: set[str] = set()
    names: dict[int, str] = {}
    for place in sorted(range(len(shown)), key=lambda place: (shown[place].skip_reason is not None, place)):
        base = shown[place].name.partition("#")[0]
        count = 1
        while (name := base if count == 1 else f"{base}#{count}") in taken:
            count += 1
        taken.add(name)
        names[place] = name
    return tuple(replace(group, name=names[place]) for place, group in enumerate(shown))


def _rank(group: UnitGroup) -> int:
    """Prunable groups first, then those that failed their trial, then the rest."""
    if group.skip_reason is None:
        return 0
    return 1 if group.skip_reason == _BAKED else 2


def _choose_apart(drafts: Sequence[_Draft], groups: Sequence[UnitGroup], rejected: set[int]) -> list[int]:
    """Prunable groups of which no two share a position: outermost first."""
    chosen: set[int] = set()
    order = sorted(range(len(drafts)), key=lambda index: (drafts[index].rank[1], drafts[index].rank[0], index))
    for index in order:
        if groups[index].skip_reason is None and index not in rejected and not drafts[index].siblings & chosen:
            chosen.add(index)
    return sorted(chosen)


class _Trial:
    """Narrows a copy with random weights and compares it with the masked graph."""

    def __init__(self, graph: NetworkGraph, module: nn.Module, drafts: Sequence[_Draft]) -> None:
        self.graph, self.drafts = graph, drafts
        generator = torch.Generator().manual_seed(0)
        self.state: dict[str, Tensor] = {}
        known: dict[int, Tensor] = {}
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        replaced: dict[int, Tensor] = {}
        persistent = set(module.state_dict())
        for name, tensor in named:
            if id(tensor) not in known:
                fresh = _random_like(tensor, generator) if name in persistent else tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    fresh = nn.Parameter(fresh, requires_grad=False)
                known[id(tensor)] = fresh
                replaced[id(tensor)] = fresh
            self.state[name] = known[id(tensor)].detach()
        self.module = copy_with(module, replaced).eval()

    def search(self, indices: Sequence[int]) -> dict[int, UnitGroup]:
        """The groups among `indices` that can be cut together, with the attributes that make it work."""
        return self._search(list(indices), {})

    def _search(self, indices: list[int], accepted: dict[int, UnitGroup]) -> dict[int, UnitGroup]:
        if not indices:
            return {}
        found = self._attempt(indices)
        if found is not None:
            return found
        if len(indices) == 1:
            return {}
        by_kind: dict[object, list[int]] = {}
        for index in indices:
            draft = self.drafts[index]
            by_kind.setdefault((draft.group.coupled, draft.kind), []).append(index)
        parts = list(by_kind.values())
        if len(parts) == 1:
            if len(indices) > 3 and self._attempt(indices[:1]) is None and self._attempt(indices[-1:]) is None:
                return {}
            middle = len(indices) // 2
            parts = [indices[:middle], indices[middle:]]
        passed: dict[int, UnitGroup] = {}
        for part in parts:
            passed.update(self._search(part, accepted))
        return passed

    def _attempt(self, indices: list[int]) -> dict[int, UnitGroup] | None:
        options = []
        if any(self.drafts[index].shapes for index in indices):
            options.append({index: self._with(index, lambda rule: True) for index in indices})
            options.append({index: self._with(index, lambda rule: "head" in rule.name) for index in indices})
        options.append({index: self.drafts[index].group for index in indices})
        for groups in options:
            if self._equal(list(groups.values())):
                return groups
        return None

    def _with(self, index: int, wanted: object) -> UnitGroup:
        draft = self.drafts[index]
        rules = {(rule.module, rule.name): rule for rule in draft.shapes if wanted(rule)}  # type: ignore[operator]
        rules.update({(rule.module, rule.name): rule for rule in draft.group.attributes})
        return replace(draft.group, attributes=tuple(rules.values()))

    def _equal(self, groups: list[UnitGroup]) -> bool:
        generator = torch.Generator().manual_seed(1)
        kept = {
            group.name: torch.randperm(group.unit_count, generator=generator)[: max(1, group.unit_count // 2)]
            .sort()
            .values
            for group in groups
        }
        try:
            narrowed = narrow(self.module, kept, groups)
            got = module_outputs(narrowed.module, self.graph.examples)
        except (CompressError, RuntimeError, ValueError, TypeError, AssertionError, IndexError, ArithmeticError):
            return False
        wanted = masked_outputs(self.graph, self.state, kept, groups, self.graph.examples)
        return relative_deviation(wanted, got) <= _TOLERANCE


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    shape, device = tuple(tensor.shape), tensor.device
    if tensor.dim() < 2 or sum(size > 1 for size in shape) < 2:
        value = torch.rand(shape, generator=generator) * 0.8 + 0.2
    else:
        fan = max(1, tensor.numel() // shape[0])
        value = torch.randn(shape, generator=generator) / fan**0.5
    return value.to(device=device, dtype=tensor.dtype)

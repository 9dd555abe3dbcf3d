"""Trying drafts: views written down in Python are narrowed on a small copy with random weights, and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor, nn

from compress.checkpoint.restoring import named_tensors
from compress.errors import CompressError
from compress.graph.program import Program
from compress.graph.trace import NetworkGraph
from compress.units.drafts import Draft
from compress.units.groups import AttributeRule, UnitGroup
from compress.units.surgery import copy_with, masked_outputs, module_outputs, narrow, new_shapes, relative_deviation

RUN_FAULTS = (CompressError, RuntimeError, ValueError, TypeError, AssertionError, IndexError, ArithmeticError)
_PERIOD = 65537
_TOLERANCE = 5e-4  # float32, random weights: a wrong view is wrong by its whole size
_ROUNDING = 2e-6  # up to it nothing but rounding shows
_CLOSER = 0.1  # of a deviation: what one without a number that is no size has at most
_REFUSED = 1e-2  # the network's own weights: rounding may be amplified where a random half of all units is gone
_MOST_NAMES = 4  # of numbers that may be sizes by their value alone: so many are tried in every combination
_GAIN = 2.0  # of random matrices: small ones leave attention nearly uniform, and mixing up heads changes little then


def _profile(draft: Draft) -> object:
    """What two drafts have in common that are the same part of two equal blocks."""
    parts = [(part.name.rpartition(".")[2], part.dim, tuple(part.positions.shape)) for part in draft.group.slices]
    return draft.kind, draft.group.unit_count, draft.group.activation, sorted(parts)


_Rules = Sequence[AttributeRule]
_Choice = Callable[[nn.Module, _Rules], _Rules]


def _one_of_equals(counts: bool) -> _Choice:
    """Of numbers of one module that are equal and would fall alike, those named as a count, or those that are not."""

    def choose(module: nn.Module, rules: _Rules) -> _Rules:
        def key(rule: AttributeRule) -> tuple[str, object, int]:
            value = getattr(module.get_submodule(rule.module), rule.name)
            return rule.module, value if rule.index is None else value[rule.index], rule.per_unit

        names: dict[object, set[bool]] = {}
        for rule in rules:
            names.setdefault(key(rule), set()).add(bool(_COUNT_NAME.search(rule.name)))
        return [rule for rule in rules if len(names[key(rule)]) == 1 or bool(_COUNT_NAME.search(rule.name)) == counts]

    return choose


_COUNT_NAME = re.compile(r"^n_|^num|^n[a-z]?head|heads$|groups$|count")
_COUNTS_FIRST, _WIDTHS_FIRST = _one_of_equals(True), _one_of_equals(False)


def _every(module: nn.Module, rules: _Rules) -> _Rules:
    return rules


def _also(others: _Rules) -> _Choice:
    return lambda module, rules: [*rules, *others]


def _heads(module: nn.Module, rules: _Rules) -> _Rules:
    return [rule for rule in rules if "head" in rule.name]


class Trial:
    """Narrows a copy with random weights and compares it with the masked graph."""

    def __init__(self, graph: NetworkGraph, module: nn.Module, drafts: Sequence[Draft]) -> None:
        self.graph, self.drafts, self.original = graph, drafts, module
        self.program = Program.of(graph)
        self.state: dict[str, Tensor] = {}
        self.module = _copy_of(module, {})

    def _randomise(self) -> None:
        """Replace the copy's weights, which are the network's own until a comparison needs others."""
        pools: dict[tuple[int, int], Tensor] = {}
        replaced: dict[int, Tensor] = {}
        persistent = set(self.original.state_dict())
        for name, tensor in named_tensors(self.original).items():
            if id(tensor) not in replaced and name in persistent:
                replaced[id(tensor)] = _random_like(tensor, pools, len(replaced))
        self.module = _copy_of(self.original, replaced)
        self.state = {name: tensor.detach() for name, tensor in named_tensors(self.module).items()}

    def search(self, indices: Sequence[int]) -> dict[int, UnitGroup]:
        """The groups among `indices` that can be cut together, with the attributes that make it work."""
        return self._search(list(indices), {})

    def refuse(self, groups: Mapping[int, UnitGroup]) -> set[int]:
        """Those whose cut changes what the rest computes, with the network's own weights.

        A number of units that forward() reads off a shape and computes with stands in the graph as a plain number.
        """
        if not groups or self._same(list(groups.values())):
            return set()
        indices = list(groups)
        if len(indices) == 1:
            return set(indices)
        middle = len(indices) // 2
        halves = [{index: groups[index] for index in part} for part in (indices[:middle], indices[middle:])]
        refused = [self.refuse(half) for half in halves]
        return set().union(*refused) or set(halves[1])  # either half can go, both cannot

    def _search(self, indices: list[int], accepted: dict[int, UnitGroup]) -> dict[int, UnitGroup]:
        if not indices:
            return {}
        together = self._attempt(indices)
        if together is not None:
            return together
        if len(indices) == 1:
            return {}
        by_kind: dict[object, list[int]] = {}
        for index in indices:
            draft = self.drafts[index]
            by_kind.setdefault((draft.group.coupled, draft.kind), []).append(index)
        parts = list(by_kind.values())
        if len(parts) == 1:
            if len(indices) > 3 and self._attempt(indices[:1]) is None:
                alike = _profile(self.drafts[indices[0]]) == _profile(self.drafts[indices[-1]])
                if alike or self._attempt(indices[-1:]) is None:
                    return {}
            middle = len(indices) // 2
            parts = [indices[:middle], indices[middle:]]
        passed: dict[int, UnitGroup] = {}
        for part in parts:
            passed.update(self._search(part, accepted))
        return passed

    def _attempt(self, indices: list[int]) -> dict[int, UnitGroup] | None:
        options = [
            {index: self._with(index, wanted) for index in indices}
            for wanted in (_COUNTS_FIRST, _WIDTHS_FIRST, _every, _heads)
            if any(self.drafts[index].shapes for index in indices)
        ]
        options.append({index: self.drafts[index].group for index in indices})
        options += self._by_value(indices)
        tried: set[object] = set()
        for groups in options:
            content = tuple(rule for group in groups.values() for rule in group.attributes)
            if content in tried:
                continue
            tried.add(content)
            deviation = self._random_deviation(list(groups.values()))
            if deviation <= _TOLERANCE:
                return groups if deviation <= _ROUNDING else self._without_strays(groups, deviation)
        return None

    def _by_value(self, indices: list[int]) -> list[dict[int, UnitGroup]]:
        """The groups with numbers that equal a size under names that do not say so: all, or the fewest that do."""
        names = sorted({rule.name for index in indices for rule in self.drafts[index].unnamed})
        counts = range(1, len(names)) if len(names) <= _MOST_NAMES else [1] * bool(names)
        options = []
        for wanted in (names, *(some for count in counts for some in combinations(names, count))):
            chosen = {}
            for index in indices:
                rules = [rule for rule in self.drafts[index].unnamed if rule.name in wanted]
                chosen[index] = self._with(index, _also(rules))
            options.append(chosen)
        return options if names else []

    def _without_strays(self, groups: dict[int, UnitGroup], deviation: float) -> dict[int, UnitGroup]:
        """The same without numbers that are no sizes: without them the network runs, and comes far closer."""
        drafts = [self.drafts[index] for index in groups]
        for name in sorted({rule.name for draft in drafts for rule in (*draft.shapes, *draft.unnamed)}):
            fewer = {}
            for index, group in groups.items():
                certain = self.drafts[index].group.attributes
                left = (rule for rule in group.attributes if rule.name != name or rule in certain)
                fewer[index] = replace(group, attributes=tuple(left))
            closer = self._random_deviation(list(fewer.values()))
            if closer < _CLOSER * deviation:
                groups, deviation = fewer, closer
        return groups

    def _with(self, index: int, choose: _Choice) -> UnitGroup:
        draft = self.drafts[index]
        rules = {(rule.module, rule.name, rule.index): rule for rule in choose(self.module, draft.shapes)}
        rules.update({(rule.module, rule.name, rule.index): rule for rule in draft.group.attributes})
        return replace(draft.group, attributes=tuple(rules.values()))

    def _fits(self, kept: Mapping[str, Tensor], groups: list[UnitGroup]) -> bool:
        """Whether forward() runs at all with tensors of the new shapes, whatever they hold: most attempts fail here."""
        try:
            with new_shapes(self.module, kept, groups):
                module_outputs(self.module, self.graph.examples)
        except RUN_FAULTS:
            return False
        return True

    def _random_deviation(self, groups: list[UnitGroup]) -> float:
        """With random weights; infinite where the network does not run."""
        kept = _draw(groups)
        if not self._fits(kept, groups):
            return math.inf
        if not self.state:
            self._randomise()
        deviation = self._deviation(self.module, self.state, kept, groups)
        return deviation if deviation <= _TOLERANCE or deviation == math.inf else self._in_double(kept, groups)

    def _in_double(self, kept: Mapping[str, Tensor], groups: list[UnitGroup]) -> float:
        """In double precision: with random weights depth makes much of rounding; infinite if it cannot run."""
        wide: dict[int, Tensor | nn.Module] = {}
        for tensor in named_tensors(self.module).values():
            if tensor.is_floating_point():
                value = tensor.detach().double()
                wide[id(tensor)] = (
                    nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                )
        module = copy_with(self.module, wide).eval()
        state = {name: tensor.detach() for name, tensor in named_tensors(module).items()}
        examples = tuple(value.double() if value.is_floating_point() else value for value in self.graph.examples)
        try:
            return self._deviation(module, state, kept, groups, examples)
        except RUN_FAULTS:  # the graph or forward() names a precision
            return math.inf

    def _same(self, groups: list[UnitGroup]) -> bool:
        state = {name: tensor.detach() for name, tensor in named_tensors(self.original).items()}
        return self._deviation(self.original, state, _draw(groups), groups) <= _REFUSED

    def _deviation(
        self,
        module: nn.Module,
        state: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        groups: list[UnitGroup],
        examples: tuple[Tensor, ...] | None = None,
    ) -> float:
        """Of the narrowed network from the masked one; infinite where it does not run."""
        examples = self.graph.examples if examples is None else examples
        try:
            got = module_outputs(narrow(module, kept, groups).module, examples)
        except RUN_FAULTS:
            return math.inf
        return relative_deviation(masked_outputs(self.program, state, kept, groups, examples), got)


def _draw(groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
    """Seeded units to keep; streams keep more than others, since equal shares would hide groups that must go alike."""
    generator = torch.Generator().manual_seed(1)
    kept: dict[str, Tensor] = {}
    for group in groups:
        units = group.unit_count
        low, high = (units // 2 + 1, 2 * units // 3 + 1) if group.coupled else (units // 3, units // 2)
        low, high = (min(max(1, units - 1), max(1, count)) for count in (low, high))
        count = int(torch.randint(low, high + 1, (), generator=generator))
        kept[group.name] = torch.randperm(units, generator=generator)[:count].sort().values
    return kept


def _copy_of(module: nn.Module, replaced: Mapping[int, Tensor]) -> nn.Module:
    """A copy in evaluation mode with those tensors (by id) replaced; other parameters are shared, buffers copied."""
    tensors: dict[int, Tensor] = {}
    for tensor in named_tensors(module).values():
        value = replaced.get(id(tensor))
        if isinstance(tensor, nn.Parameter):
            tensors[id(tensor)] = nn.Parameter(tensor.detach() if value is None else value, requires_grad=False)
        else:
            tensors[id(tensor)] = tensor.detach().clone() if value is None else value
    return copy_with(module, tensors).eval()


def _random_like(tensor: Tensor, pools: dict[tuple[int, int], Tensor], number: int) -> Tensor:
    """A random tensor of that shape: a part of a pool of its scale, since large networks have gigabytes of weights.

    A pool repeats a period whose length is a prime, so that no two rows repeat in step.
    """
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    shape, size, start = tuple(tensor.shape), tensor.numel(), number * 977 % (_PERIOD // 2)
    vector = sum(extent > 1 for extent in shape) < 2
    fan = 0 if vector else max(1, size // shape[0])
    length = 1 << (start + size).bit_length()
    pool = pools.get((fan, length))
    if pool is None:
        period = torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0))
        period = period.abs().clamp(max=2.0) * 0.4 + 0.2 if vector else _GAIN * period / fan**0.5
        pool = pools[fan, length] = period.repeat(-(-length // _PERIOD))
    return pool[start : start + size].reshape(shape).to(device=tensor.device, dtype=tensor.dtype)

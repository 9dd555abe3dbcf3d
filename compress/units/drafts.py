"""Drafts of groups: what the channel flow alone says is removed together, who makes it, who reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from compress.graph.atoms import Dimension, dimension_size, row_numbers
from compress.graph.flow import ChannelFlow, Contraction, Touch
from compress.graph.ops import BatchNorm, Layout, LinearMap, traced_shape
from compress.graph.trace import module_path
from compress.units.attributes import counts_its_groups, find_attributes, find_shape_attributes
from compress.units.groups import AttributeRule, Consumer, ParameterSlice, Skip, SkipKind, StatisticSlice, UnitGroup


@dataclass(eq=False)
class Draft:
    """A group while it is put together.

    Attributes:
        shapes: numbers of modules that may be sizes of it, by value and name; `unnamed`: by their value alone.
    """

    atoms: list[int]
    group: UnitGroup
    shapes: tuple[AttributeRule, ...]
    suspicious: bool
    kind: tuple[str, ...]
    rank: tuple[int, int]
    unnamed: tuple[AttributeRule, ...] = ()
    siblings: set[int] = field(default_factory=set)
    homes: frozenset[str] = frozenset()  # modules whose forward() may write the group's sizes down
    readers: frozenset[str] = frozenset()  # modules that hold a layer which reads the group


def draft_groups(flow: ChannelFlow, module: nn.Module, *, couple: bool) -> list[Draft]:
    """Groups as the flow alone determines them, in the order of their first producers."""
    occurrences, sharing = _find_occurrences(flow)
    owner = {atom: number for number, atoms in enumerate(occurrences) for atom in atoms.atoms}
    drafting = _Drafting(flow, dict(module.named_modules()), _Touched(flow, owner, len(occurrences)), couple)
    order = {node: place for place, node in enumerate(flow.graph.graph.nodes)}
    firsts = {
        number: min(order[contraction.map.node] for contraction in made)
        for number, made in enumerate(drafting.touched.produced)
        if made
    }
    numbers = sorted(firsts, key=lambda number: (firsts[number], number))
    drafts = [drafting.draft(number, occurrences[number], firsts[number]) for number in numbers]
    place_of = {number: place for place, number in enumerate(numbers)}
    for first, second in sharing:
        if first in place_of and second in place_of:
            drafts[place_of[first]].siblings.add(place_of[second])
            drafts[place_of[second]].siblings.add(place_of[first])
    return drafts


@dataclass(frozen=True, eq=False)
class _Drafting:
    """What the draft of a group is made from."""

    flow: ChannelFlow
    modules: dict[str, nn.Module]
    touched: _Touched
    couple: bool

    def draft(self, number: int, occurrences: _Occurrences, first: int) -> Draft:
        """One group; `first` is the place of its first producer in the graph."""
        touched = self.touched
        group, shapes, unnamed, classes = self.group(number, occurrences)
        homes = frozenset(module_path(touch.node) for touch in touched.shapes[number])
        callers = [module_path(read.map.node) for read in touched.read[number]]  # of a functional call its caller
        readers = frozenset([*callers, *(path.rpartition(".")[0] for path in callers)])
        suspicious = bool(classes or readers & touched.viewing or self.uncounted(number))
        rank = (first, occurrences.slot)
        return Draft(
            occurrences.atoms, group, shapes, suspicious, classes, rank, unnamed, homes=homes, readers=readers - {""}
        )

    def group(
        self, number: int, occurrences: _Occurrences
    ) -> tuple[UnitGroup, tuple[AttributeRule, ...], tuple[AttributeRule, ...], tuple[str, ...]]:
        """The group, and what `find_shape_attributes` says of the sizes written down in Python that go with it."""
        flow, touched = self.flow, self.touched
        producers = tuple(dict.fromkeys(_module_name(flow, contraction) for contraction in touched.produced[number]))
        consumers = _find_consumers(flow, touched.read[number], occurrences)
        joined = number in touched.sums
        skip = self.skip(occurrences, len(producers), consumers, joined=joined)
        group = UnitGroup(
            name=f"{producers[0]}#{number}",
            producers=producers,
            unit_count=len(occurrences.atoms),
            slices=occurrences.slices(flow),
            consumers=consumers,
            activation="+".join(dict.fromkeys(touched.activations[number])) or None,
            homogeneous=number not in touched.inhomogeneous,
            coupled=joined,
            skip=skip,
        )
        if skip is not None:
            return group, (), (), ()
        positions = occurrences.positions_in
        attributes = find_attributes(
            flow, self.modules, touched.read[number], touched.counts[number], occurrences.places, positions
        )
        group = replace(group, attributes=attributes, statistics=touched.statistic_slices(number, occurrences))
        shapes = [*touched.shapes[number], *self.uncounted(number)]
        return group, *find_shape_attributes(self.modules, shapes, positions, flow)

    def uncounted(self, number: int) -> list[Touch]:
        """Groups of channels whose number forward() of no module of torch's reads from an attribute that is known."""
        counts = self.touched.counts[number]
        return [
            touch for touch in counts if not counts_its_groups(self.modules.get(module_path(touch.node)), touch.count)
        ]

    def skip(
        self, occurrences: _Occurrences, producers: int, consumers: tuple[Consumer, ...], *, joined: bool
    ) -> Skip | None:
        """Why the flow says that the group cannot be cut."""
        if (pin := self.flow.atoms.pinned(occurrences.atoms[0])) is not None:
            return Skip(SkipKind.PINNED, f"it {pin}")
        if len(occurrences.atoms) < 2:
            return Skip.of(SkipKind.SINGLE)
        if not consumers:
            return Skip.of(SkipKind.UNREAD)
        shared = next((each.weight for each in consumers if has_repeats(each.positions)), None)
        if shared is not None:
            reader = parameter_module(shared)
            return Skip(SkipKind.PINNED, f"{reader} reads its units paired with one another, so that none goes alone")
        if joined and not self.couple:
            shared = f"{producers} producers" if producers > 1 else "a producer and what is computed from it"
            return Skip(SkipKind.STREAM, f"residual stream shared by {shared}; use --couple")
        return None


@dataclass(eq=False)
class _Occurrences:
    """Where the atoms of one group occur: (parameter, dim) -> (K, m) positions."""

    atoms: list[int]
    places: dict[tuple[str, int], np.ndarray]
    slot: int
    known: dict[int, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)  # by a label's identity

    def slices(self, flow: ChannelFlow) -> tuple[ParameterSlice, ...]:
        names: dict[str, list[str]] = {}
        for alias, name in flow.graph.aliases.items():
            names.setdefault(name, []).append(alias)
        slices: list[ParameterSlice] = []
        for (name, dim), positions in self.places.items():
            for parameter in (name, *names.get(name, ())):
                slices.append(ParameterSlice(parameter, dim, torch.from_numpy(positions.copy())))
        return tuple(slices)

    def positions_in(self, flow: ChannelFlow, dimension: Dimension) -> np.ndarray | None:
        """(K, m) positions of the atoms in any dimension; None where they are missing or unevenly spread."""
        flat = flow.atoms.flatten(dimension)
        if flat.atoms is None:
            return None
        label = flow.atoms.resolve(flat.atoms)
        if id(label) not in self.known:
            self.known[id(label)] = label, self._positions_of(label)
        return self.known[id(label)][1]

    def _positions_of(self, label: np.ndarray) -> np.ndarray | None:
        order = np.argsort(self.atoms)
        members = np.asarray(self.atoms)[order]
        near, slots = np.nonzero((label >= members[0]) & (label <= members[-1]))
        atoms = label[near, slots]
        place = np.searchsorted(members, atoms)  # within: no atom is larger than the last member
        within = members[place] == atoms
        positions, units = near[within], order[place[within]]
        counts = np.bincount(units, minlength=len(members))
        if counts.min() != counts.max() or not counts.max():
            return None
        by_unit = np.lexsort((positions, units))
        return np.asarray(positions[by_unit].reshape(len(members), -1), dtype=np.int64)


def _find_occurrences(flow: ChannelFlow) -> tuple[list[_Occurrences], set[tuple[int, int]]]:
    """Atoms grouped by where they occur, and the pairs of groups that share positions."""
    atom_parts, place_parts, position_parts, slot_parts = [], [], [], []
    places: list[tuple[str, int]] = []
    products: list[np.ndarray] = []
    for name, dims in flow.parameters.items():
        for dim, dimension in enumerate(dims):
            label = dimension[0].atoms
            if label is None:
                continue
            resolved = flow.atoms.resolve(label)
            position, slot = np.nonzero(resolved >= 0)
            atom_parts.append(resolved[position, slot])
            position_parts.append(position)
            place_parts.append(np.full(len(position), len(places), dtype=np.int64))
            slot_parts.append(slot)
            if resolved.shape[1] > 1:
                products.append(resolved)
            places.append((name, dim))
    if not atom_parts:
        return [], set()
    atoms, place, position, slot = (
        np.concatenate(parts) for parts in (atom_parts, place_parts, position_parts, slot_parts)
    )
    order = np.argsort(atoms, kind="stable")  # at each atom by place, position, slot, as they were found
    atoms, place, position, slot = atoms[order], place[order], position[order], slot[order]
    starts = np.flatnonzero(np.r_[True, atoms[1:] != atoms[:-1]])
    ends = np.r_[starts[1:], len(atoms)]
    occurrences: list[_Occurrences] = []
    owner = np.full(int(atoms[-1]) + 2, -1, dtype=np.int64)  # the last entry stays -1: the owner of no atom
    for members in _alike(flow, atoms[starts], place, starts, ends):
        members = members[np.argsort(position[starts[members]], kind="stable")]
        span = starts[members][:, None] + np.arange(ends[members[0]] - starts[members[0]])
        rows, row_places = position[span], place[span[0]]  # (K, positions of all places)
        table = {places[number]: rows[:, row_places == number] for number in dict.fromkeys(row_places.tolist())}
        member_atoms = atoms[starts[members]]
        owner[member_atoms] = len(occurrences)
        occurrences.append(_Occurrences(member_atoms.tolist(), table, int(slot[starts[members]].min())))
    shared: set[tuple[int, int]] = set()
    for label in products:
        rows = owner[label]
        for row in rows[np.unique(row_numbers(rows), return_index=True)[1]].tolist():
            numbers = sorted(set(row) - {-1})
            shared.update((a, b) for place, a in enumerate(numbers) for b in numbers[place + 1 :])
    return occurrences, shared


def _alike(
    flow: ChannelFlow, atoms: np.ndarray, place: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> list[np.ndarray]:
    """Numbers of the atoms in sets: born together, in the same places equally often, held for the same reason.

    Args:
        atoms: (A,) distinct; atom i occurs at place[starts[i]:ends[i]].
    """
    sides = _padding_sides(flow)
    kinds: dict[object, int] = {None: 0}
    held = [(flow.atoms.pinned(atom), sides.get(atom)) for atom in atoms.tolist()]
    keys = np.zeros((len(atoms), 4), dtype=np.int64)
    keys[:, 0] = flow.atoms.births(atoms)
    keys[:, 1] = [kinds.setdefault(kind, len(kinds)) for kind in held]
    keys[:, 2] = lengths = ends - starts
    for length in np.unique(lengths).tolist():
        of_length = np.flatnonzero(lengths == length)
        runs = place[starts[of_length][:, None] + np.arange(length)]
        keys[of_length, 3] = row_numbers(runs)
    which = row_numbers(keys)
    order = np.argsort(which, kind="stable")
    sets = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
    return sorted(sets, key=lambda members: int(members[0]))


def _padding_sides(flow: ChannelFlow) -> dict[int, tuple[int, ...]]:
    """atom -> the sides of paddings that it is a zero of: each side has a width of its own."""
    sides: dict[int, tuple[int, ...]] = {}
    for number, touch in enumerate(flow.touches):
        if touch.padding in (Touch.Padding.BEFORE, Touch.Padding.AFTER):
            for factor in touch.dimension:
                if factor.atoms is not None:
                    for atom in np.unique(flow.atoms.resolve(factor.atoms)).tolist():
                        sides[atom] = (*sides.get(atom, ()), number)
    return sides


class _Touched:
    """For every group: who makes it, who reads it, and which operations it passes."""

    def __init__(self, flow: ChannelFlow, owner: dict[int, int], count: int) -> None:
        self.flow, self.owner = flow, owner
        self.known: dict[int, tuple[np.ndarray, set[int]]] = {}  # by the identity of a label: the label, its groups
        self.produced: list[list[Contraction]] = [[] for _ in range(count)]
        self.read: list[list[Contraction]] = [[] for _ in range(count)]
        self.activations: list[list[str]] = [[] for _ in range(count)]
        self.shapes: list[list[Touch]] = [[] for _ in range(count)]
        self.counts: list[list[Touch]] = [[] for _ in range(count)]
        self.inhomogeneous: set[int] = set()
        self.sums: set[int] = set()
        self.viewing = {module_path(touch.node) for touch in flow.touches if touch.kind is Touch.Kind.SHAPE}
        for contraction in flow.contractions:
            linear = contraction.map
            passing = self.groups_of(contraction.input_dimension) if linear.groups > 1 else set()
            depthwise = linear.groups > 1 and not contraction.weight_dimension
            for number in self.groups_of(contraction.output_dimension):
                if linear.weight is None or (not depthwise and number not in passing):
                    self.produced[number].append(contraction)
            for number in self.groups_of(contraction.weight_dimension):
                self.read[number].append(contraction)
        for touch in flow.touches:
            for number in self.groups_of(touch.dimension):
                if touch.kind is Touch.Kind.ACTIVATION:
                    self.activations[number].append(touch.name)
                elif touch.kind is Touch.Kind.SHAPE:
                    self.shapes[number].append(touch)
                elif touch.kind is Touch.Kind.GROUPS:
                    self.counts[number].append(touch)
                elif touch.kind is Touch.Kind.SUM:
                    self.sums.add(number)
                if not touch.homogeneous:
                    self.inhomogeneous.add(number)

    def groups_of(self, dimension: Dimension) -> set[int]:
        groups: set[int] = set()
        for factor in dimension:
            if factor.atoms is not None:
                known = self.known.get(id(factor.atoms))
                if known is None:
                    unique = np.unique(self.flow.atoms.resolve(factor.atoms)).tolist()
                    known = (factor.atoms, {self.owner[atom] for atom in unique if atom in self.owner})
                    self.known[id(factor.atoms)] = known
                groups |= known[1]
        return groups

    def statistic_slices(self, number: int, occurrences: _Occurrences) -> tuple[StatisticSlice, ...]:
        slices: list[StatisticSlice] = []
        for statistic in self.flow.statistics:
            for dim, dimension in statistic.dims:
                if number not in self.groups_of(dimension):
                    continue
                positions = occurrences.positions_in(self.flow, dimension)
                if positions is not None:
                    size = dimension_size(dimension)
                    slices.append(
                        StatisticSlice(
                            statistic.node.name, dim, size, torch.from_numpy(positions), statistic.normalisation
                        )
                    )
        return tuple(slices)


def has_repeats(positions: torch.Tensor) -> bool:
    """Whether a position occurs more than once."""
    return len(set(positions.flatten().tolist())) < positions.numel()


def _module_name(flow: ChannelFlow, contraction: Contraction) -> str:
    linear = contraction.map
    if linear.weight is None:
        return module_path(linear.node) or linear.node.name
    return parameter_module(linear.weight)


def parameter_module(name: str) -> str:
    """`classifier.4` for `classifier.4.weight`."""
    prefix = name.rpartition(".")[0]
    return prefix.removesuffix(".parametrizations.weight") if prefix else name


def _find_consumers(
    flow: ChannelFlow, contractions: Iterable[Contraction], occurrences: _Occurrences
) -> tuple[Consumer, ...]:
    """The maps that read a group and give anything."""
    consumers: list[Consumer] = []
    for contraction in contractions:
        positions = occurrences.positions_in(flow, contraction.input_dimension)
        linear = contraction.map
        if linear.weight is not None and positions is not None and 0 not in traced_shape(linear.matrix):
            consumers.append(_make_consumer(flow, linear, linear.weight, torch.from_numpy(positions)))
    return tuple(consumers)


def depthwise_consumers(flow: ChannelFlow) -> tuple[Consumer, ...]:
    """The convolutions that read each channel by itself, of those whose weight is applied once, front to back."""
    consumers: list[Consumer] = []
    for linear in (contraction.map for contraction in flow.contractions):
        if linear.weight is None or linear.groups < 2 or linear.layout is not Layout.CONVOLUTION:
            continue
        shape = traced_shape(linear.matrix)
        once = sum(contraction.map.weight == linear.weight for contraction in flow.contractions) == 1
        if once and shape[0] == linear.groups and shape[1] == 1:
            consumers.append(_make_consumer(flow, linear, linear.weight, torch.arange(linear.groups)[:, None]))
    return tuple(consumers)


def whole_consumers(flow: ChannelFlow) -> tuple[Consumer, ...]:
    """The linear maps and convolutions of one block whose weight is applied once, each reading all its input channels.

    Front to back; without transposed ones.
    """
    maps = [contraction.map for contraction in flow.contractions]
    uses = Counter(linear.weight for linear in maps)
    return tuple(
        _make_consumer(flow, linear, linear.weight, torch.arange(traced_shape(linear.matrix)[1])[:, None])
        for linear in maps
        if linear.weight is not None
        and uses[linear.weight] == 1
        and linear.groups == 1
        and linear.layout in (Layout.LINEAR, Layout.CONVOLUTION)
    )


def _make_consumer(flow: ChannelFlow, linear: LinearMap, weight: str, positions: torch.Tensor) -> Consumer:
    return Consumer(
        node=linear.node.name,
        weight=weight,
        bias=linear.bias,
        layout=linear.layout,
        positions=positions,
        taps=linear.taps,
        input=linear.input.name,
        shift=_find_shift(flow, linear),
        window=linear.window,
        groups=linear.groups,
        shifted=linear.offset is not None and linear.bias is None,
    )


def _find_shift(flow: ChannelFlow, linear: LinearMap) -> str | None:
    """The running mean of the batch norm that alone reads a map without bias."""
    if linear.bias is not None or len(linear.node.users) != 1:
        return None
    norm = flow.meaning(next(iter(linear.node.users)))
    return norm.mean if isinstance(norm, BatchNorm) and norm.input == linear.node.name else None

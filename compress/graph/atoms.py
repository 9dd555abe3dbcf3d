"""Where the positions of a tensor dimension come from: atoms, joined and split as operations demand.

Every position of every tensor dimension belongs to a set of *atoms*; an atom is the smallest thing that can be removed,
and a position disappears when any of its atoms does. An empty set is a position that cannot disappear.

A dimension is a product of *factors* (outermost first), so that (B, C, H, W) flattened to (B, C·H·W) stays the product
C × H × W, and viewing C as (heads, width) splits the factor C in two. Three kinds of factor labels exist:

    None       fixed: no position can be removed (spatial sizes, tokens, inputs)
    UNIFORM    every position holds the same value (expanded or constant), so any of them may be removed
    array      (size, r) integers: the atoms of each position, -1 where there are fewer than r
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
UNIFORM = "uniform"
Label = Array | str | None


@dataclass(frozen=True, eq=False)
class Factor:
    """A factor of a dimension: its size and the atoms of its positions."""

    size: int
    label: Label = None

    @property
    def atoms(self) -> Array | None:
        """The (size, r) atoms, or None where nothing can be removed (fixed or uniform)."""
        return self.label if isinstance(self.label, np.ndarray) else None

    @property
    def uniform(self) -> bool:
        """Whether every position holds the same value."""
        return isinstance(self.label, str)


Dimension = tuple[Factor, ...]
Flow = tuple[Dimension, ...]


def dimension_size(dimension: Dimension) -> int:
    """The product of the factors' sizes."""
    size = 1
    for factor in dimension:
        size *= factor.size
    return size


def is_tracked(dimension: Dimension) -> bool:
    """Whether any position of the dimension can be removed."""
    return any(factor.atoms is not None for factor in dimension)


class Atoms:
    """The atoms of one network: a union-find in which an atom can also stand for a set of finer ones and can be pinned.

    On it the dimensions that atoms label are joined, split, flattened and concatenated.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._special = np.zeros(0, dtype=bool)  # representatives that have parts, or a pin
        self._pairs = np.zeros((0, 2), dtype=np.int64)  # the two parts of representatives that have two, else -1
        self._count = 0
        self._births: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._pins: dict[int, str] = {}
        self._version = 0
        self._resolved: dict[int, tuple[int, Array, Array]] = {}
        self._expanded: dict[int, tuple[int, ...]] = {}
        self._flattened: dict[tuple[int, ...], tuple[int, Dimension, Factor]] = {}

    def fresh(self, count: int) -> Array:
        """`count` new atoms as a label of shape (count, 1)."""
        need = self._count + count
        if need > len(self._parent):
            grown = np.arange(max(need, 2 * len(self._parent) + 1024), dtype=np.int64)
            grown[: self._count] = self._parent[: self._count]
            self._parent = grown
            more = len(grown) - len(self._special)
            self._special = np.concatenate([self._special, np.zeros(more, dtype=bool)])
            self._pairs = np.concatenate([self._pairs, np.full((more, 2), -1, dtype=np.int64)])
        start = self._count
        self._count = need
        self._births.append(start)
        return np.arange(start, need, dtype=np.int64)[:, None]

    def births(self, atoms: Array) -> Array:
        """Which call of `fresh` made each atom: atoms of one dimension share it."""
        return np.searchsorted(np.asarray(self._births), atoms, side="right") - 1

    def find(self, atoms: Array) -> Array:
        """The representative of every atom; -1 stays -1."""
        roots = atoms
        while True:
            following = np.where(roots >= 0, self._parent[np.maximum(roots, 0)], -1)
            if np.array_equal(following, roots):
                break
            roots = following
        present = atoms >= 0
        self._parent[atoms[present]] = roots[present]
        return roots

    def _root(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = int(parent[atom])
        return atom

    def expand(self, atom: int) -> tuple[int, ...]:
        """The finest representatives that an atom stands for."""
        root = self._root(atom)
        parts = self._parts.get(root)
        if parts is None:
            return (root,)
        known = self._expanded.get(root)
        if known is None:
            finest: dict[int, None] = {}
            for part in parts:
                finest.update(dict.fromkeys(self.expand(part)))
            known = self._expanded[root] = tuple(finest)
        return known

    def resolve(self, label: Array) -> Array:
        """The label in the finest representatives, atoms repeated at one position removed; shape (size, r')."""
        known = self._resolved.get(id(label))
        if known is None or known[0] != self._version:
            known = (self._version, label, self._resolve(label))
            self._resolved[id(label)] = known
        return known[2]

    def _resolve(self, label: Array) -> Array:
        roots = self.find(label)
        if self._parts:
            roots = self._replace_by_parts(roots)
        return _without_repeats(roots)

    def _replace_by_parts(self, roots: Array) -> Array:
        columns: list[Array] = []
        waiting = list(roots.T[::-1])
        while waiting:
            column = waiting.pop()
            here = np.maximum(column, 0)
            apart = self._special[here] & (column >= 0)
            if not apart.any():
                columns.append(column)
                continue
            pairs = np.where(apart[:, None], self._pairs[here], -1)
            two = pairs[:, 0] >= 0
            if two.any():
                first, second = self.find(pairs[:, 0]), self.find(pairs[:, 1])
                waiting += [second, np.where(two, first, column)]
                continue
            columns += self._replace_by_many(column, apart)
        return np.stack(columns, axis=1) if len(columns) > 1 else columns[0][:, None]

    def _replace_by_many(self, column: Array, special: np.ndarray) -> list[Array]:
        """Columns of what the special atoms of a column stand for, where that is no pair."""
        unique, inverse = np.unique(column[special], return_inverse=True)
        expanded = [self.expand(atom) for atom in unique.tolist()]
        width = max((len(entry) for entry in expanded), default=1)
        table = np.full((len(unique), width), -1, dtype=np.int64)
        for row, entry in enumerate(expanded):
            table[row, : len(entry)] = entry
        wide = np.full((len(column), width), -1, dtype=np.int64)
        wide[:, 0] = column
        wide[special] = table[inverse.reshape(-1)]
        return list(wide.T)

    def _changed(self) -> None:
        self._version += 1
        self._expanded.clear()

    def pin(self, label: object, reason: str) -> None:
        """Forbid the removal of every atom of `label`, for `reason`; a label without atoms is left alone."""
        if not isinstance(label, np.ndarray):
            return
        for atom in np.unique(self.resolve(label)).tolist():
            if atom >= 0:
                self._set_pin(atom, reason)

    def _set_pin(self, root: int, reason: str) -> None:
        self._pins.setdefault(root, reason)
        self._special[root] = True

    def pinned(self, atom: int) -> str | None:
        """Why the atom cannot be removed, or None."""
        return self._pins.get(atom)

    def union_pairs(self, first: Array, second: Array) -> None:
        """Make first[i] and second[i] one for every i."""
        first, second = self.find(first), self.find(second)
        apart = first != second
        first, second = first[apart], second[apart]
        low, high = np.minimum(first, second), np.maximum(first, second)
        plain = not self._special[first].any() and not self._special[second].any()
        if plain and len(np.unique(high)) == len(high) and not np.isin(high, low, kind="table").any():
            self._parent[high] = low
            self._changed()
            return
        for a, b in np.unique(np.stack([first, second], axis=1), axis=0).tolist():
            self.union(a, b)

    def union(self, first: int, second: int) -> None:
        """Make two representatives one."""
        first, second = self._root(first), self._root(second)
        if first == second:
            return
        self._changed()
        low, high = min(first, second), max(first, second)
        self._parent[high] = low
        if high in self._pins:
            self._set_pin(low, self._pins.pop(high))
        high_parts = self._parts.pop(high, None)
        self._pairs[high] = -1
        if high_parts is None:
            self._push_pin(low)
            return
        low_parts = self._parts.get(low)
        if low_parts is None:
            self._set_parts(low, high_parts)
            self._push_pin(low)
        else:
            self.substitute(low, high_parts)

    def _set_parts(self, root: int, parts: tuple[int, ...]) -> None:
        self._parts[root] = parts
        self._special[root] = True
        self._pairs[root] = parts if len(parts) == 2 else -1

    def _push_pin(self, root: int) -> None:
        reason = self._pins.get(root)
        if reason is not None and root in self._parts:
            for part in self.expand(root):
                self._set_pin(part, reason)

    def substitute(self, atom: int, parts: tuple[int, ...]) -> None:
        """Let `atom` stand for the set `parts` (removed when any of them is)."""
        self._changed()
        root = self._root(atom)
        known = self._parts.get(root)
        if known is None:
            self._set_parts(root, parts)
            self._push_pin(root)
        elif len(known) == len(parts):
            for held, part in zip(known, parts, strict=True):
                first, second = self.expand(held), self.expand(part)
                if len(first) != len(second):
                    self._pin_all((*first, *second), "viewed in incompatible ways")
                    continue
                for a, b in zip(first, second, strict=True):
                    self.union(a, b)
        else:
            everything = (*self.expand(atom), *(fine for part in parts for fine in self.expand(part)))
            self._pin_all(everything, "viewed in incompatible ways")

    def substitute_pairs(self, atoms: Array, first: Array, second: Array) -> None:
        """Let atoms[i] (representatives) stand for {first[i], second[i]}."""
        plain = not self._special[atoms].any() and len(np.unique(atoms)) == len(atoms)
        pairs = list(zip(first.tolist(), second.tolist(), strict=True))
        if plain:
            self._changed()
            self._parts.update(zip(atoms.tolist(), pairs, strict=True))
            self._special[atoms] = True
            self._pairs[atoms] = np.stack([first, second], axis=1)
            return
        for atom, parts in zip(atoms.tolist(), pairs, strict=True):
            self.substitute(atom, parts)

    def _pin_all(self, atoms: Iterable[int], reason: str) -> None:
        for atom in atoms:
            self._set_pin(self._root(atom), reason)

    def join(self, first: Factor, second: Factor, reason: str) -> Factor:
        """Demand that two factors lose the same positions; what cannot be matched is pinned with `reason`."""
        first_label, second_label = first.label, second.label
        if isinstance(first_label, str) or isinstance(second_label, str):
            return second if isinstance(first_label, str) else first
        if first_label is None or second_label is None:
            self.pin(first_label, reason)
            self.pin(second_label, reason)
            return first
        if first_label is second_label:
            return first
        left, right = self.resolve(first_label), self.resolve(second_label)
        if left.shape == right.shape and np.array_equal(left, right):
            return first
        if left.shape[1] == right.shape[1] == 1 and (left >= 0).all() and (right >= 0).all():
            self.union_pairs(left[:, 0], right[:, 0])
            return first
        self._join_sets(left, right, reason)
        return first if left.shape[1] >= right.shape[1] else second

    def _join_sets(self, left: Array, right: Array, reason: str) -> None:
        blocked: list[int] = []
        by_shape: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
        for a_row, b_row in zip(left.tolist(), right.tolist(), strict=True):
            a = [atom for atom in a_row if atom >= 0 and atom not in b_row]
            b = [atom for atom in b_row if atom >= 0 and atom not in a_row]
            if not a or not b:
                blocked += a + b
            else:
                by_shape.setdefault((len(a), len(b)), []).append((a, b))
        for (a_count, b_count), rows in by_shape.items():
            a_columns, b_columns = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
            overlap = np.intersect1d(a_columns, b_columns).size > 0
            if a_count == b_count:
                same = all(np.array_equal(_pattern(a_columns[:, j]), _pattern(b_columns[:, j])) for j in range(a_count))
                if same or a_count == 1:
                    for a_atoms, b_atoms in rows:
                        for x, y in zip(a_atoms, b_atoms, strict=True):
                            self.union(x, y)
                    continue
            elif a_count == 1 and not overlap:
                for a_atoms, b_atoms in rows:
                    self.substitute(a_atoms[0], tuple(b_atoms))
                continue
            elif b_count == 1 and not overlap:
                for a_atoms, b_atoms in rows:
                    self.substitute(b_atoms[0], tuple(a_atoms))
                continue
            blocked += [atom for a_atoms, b_atoms in rows for atom in (*a_atoms, *b_atoms)]
        self._pin_all(blocked, reason)

    def split_dimension(self, dimension: Dimension, outer: int) -> tuple[Dimension, Dimension] | None:
        """The dimension as (outer, rest), refining a factor across the boundary; None when that cannot be."""
        head: list[Factor] = []
        tail = list(dimension)
        while outer > 1:
            if not tail:
                return None
            factor = tail.pop(0)
            if factor.size <= outer and outer % factor.size == 0:
                head.append(factor)
                outer //= factor.size
            elif factor.size % outer == 0:
                first, rest = self.split(factor, outer)
                head.append(first)
                tail.insert(0, rest)
                outer = 1
            else:
                return None
        return tuple(head), tuple(tail)

    def split(self, factor: Factor, outer: int) -> tuple[Factor, Factor]:
        """View a factor of size outer·inner as (outer, inner), refining its atoms where they vary in both."""
        inner = factor.size // outer
        if factor.atoms is None:
            return Factor(outer, factor.label), Factor(inner, factor.label)
        if outer == 1 or inner == 1:
            whole, unit = factor, Factor(1)
            return (unit, whole) if outer == 1 else (whole, unit)
        label = self.resolve(factor.atoms)
        outer_columns: list[Array] = []
        inner_columns: list[Array] = []
        for column in label.T:
            grid = column.reshape(outer, inner)
            if (grid == grid[:, :1]).all():
                outer_columns.append(grid[:, 0])
            elif (grid == grid[:1]).all():
                inner_columns.append(grid[0])
            else:
                rows, columns = self.fresh(outer)[:, 0], self.fresh(inner)[:, 0]
                fixed = (grid < 0).nonzero()
                self._pin_all(
                    np.unique(np.concatenate([rows[fixed[0]], columns[fixed[1]]])).tolist(),
                    "is split in two dimensions together with channels that cannot be cut",
                )
                row, column = (grid >= 0).nonzero()
                self.substitute_pairs(grid[row, column], rows[row], columns[column])
                outer_columns.append(rows)
                inner_columns.append(columns)
        return _factor(outer, outer_columns), _factor(inner, inner_columns)

    def align(self, first: Dimension, second: Dimension) -> list[tuple[Factor, Factor]] | None:
        """Both dimensions over the same factors, split where needed; None when their sizes share no factorisation."""
        left, right = list(first), list(second)
        pairs: list[tuple[Factor, Factor]] = []
        while left and right:
            a, b = left.pop(0), right.pop(0)
            if a.size == 1 and b.size != 1:
                right.insert(0, b)
                continue
            if b.size == 1 and a.size != 1:
                left.insert(0, a)
                continue
            if a.size > b.size:
                if a.size % b.size:
                    return None
                a, rest = self.split(a, b.size)
                left.insert(0, rest)
            elif b.size > a.size:
                if b.size % a.size:
                    return None
                b, rest = self.split(b, a.size)
                right.insert(0, rest)
            pairs.append((a, b))
        if any(factor.size != 1 for factor in (*left, *right)):
            return None
        return pairs

    def join_dimensions(self, first: Dimension, second: Dimension, reason: str) -> Dimension:
        """`join` for dimensions of the same size, factor by factor."""
        if first is second:
            return first
        pairs = self.align(first, second)
        if pairs is None:
            for factor in (*first, *second):
                self.pin(factor.label, reason)
            return first
        return tuple(self.join(a, b, reason) for a, b in pairs)

    def flatten(self, dimension: Dimension) -> Factor:
        """The dimension as one factor, with the union of its factors' atoms at each position."""
        if len(dimension) == 1:
            return dimension[0]
        key = tuple(id(factor) for factor in dimension)
        known = self._flattened.get(key)
        if known is None or known[0] != self._version:
            known = (self._version, dimension, self._flatten(dimension))
            self._flattened[key] = known
        return known[2]

    def _flatten(self, dimension: Dimension) -> Factor:
        size = dimension_size(dimension)
        if not is_tracked(dimension):
            uniform = all(factor.uniform for factor in dimension if factor.size > 1)
            return Factor(size, UNIFORM if uniform and dimension else None)
        columns: list[Array] = []
        before = 1
        for factor in dimension:
            if factor.atoms is not None:
                after = size // (before * factor.size)
                label = self.resolve(factor.atoms)
                columns += [np.tile(np.repeat(column, after), before) for column in label.T]
            before *= factor.size
        return _factor(size, columns)

    def cut(self, dimension: Dimension, positions: slice | Array) -> Factor:
        """The chosen positions of a dimension."""
        whole = self.flatten(dimension)
        if whole.atoms is None:
            return Factor(len(np.arange(whole.size)[positions]), whole.label)
        chosen = whole.atoms[positions]
        return Factor(len(chosen), chosen)

    def concatenate(self, dimensions: list[Dimension]) -> Dimension:
        """One dimension after the other."""
        pieces = [self.flatten(dimension) for dimension in dimensions]
        size = sum(piece.size for piece in pieces)
        if all(piece.atoms is None for piece in pieces):
            return (Factor(size),)
        labels = [
            self.resolve(piece.atoms) if piece.atoms is not None else np.full((piece.size, 1), -1, dtype=np.int64)
            for piece in pieces
        ]
        width = max(label.shape[1] for label in labels)
        padded = [np.pad(label, ((0, 0), (0, width - label.shape[1])), constant_values=-1) for label in labels]
        return (Factor(size, np.concatenate(padded)),)


def _without_repeats(label: Array) -> Array:
    """Each row's atoms without those that stand further left in it, present ones first, empty columns dropped."""
    if label.shape[1] == 1:
        return label
    label = label.copy()
    for column in range(1, label.shape[1]):
        repeated = (label[:, :column] == label[:, column : column + 1]).any(axis=1)
        label[repeated, column] = -1
    order = np.argsort(label < 0, axis=1, kind="stable")
    label = np.take_along_axis(label, order, axis=1)
    return label[:, : max(1, int((label >= 0).sum(axis=1).max(initial=1)))]


def row_numbers(rows: Array) -> Array:
    """(n,) numbers of the rows of (n, m) integers, equal for equal rows alone."""
    factors = np.random.default_rng(0).integers(1, 2**63, rows.shape[1], dtype=np.uint64) | np.uint64(1)
    mixed = (rows.astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
    _, first, numbers = np.unique(mixed, return_index=True, return_inverse=True)
    if not np.array_equal(rows[first[numbers]], rows):  # two rows that differ were mixed to one number
        numbers = np.unique(rows, axis=0, return_inverse=True)[1]
    return np.asarray(numbers.reshape(-1), dtype=np.int64)


def _factor(size: int, columns: list[Array]) -> Factor:
    if not columns:
        return Factor(size)
    return Factor(size, np.stack(columns, axis=1))


def _pattern(column: Array) -> Array:
    """Each entry replaced by the index of its first occurrence: equal for columns that repeat in the same places."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)

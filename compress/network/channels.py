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

from bisect import bisect_right
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
    """The atoms of one network: a union-find structure in which an atom can also be replaced by a set of finer ones."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._count = 0
        self._births: list[int] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._pins: dict[int, str] = {}
        self._version = 0
        self._resolved: dict[int, tuple[int, Array, Array]] = {}
        self._flattened: dict[tuple[int, ...], tuple[int, Dimension, Factor]] = {}

    def fresh(self, count: int) -> Array:
        """`count` new atoms as a label of shape (count, 1)."""
        need = self._count + count
        if need > len(self._parent):
            grown = np.arange(max(need, 2 * len(self._parent) + 1024), dtype=np.int64)
            grown[: self._count] = self._parent[: self._count]
            self._parent = grown
        start = self._count
        self._count = need
        self._births.append(start)
        return np.arange(start, need, dtype=np.int64)[:, None]

    def birth(self, atom: int) -> int:
        """Which call of `fresh` made the atom: atoms of one dimension share it."""
        return bisect_right(self._births, atom) - 1

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
        found: dict[int, None] = {}
        for part in parts:
            found.update(dict.fromkeys(self.expand(part)))
        return tuple(found)

    def resolve(self, label: Array) -> Array:
        """The label in the finest representatives, atoms repeated at one position removed; shape (size, r')."""
        known = self._resolved.get(id(label))
        if known is None or known[0] != self._version:
            known = (self._version, label, self._resolve(label))
            self._resolved[id(label)] = known
        return known[2]

    def _resolve(self, label: Array) -> Array:
        roots = self.find(label)
        if not self._parts and label.shape[1] == 1:
            return roots
        unique, inverse = np.unique(roots, return_inverse=True)
        expanded = [() if atom < 0 else self.expand(int(atom)) for atom in unique]
        if label.shape[1] == 1:
            width = max((len(entry) for entry in expanded), default=1) or 1
            table = np.full((len(unique), width), -1, dtype=np.int64)
            for row, entry in enumerate(expanded):
                table[row, : len(entry)] = entry
            return table[inverse.reshape(-1)]
        inverse = inverse.reshape(label.shape)
        rows: list[tuple[int, ...]] = []
        for row in inverse:
            found: dict[int, None] = {}
            for index in row:
                found.update(dict.fromkeys(expanded[index]))
            rows.append(tuple(found))
        return _to_label(rows)

    def pin(self, label: Label, reason: str) -> None:
        """Forbid the removal of every atom of `label`, for `reason`."""
        if not isinstance(label, np.ndarray):
            return
        for atom in np.unique(self.resolve(label)):
            if atom >= 0:
                self._pins.setdefault(int(atom), reason)

    def pinned(self, atom: int) -> str | None:
        """Why the atom cannot be removed, or None."""
        return self._pins.get(atom)

    def union(self, first: int, second: int) -> None:
        """Make two representatives one."""
        first, second = self._root(first), self._root(second)
        if first == second:
            return
        self._version += 1
        low, high = min(first, second), max(first, second)
        self._parent[high] = low
        if high in self._pins:
            reason = self._pins.pop(high)
            self._pins.setdefault(low, reason)
        high_parts = self._parts.pop(high, None)
        if high_parts is None:
            self._push_pin(low)
            return
        low_parts = self._parts.get(low)
        if low_parts is None:
            self._parts[low] = high_parts
            self._push_pin(low)
        else:
            self.substitute(low, high_parts)

    def _push_pin(self, root: int) -> None:
        reason = self._pins.get(root)
        if reason is not None and root in self._parts:
            for part in self.expand(root):
                self._pins.setdefault(part, reason)

    def substitute(self, atom: int, parts: tuple[int, ...]) -> None:
        """Let `atom` stand for the set `parts` (removed when any of them is)."""
        self._version += 1
        root = self._root(atom)
        known = self._parts.get(root)
        if known is None:
            self._parts[root] = parts
            self._push_pin(root)
        elif len(known) == len(parts):
            for one, other in zip(known, parts, strict=True):
                first, second = self.expand(one), self.expand(other)
                if len(first) != len(second):
                    self._pin_all((*first, *second), "viewed in incompatible ways")
                    continue
                for a, b in zip(first, second, strict=True):
                    self.union(a, b)
        else:
            everything = (*self.expand(atom), *(fine for part in parts for fine in self.expand(part)))
            self._pin_all(everything, "viewed in incompatible ways")

    def _pin_all(self, atoms: Iterable[int], reason: str) -> None:
        for atom in atoms:
            self._pins.setdefault(self._root(atom), reason)

    def join(self, first: Factor, second: Factor, reason: str) -> Factor:
        """Demand that two factors lose the same positions; what cannot be matched is pinned with `reason`."""
        one, other = first.label, second.label
        if isinstance(one, str) or isinstance(other, str):
            return second if isinstance(one, str) else first
        if one is None or other is None:
            self.pin(one, reason)
            self.pin(other, reason)
            return first
        if one is other:
            return first
        left, right = self.resolve(one), self.resolve(other)
        if left.shape == right.shape and np.array_equal(left, right):
            return first
        if left.shape[1] == right.shape[1] == 1 and (left >= 0).all() and (right >= 0).all():
            pairs = np.unique(np.concatenate([left, right], axis=1), axis=0)
            for a, b in pairs[pairs[:, 0] != pairs[:, 1]]:
                self.union(int(a), int(b))
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
                for (a, b), atom in np.ndenumerate(grid):
                    if atom < 0:
                        self._pin_all((int(rows[a]), int(columns[b])), "split in two dimensions with a fixed position")
                    else:
                        self.substitute(int(atom), (int(rows[a]), int(columns[b])))
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


def _factor(size: int, columns: list[Array]) -> Factor:
    if not columns:
        return Factor(size)
    return Factor(size, np.stack(columns, axis=1))


def _to_label(rows: list[tuple[int, ...]]) -> Array:
    width = max((len(row) for row in rows), default=1) or 1
    label = np.full((len(rows), width), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        label[index, : len(row)] = row
    return label


def _pattern(column: Array) -> Array:
    """Each entry replaced by the index of its first occurrence: equal for columns that repeat in the same places."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)

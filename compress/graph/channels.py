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

from dataclasses import dataclass

import numpy as np

from compress.graph.atoms import Array, AtomSets

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


class Atoms(AtomSets):
    """The atoms of one network, and the dimensions that they label: joined, split, flattened, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self._flattened: dict[tuple[int, ...], tuple[int, Dimension, Factor]] = {}

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


def _factor(size: int, columns: list[Array]) -> Factor:
    if not columns:
        return Factor(size)
    return Factor(size, np.stack(columns, axis=1))


def _pattern(column: Array) -> Array:
    """Each entry replaced by the index of its first occurrence: equal for columns that repeat in the same places."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)

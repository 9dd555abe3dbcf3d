"""Atoms: the smallest things that can be removed, made one (union-find) or replaced by sets of finer ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]


class AtomSets:
    """A union-find structure in which an atom can also stand for a set of finer ones, and can be pinned."""

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
            found: dict[int, None] = {}
            for part in parts:
                found.update(dict.fromkeys(self.expand(part)))
            known = self._expanded[root] = tuple(found)
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

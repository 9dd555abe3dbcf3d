"""Activations kept on disk, from which a later pass over the same batches can start.

An `ActivationStore` keeps the values at a frontier of the graph, of the original and of the compressed network, so that
the next layer's recording starts there and not at the input.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Any, ...]  # one value in the original and in the current network; the same object where shared

_SPARE = 2  # files of no batch that wait to be written again: over pages that the kernel has ready


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file: its dimensions from the slowest to the fastest, and their order."""

    start: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Kept:
    """One batch on disk.

    Attributes:
        generation: number of the frontier that its values are of.
        tensors: name -> the original network's value and the current one's.
        size: bytes.
    """

    path: Path
    generation: int
    tensors: dict[str, tuple[Stored, Stored]]
    size: int


@dataclass
class ActivationStore:
    """Values at one frontier of the graph, one file per batch, on disk, within a bound.

    A batch that a pass had no need of stays at the frontier it had reached before. Tensors come back in the memory
    layout that they had, so that whatever starts from them computes the same bits.

    Attributes:
        folder: a private temporary folder; `close()` removes it.
        limit: bytes that may lie there; a batch that would exceed it is not kept, and is recomputed.
        nodes: the frontier.
        generation: number of the frontier.
        batches: number of each batch that is kept -> where.
        spare: files to write over.
    """

    folder: Path
    limit: int
    nodes: tuple[str, ...] = ()
    generation: int = 0
    batches: dict[int, _Kept] = field(default_factory=dict)
    spare: list[Path] = field(default_factory=list)

    @classmethod
    def open(cls, limit: int, parent: str | None = None) -> ActivationStore:
        """A store in a new temporary folder; at most half of the free disk is used."""
        folder = Path(tempfile.mkdtemp(prefix="compress-activations-", dir=parent))
        return cls(folder, min(limit, shutil.disk_usage(folder).free // 2))

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each batch that is kept."""
        return {batch: kept.size for batch, kept in self.batches.items()}

    def advance(self, nodes: tuple[str, ...]) -> ActivationStore:
        """A store for the next frontier in the same folder. The values of this one stay readable until dropped."""
        return ActivationStore(self.folder, self.limit, nodes, self.generation + 1, spare=self.spare)

    def put(self, batch: int, values: Mapping[str, Pair]) -> bool:
        """Keep one batch's values of `nodes`; False if they are not tensors or exceed the bound."""
        if not all(isinstance(value, Tensor) for name in self.nodes for value in values.get(name, (None,))):
            return False
        parts: list[Tensor] = []
        tensors: dict[str, tuple[Stored, Stored]] = {}
        size = 0
        for name in self.nodes:
            places: list[Stored] = []
            for which, value in enumerate(values[name]):
                if which and value is values[name][0]:
                    places.append(places[0])
                    continue
                order = contiguous_order(value)
                part = value.detach().permute(order).contiguous().cpu()
                places.append(Stored(size, tuple(part.shape), order, part.dtype))
                parts.append(part)
                size += part.numel() * part.element_size()
            tensors[name] = places[0], places[-1]
        if not parts or sum(self.sizes.values()) + size > self.limit:
            return False
        path = None
        try:
            path = self.spare.pop() if self.spare else _new_file(self.folder)
            with open(path, "r+b", buffering=0) as file:
                for part in parts:
                    write_tensor(file, part)
                file.truncate(size)
        except OSError:  # a full disk only means that this batch is recomputed
            if path is not None:
                path.unlink(missing_ok=True)
            return False
        self.batches[batch] = _Kept(path, self.generation, tensors, size)
        return True

    def get(self, batch: int, device: torch.device) -> dict[str, Pair] | None:
        """One batch's values, or None where it was not kept."""
        kept = self.batches.get(batch)
        if kept is None:
            return None
        read: dict[Stored, Tensor] = {}
        with open(kept.path, "rb", buffering=0) as file:
            for place in (place for places in kept.tensors.values() for place in places):
                if place not in read:
                    read[place] = read_tensor(file, place).to(device)
        return {name: tuple(read[place] for place in places) for name, places in kept.tensors.items()}

    def reaches(self, batch: int) -> bool:
        """Whether the batch is kept at this very frontier."""
        return batch in self.batches and self.batches[batch].generation == self.generation

    def inherit(self, earlier: ActivationStore) -> None:
        """Take over what is left at an earlier frontier of the same folder, of batches that are not kept here."""
        for batch, kept in list(earlier.batches.items()):
            if batch in self.batches or sum(self.sizes.values()) + kept.size > self.limit:
                earlier.drop(batch)
            else:
                self.batches[batch] = earlier.batches.pop(batch)

    def drop(self, batch: int) -> None:
        """Delete one batch's values."""
        kept = self.batches.pop(batch, None)
        if kept is None:
            return
        if len(self.spare) < _SPARE:
            self.spare.append(kept.path)
        else:
            kept.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _new_file(folder: Path) -> Path:
    number, path = tempfile.mkstemp(dir=folder)
    os.close(number)
    return Path(path)


def contiguous_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the one with the largest step in memory to the one with the smallest."""
    steps = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: -steps[dim]))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write_tensor(file: Any, tensor: Tensor) -> None:
    """Write a contiguous tensor where an unbuffered file stands."""
    content = _bytes_of(tensor)
    while len(content):  # one call writes 2 GiB at most
        content = content[file.write(content) :]


def read_tensor(file: Any, place: Stored) -> Tensor:
    """A tensor of an unbuffered file, in the memory layout that it had."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    content = _bytes_of(tensor)
    file.seek(place.start)
    while len(content):
        count = file.readinto(content)
        if not count:
            raise OSError("an activation file is shorter than what was written to it")
        content = content[count:]
    return tensor.permute(sorted(range(len(place.order)), key=place.order.__getitem__))

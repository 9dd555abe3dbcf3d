"""Activations kept on disk, from which a later pass over the same batches can start.

An `ActivationStore` keeps the values at a frontier of the graph, of the original and of the compressed network, so that
the next layer's recording starts there and not at the input.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Pair = tuple[Any, ...]  # one value in the original and in the current network; the same object where shared


@dataclass
class ActivationStore:
    """Values at one frontier of the graph, one file per batch, on disk, within a bound.

    A batch that a pass had no need of stays at the frontier it had reached before.

    Attributes:
        folder: a private temporary folder; `close()` removes it.
        limit: bytes that may lie there; a batch that would exceed it is not kept, and is recomputed.
        nodes: the frontier.
        sizes: bytes of each batch that is kept.
        generation: number of the frontier.
        behind: of batches at an earlier frontier, its number and nodes.
    """

    folder: Path
    limit: int
    nodes: tuple[str, ...] = ()
    sizes: dict[int, int] = field(default_factory=dict)
    generation: int = 0
    behind: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def open(cls, limit: int, parent: str | None = None) -> ActivationStore:
        """A store in a new temporary folder; at most half of the free disk is used."""
        folder = Path(tempfile.mkdtemp(prefix="compress-activations-", dir=parent))
        return cls(folder, min(limit, shutil.disk_usage(folder).free // 2))

    def advance(self, nodes: tuple[str, ...]) -> ActivationStore:
        """A store for the next frontier in the same folder. The values of this one stay readable until dropped."""
        return ActivationStore(self.folder, self.limit, nodes, {}, self.generation + 1)

    def put(self, batch: int, values: Mapping[str, Pair]) -> bool:
        """Keep one batch's values of `nodes`; False if they are not tensors or exceed the bound."""
        tensors: dict[str, Tensor] = {}
        for name in self.nodes:
            if name not in values or not isinstance(values[name][0], Tensor):
                return False
            for which, value in enumerate(values[name]):
                if which == 0 or value is not values[name][0]:
                    tensors[f"{which}:{name}"] = value.detach().contiguous()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if not tensors or sum(self.sizes.values()) + size > self.limit:
            return False
        try:
            save_file(tensors, self._path(batch))
        except (OSError, SafetensorError):  # a full disk only means that this batch is recomputed
            self._path(batch).unlink(missing_ok=True)
            return False
        self.sizes[batch] = size
        return True

    def get(self, batch: int, device: torch.device) -> dict[str, Pair] | None:
        """One batch's values, or None where it was not kept."""
        if batch not in self.sizes:
            return None
        loaded = load_file(self._path(batch), device=str(device))
        tensors = {name: tensor.clone() for name, tensor in loaded.items()}  # aligned: rounding may depend on it
        return {
            name: (first := tensors[f"0:{name}"], tensors.get(f"1:{name}", first)) for name in self._origin(batch)[1]
        }

    def reaches(self, batch: int) -> bool:
        """Whether the batch is kept at this very frontier."""
        return batch in self.sizes and batch not in self.behind

    def inherit(self, earlier: ActivationStore) -> None:
        """Take over what is left at an earlier frontier of the same folder, of batches that are not kept here."""
        for batch, size in list(earlier.sizes.items()):
            if batch in self.sizes or sum(self.sizes.values()) + size > self.limit:
                earlier.drop(batch)
                continue
            self.behind[batch] = earlier._origin(batch)
            self.sizes[batch] = earlier.sizes.pop(batch)

    def drop(self, batch: int) -> None:
        """Delete one batch's values."""
        if self.sizes.pop(batch, None) is not None:
            self._path(batch).unlink(missing_ok=True)
            self.behind.pop(batch, None)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _origin(self, batch: int) -> tuple[int, tuple[str, ...]]:
        return self.behind.get(batch, (self.generation, self.nodes))

    def _path(self, batch: int) -> Path:
        return self.folder / f"{self._origin(batch)[0]}-{batch}.safetensors"

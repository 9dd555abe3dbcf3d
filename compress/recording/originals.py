"""What the original network gives at the rows that recorders read, kept on disk.

The rows that a layer is fitted on are drawn by a seed, so they are the same in every sweep, and so is what the original
network gives there. Once it is kept, a sweep runs the network that is compressed alone.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from compress.errors import NonFiniteError
from compress.graph.program import Program
from compress.recording.record import SamplePlan
from compress.recording.sharing import Share
from compress.recording.store import Stored, contiguous_order, read_tensor, write_tensor

KEPT_BYTES = 4 * 2**30  # on disk
SHARE_OF_DISK = 0.25  # of what is free


class Reader(Protocol):
    """A recorder that says what it reads of the original network."""

    @property
    def plan(self) -> SamplePlan:
        """Which rows."""

    @property
    def wanted_originals(self) -> set[str]:
        """Names of the nodes whose values `original_rows` reads."""

    def original_rows(self, values: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Of one batch: for each of its readings and places the original network's rows."""


@dataclass(eq=False)
class KeptRows:
    """What one recorder reads of the original network, batch by batch.

    Attributes:
        plan: rows that are kept; a recorder of fewer of the same draws reads a part of each batch.
        batches: where the tensors lie.
    """

    path: Path
    plan: SamplePlan
    batches: list[list[list[Stored]]] = field(default_factory=list)

    def read(self, batch: int) -> list[list[Tensor]]:
        """Rows of a batch: for each reading and place."""
        with open(self.path, "rb", buffering=0) as file:
            return [[read_tensor(file, place) for place in places] for places in self.batches[batch]]

    def covers(self, plan: SamplePlan) -> bool:
        """Whether the rows of a plan are among those that are kept."""
        enough = all(count <= kept for count, kept in zip(plan.positions, self.plan.positions, strict=True))
        return enough and plan.samples <= self.plan.samples


class Originals:
    """Rows of the original network by key, in a private temporary folder that goes with the object.

    Attributes:
        failed: whether something found no room; then nothing of it may be used.
    """

    def __init__(self, parent: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="compress-originals-", dir=parent))
        self.room = float(min(KEPT_BYTES, SHARE_OF_DISK * shutil.disk_usage(self.folder).free))
        self.failed = False
        self._kept: dict[Hashable, KeptRows] = {}
        weakref.finalize(self, shutil.rmtree, self.folder, True)

    def recorder(self, key: Hashable, reader: Reader) -> OriginalRecorder:
        """What keeps the reader's rows under a key."""
        path = self.folder / str(len(self._kept))
        path.touch()
        kept = self._kept[key] = KeptRows(path, reader.plan)
        return OriginalRecorder(self, kept, reader)

    def rows(self, key: Hashable) -> KeptRows | None:
        """What is kept under a key; None where nothing is."""
        return None if self.failed else self._kept.get(key)

    def append(self, kept: KeptRows, rows: Sequence[Sequence[Tensor]]) -> None:
        """Add a batch."""
        if self.failed:
            return
        try:
            with open(kept.path, "ab", buffering=0) as file:
                places = [[self._write(file, tensor) for tensor in tensors] for tensors in rows]
        except OSError:  # a full disk only means that the original network runs again
            self.failed = True
            return
        kept.batches.append(places)

    def _write(self, file, tensor: Tensor) -> Stored:  # type: ignore[no-untyped-def]
        order = contiguous_order(tensor)
        part = tensor.detach().permute(order).contiguous().cpu()
        self.room -= part.numel() * part.element_size()
        if self.room < 0:
            raise OSError("no room for more rows")
        place = Stored(file.tell(), tuple(part.shape), order, part.dtype)
        write_tensor(file, part)
        return place


class OriginalRecorder:
    """Keeps what a reader will read of the original network; one network runs."""

    def __init__(self, originals: Originals, kept: KeptRows, reader: Reader) -> None:
        self.originals, self.kept, self.reader = originals, kept, reader
        self.plan, self.share = reader.plan, Share()
        self.fault: NonFiniteError | None = None

    @property
    def wanted(self) -> set[str]:
        """Names of the nodes whose values `add` reads."""
        return self.reader.wanted_originals

    def add(
        self,
        values: Mapping[str, tuple[Tensor, Tensor]],
        original: Mapping[str, Tensor],
        current: Mapping[str, Tensor],
    ) -> None:
        """Keep one batch's rows."""
        if not self.originals.failed:
            given = {name: values[name][0] for name in self.wanted}
            self.originals.append(self.kept, self.reader.original_rows(given, original))

    def skip(self, size: int, program: Program) -> None:
        """Never asked: rows are kept by a single process."""


@dataclass(frozen=True)
class WholeValues:
    """Reads nodes' values as they are.

    Attributes:
        nodes: whose values are read, in their order.
    """

    nodes: tuple[str, ...]

    plan: SamplePlan

    @property
    def wanted_originals(self) -> set[str]:
        """Names of the nodes whose values it reads."""
        return set(self.nodes)

    def original_rows(self, values: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """The values of one batch."""
        return [[values[name] for name in self.nodes]]

    def bytes_of(self, program: Program) -> float:
        """What all samples take, from the traced shapes and at four bytes a number."""
        traced = program.network.examples[0].shape[0]
        return sum(4 * self.plan.samples * math.prod(program.shape(name)) / traced for name in self.nodes)

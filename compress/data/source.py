"""A source of samples that is read in batches, and what is done with one: hashes, overlap, splits."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from compress.data.preprocessing import Preprocessing
from compress.errors import DataError

HASH_BYTES = 16
HASH_CHUNK = 512


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs (B, …), float32 or int64 (tokens), for the network; labels (B, …) int64, or targets (B, D) float32.

    Attributes:
        further: inputs after the first, of a network that takes several.
    """

    inputs: Tensor
    labels: Tensor | None
    targets: Tensor | None = None
    further: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All inputs, in the order of the call."""
        return (self.inputs, *self.further)


class DataSource(ABC):
    """Samples with or without labels, addressed by number, read a batch at a time.

    Attributes:
        name: the spec it was opened from; it appears in messages.
        preprocessing: applied to images; None only scales them to [0, 1].
        labels: (N,) int64, or (N, …) of masks, tokens or several yes and no; or None.
        class_names: names of the classes where the source knows them.
        targets: (N, D) float32, real numbers to fit, in place of labels; or None.
        names: of the inputs, where they were given by name; or None.
    """

    names: tuple[str, ...] | None = None

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing | None,
        labels: np.ndarray | None,
        class_names: Sequence[str] | None = None,
        targets: np.ndarray | None = None,
    ) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.labels = labels
        self.class_names = None if class_names is None else tuple(class_names)
        self.targets = targets

    def in_order(self, names: Sequence[str]) -> DataSource:
        """The same samples with the named inputs in this order. Raises ValueError where these are not their names."""
        raise ValueError(f"the inputs have no names, {', '.join(names)} were expected")

    @property
    @abstractmethod
    def sample_count(self) -> int:
        """N."""

    @abstractmethod
    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Inputs (B, …), float32 or int64, of the samples with these numbers (B,). Raises DataError."""

    def read_further(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """Inputs after the first, of a network that takes several; none unless a source says otherwise."""
        return ()

    @abstractmethod
    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """Raw content of these samples, before any preprocessing. Raises DataError."""

    @property
    def reads_images(self) -> bool:
        """Whether samples are images, which the preprocessing is applied to, and not numbers fed as they are."""
        return False

    @property
    def has_labels(self) -> bool:
        """Whether every sample has a label."""
        return self.labels is not None

    @cached_property
    def label_values(self) -> np.ndarray:
        """The distinct labels, ascending; empty without any."""
        return np.empty(0, np.int64) if self.labels is None else np.unique(self.labels)

    def check_labels(self, outputs: int) -> None:
        """Refuse labels that a network with `outputs` outputs cannot predict. Raises DataError."""
        if self.labels is None:
            return
        if self.labels.ndim > 1:
            raise DataError(f"{self.name}: one label a sample was expected, got labels of shape {self.labels.shape}.")
        wrong = (self.labels < 0) | (self.labels >= outputs)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"{self.name}: {int(wrong.sum())} of {len(self.labels)} labels are out of range for {outputs} classes; "
                f"sample {first} has label {int(self.labels[first])}."
            )

    def batches(self, batch_size: int, indices: Tensor | Sequence[int] | None = None) -> Iterator[Batch]:
        """Batches in order, of all samples or of those numbered in `indices` (n,); the last may be smaller.

        Raises:
            ValueError: a batch size below 1, an index out of range.
            DataError: a sample cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        numbers = None if indices is None else np.asarray(indices, dtype=np.int64)
        if numbers is not None and len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.sample_count:
            raise ValueError(f"`indices` must lie in 0…{self.sample_count - 1}.")
        count = self.sample_count if numbers is None else len(numbers)
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            chosen = np.arange(start, stop) if numbers is None else numbers[start:stop]
            labels = None if self.labels is None else torch.from_numpy(self.labels[chosen].astype(np.int64))
            targets = None if self.targets is None else torch.from_numpy(self.targets[chosen])
            yield Batch(self.read_inputs(chosen), labels, targets, self.read_further(chosen))

    @property
    def hashed_at_once(self) -> int:
        """Samples whose content is read at once for their digests."""
        return HASH_CHUNK

    def sample_hashes(self) -> Iterator[bytes]:
        """A 16-byte BLAKE2b digest of every sample's raw content, in order. Raises DataError."""
        for start in range(0, self.sample_count, self.hashed_at_once):
            for content in self.read_bytes(np.arange(start, min(start + self.hashed_at_once, self.sample_count))):
                yield hashlib.blake2b(content, digest_size=HASH_BYTES).digest()

    @cached_property
    def hashes(self) -> frozenset[bytes]:
        """The distinct sample hashes; computed once, 16 bytes a sample."""
        return frozenset(self.ordered_hashes)

    @cached_property
    def ordered_hashes(self) -> tuple[bytes, ...]:
        """The sample hashes in order; computed once."""
        return tuple(self.sample_hashes())

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of all samples and labels, in order: equal exactly when the content is equal."""
        digest = hashlib.blake2b(digest_size=HASH_BYTES)
        for sample_hash in self.ordered_hashes:
            digest.update(sample_hash)
        if self.labels is not None:
            digest.update(b"labels")
            digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        if self.targets is not None:
            digest.update(b"targets")
            digest.update(np.ascontiguousarray(self.targets, dtype="<f4").data)
        return digest.hexdigest()


class Subset(DataSource):
    """Some samples of another source, by number (n,), in that order."""

    def __init__(self, source: DataSource, numbers: np.ndarray) -> None:
        labels = None if source.labels is None else source.labels[numbers]
        targets = None if source.targets is None else source.targets[numbers]
        super().__init__(source.name, source.preprocessing, labels, source.class_names, targets)
        self.source = source
        self.numbers = numbers

    @property
    def sample_count(self) -> int:
        """n."""
        return len(self.numbers)

    @property
    def reads_images(self) -> bool:
        """Whether the source's samples are images."""
        return self.source.reads_images

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Inputs of the source's samples."""
        return self.source.read_inputs(self.numbers[numbers])

    def read_further(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """Further inputs of the source's samples."""
        return self.source.read_further(self.numbers[numbers])

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """Content of the source's samples."""
        return self.source.read_bytes(self.numbers[numbers])


class Cast(DataSource):
    """The samples of another source with inputs of one dtype."""

    def __init__(self, source: DataSource, dtype: torch.dtype) -> None:
        super().__init__(source.name, source.preprocessing, source.labels, source.class_names, source.targets)
        self.source = source
        self.dtype = dtype

    @property
    def sample_count(self) -> int:
        """N."""
        return self.source.sample_count

    @property
    def reads_images(self) -> bool:
        """Whether the source's samples are images."""
        return self.source.reads_images

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Inputs of the source's samples in the dtype."""
        return self.source.read_inputs(numbers).to(self.dtype)

    def read_further(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """Further inputs, those of real numbers in the dtype where it is one of real numbers."""
        real = self.dtype.is_floating_point
        return tuple(
            further.to(self.dtype) if real and further.is_floating_point() else further
            for further in self.source.read_further(numbers)
        )

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """Content of the source's samples."""
        return self.source.read_bytes(numbers)

    @cached_property
    def ordered_hashes(self) -> tuple[bytes, ...]:
        """The source's own, which may be known already."""
        return self.source.ordered_hashes


def overlap(first: DataSource, second: DataSource) -> int:
    """How many samples of `second` are, byte for byte, also in `first`. Labels and preprocessing do not count."""
    return sum(sample_hash in first.hashes for sample_hash in second.ordered_hashes)


def draw_indices(count: int, limit: int | None, seed: int) -> Tensor:
    """At most `limit` distinct numbers below `count`, a seeded draw, in increasing order."""
    if limit is None or limit >= count:
        return torch.arange(count)
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def split_held_back(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers below `count` in two disjoint, increasing sets: to fit on, and the held-back `fraction` to check on.

    Raises:
        ValueError: a fraction outside (0, 1), or so few samples that one set would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` must lie between 0 and 1, got {fraction}.")
    held = max(1, round(count * fraction))
    if held >= count:
        raise ValueError(f"{count} samples cannot be split with a fraction of {fraction} held back.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values

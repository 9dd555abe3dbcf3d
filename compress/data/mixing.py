"""Several sources as one: the samples of a first one, and behind them those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from compress.data.source import DataSource
from compress.errors import DataError


class Mixed(DataSource):
    """The samples of several sources, one after another; labelled where all of them are.

    Attributes:
        sources: whose samples have one shape.
        starts: (n + 1,) number of each source's first sample.
    """

    def __init__(self, sources: Sequence[DataSource]) -> None:
        first = sources[0]
        labels = stack([source.labels for source in sources])
        targets = None if labels is not None else stack([source.targets for source in sources])
        super().__init__(first.name, first.preprocessing, labels, first.class_names, targets)
        self.sources = tuple(sources)
        self.starts = np.cumsum([0, *(source.sample_count for source in sources)])

    @property
    def sample_count(self) -> int:
        """Of all sources."""
        return int(self.starts[-1])

    @property
    def reads_images(self) -> bool:
        """Whether the first source's samples are images."""
        return self.sources[0].reads_images

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Inputs of the samples, in the order of the numbers. Raises DataError where shapes differ."""
        return self._gather(numbers, lambda source, local: (source.read_inputs(local),))[0]

    def read_further(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """Further inputs of the samples."""
        return self._gather(numbers, lambda source, local: source.read_further(local))

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """Content of the samples."""
        contents: dict[int, bytes | memoryview] = {}
        for source, places, local in self._parts(numbers):
            contents.update(zip(places.tolist(), source.read_bytes(local), strict=True))
        return [contents[place] for place in range(len(numbers))]

    def _parts(self, numbers: np.ndarray) -> list[tuple[DataSource, np.ndarray, np.ndarray]]:
        """For each source that is asked: it, places among `numbers`, its own sample numbers."""
        which = np.searchsorted(self.starts, numbers, side="right") - 1
        parts = []
        for place in np.unique(which):
            places = np.flatnonzero(which == place)
            parts.append((self.sources[place], places, numbers[places] - self.starts[place]))
        return parts

    def _gather(
        self, numbers: np.ndarray, read: Callable[[DataSource, np.ndarray], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        parts = self._parts(numbers)
        order = torch.from_numpy(np.argsort(np.concatenate([places for _, places, _ in parts])))
        pieces = [read(source, local) for source, _, local in parts]
        shapes = {tuple(part.shape[1:]) for piece in pieces for part in piece[:1]}
        if len(shapes) > 1:
            raise DataError(f"{self.name}: samples of shapes {sorted(shapes)} cannot be mixed; resize or crop them.")
        return tuple(torch.cat(same)[order] for same in zip(*pieces, strict=True))


def stack(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The arrays one behind another; None where one is missing or of another shape."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.shape[1:] for part in known}) != 1:
        return None
    return np.concatenate(known)

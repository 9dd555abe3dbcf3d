"""Batches cut along their samples, so that a layer of tens of thousands of columns never has all its rows in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from compress.recording.readings import Reading, output_extent
from compress.units.groups import Consumer

PIECE = 2**25  # numbers of rows that are held at once


@dataclass(frozen=True, eq=False)
class Piece:
    """Some samples of a batch at one place of a reading.

    Attributes:
        values: of nodes, in the original and the current network.
        index: output positions that are read; None: all.
        rows: what the original network gave there; None where it is not known.
    """

    values: Mapping[str, tuple[Tensor, Tensor]]
    index: Tensor | None
    rows: list[Tensor] | None

    @property
    def originals(self) -> dict[str, Tensor]:
        """The values in the original network."""
        return {name: pair[0] for name, pair in self.values.items()}


def cut_batch(
    reading: Reading,
    site: Consumer,
    values: Mapping[str, tuple[Tensor, Tensor]],
    index: Tensor | None,
    rows: list[Tensor] | None = None,
) -> Iterator[Piece]:
    """A batch in pieces whose rows of all input channels (n, I·taps) are at most `PIECE` numbers, or one sample's."""
    inputs = values[site.input][1]
    samples = size = len(inputs)
    positions = 1
    if reading.kernel:
        positions = index.shape[1] if index is not None else math.prod(output_extent(reading, site, inputs.shape))
        size = max(1, PIECE // max(1, positions * inputs.shape[1] * math.prod(reading.kernel)))
    if size >= samples:
        yield Piece(values, index, rows)
        return
    for first in range(0, samples, size):
        part = slice(first, first + size)
        sliced = {
            name: (pair[0][part], pair[1][part]) if pair[0].shape[:1] == (samples,) else pair
            for name, pair in values.items()
        }
        given = None if rows is None else [each[first * positions : (first + size) * positions] for each in rows]
        yield Piece(sliced, None if index is None else index[part], given)

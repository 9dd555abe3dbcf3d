"""Samples whose numbers are nothing like the others': a sensor's overflow, a unit mistaken, a missing value.

A least-squares fit to samples of which one outweighs all others together is a fit to that one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.data.source import DataSource

OUTWEIGH = 100.0  # a sample's energy over that of all smaller ones together, from which it is an extreme one
FEW = 0.1  # of the samples, that extremes are at most
SHOWN = 5


@dataclass(frozen=True)
class Extremes:
    """Samples that stand out among those that were looked at.

    Attributes:
        numbers: of the samples whose numbers outweigh those of all others, ascending.
        largest: magnitude among these; `usual`: the largest among the others.
        unknown: numbers of the samples that hold NaN or Inf, ascending.
    """

    numbers: tuple[int, ...] = ()
    largest: float = 0.0
    usual: float = 0.0
    unknown: tuple[int, ...] = ()

    def __str__(self) -> str:
        which = f"sample {self.numbers[0]} is" if len(self.numbers) == 1 else f"samples {listed(self.numbers)} are"
        return (
            f"calibration {which} left out: numbers up to {self.largest:.3g} outweigh those of all others, which reach "
            f"{self.usual:.3g}."
        )


def find_extremes(source: DataSource, numbers: Tensor, batch_size: int) -> Extremes:
    """The extremes among the samples with these numbers (N,). Images and tokens have none. Raises DataError."""
    if source.reads_images:
        return Extremes()
    energies, magnitudes = [], []
    for batch in source.batches(batch_size, numbers):
        parts = [part.reshape(len(part), -1) for part in batch.tensors if part.is_floating_point() and part[0].numel()]
        if not parts:
            return Extremes()
        norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts]
        energies.append(torch.stack(norms).square().sum(0).cpu())
        magnitudes.append(torch.stack([part.abs().amax(1).double() for part in parts]).amax(0).cpu())
    energy, magnitude = torch.cat(energies), torch.cat(magnitudes)
    known = magnitude.isfinite()
    unknown = tuple(sorted(numbers[~known].tolist()))
    numbers, energy, magnitude = numbers[known], energy[known], magnitude[known]
    order = energy.argsort(stable=True)
    before = energy[order].cumsum(0)[:-1]
    jumps = (energy[order][1:] > OUTWEIGH * before) & (before > 0)
    first = int(len(order) * (1 - FEW))  # all but the largest few count as usual
    places = (jumps[first:].nonzero().flatten() + first + 1).tolist()
    if not places:
        return Extremes(unknown=unknown)
    extreme, usual = order[places[0] :], order[: places[0]]
    return Extremes(
        tuple(sorted(numbers[extreme].tolist())),
        float(magnitude[extreme].max()),
        float(magnitude[usual].max()),
        unknown,
    )


def without(order: Tensor, numbers: Iterable[int]) -> Tensor:
    """The sample numbers (N,) that are not among `numbers`, in their order."""
    return order[~torch.isin(order, torch.tensor(list(numbers), dtype=order.dtype))]


def listed(numbers: tuple[int, ...]) -> str:
    """The first few numbers, and how many more there are."""
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return shown if len(numbers) <= SHOWN else f"{shown} and {len(numbers) - SHOWN} more"

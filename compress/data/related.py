"""Samples that belong together: crops of one picture, frames of one film, overlapping windows of one recording.

Were some of them fitted to and others held back, held-back samples would say little of new ones: what was fitted to
noise looks good on them. Nobody says which samples belong together, so samples are described without any network, by
what a shift does not change: means of random filters' answers, or the tokens that occur. Once whitened, descriptions of
unrelated samples are nearly orthogonal. Two are taken to belong together where they are alike and also clearly more so
than either is to its further neighbours: data that are merely dense, as handwritten digits are, have no such gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compress.data.source import DataSource

FEWEST = 96  # samples, below which likeness cannot be told from chance
LOOKED = 2048  # samples that are looked at before all are read
RUNS = 8  # of neighbours in the source, that these consist of
NEIGHBOURS = 8  # the last of which, in order of likeness, is what a sample is like by chance
ALIKE = 0.4  # cosine of two descriptions, at least
GAP = 0.6  # squared distance to the nearest neighbour over that to the last one, at most
LINK = 0.75  # the same for two samples that are kept together, once it is known that there are such
REACH = 3  # numbers that two samples lie apart in the source, at most, to be neighbours there
SURE = 2.5  # standard deviations of chance, that two such are alike where most related samples are neighbours
SHARE = 0.4  # of the samples that must have a related one for these to count
PLACES = 8  # that held-back samples come from where all samples hang together
SHRINKAGE = 0.01  # of the covariance, relative to its mean eigenvalue
FILTERS = 64
FILTER_LENGTH, FILTER_SIDE = 9, 5  # in signals and in images
SIDE = 64  # pixels that the shorter side of an image is brought to, about
CHANNELS = 8  # that more of them are brought to
TOKENS = 4096  # in one sample, above which whole numbers are taken for quantities
PLAIN = 256  # numbers, up to which a sample that is no image or signal is described by themselves
SUMS = 64  # that a long vector is described by, beside what it is as a signal
BLOCK = 2**25  # cosines held at a time


def hold_back(source: DataSource, order: Tensor, count: int, batch_size: int) -> tuple[Tensor, Tensor, int]:
    """Samples to fit to and `count` to hold back, related ones on the same side.

    Args:
        order: sample numbers (N,) in a random order, of which the first are held back where hardly any are related.
        batch_size: samples that are read at a time.

    Returns:
        Sample numbers (N − count,), sample numbers (count,), and how many of the N have a related one: 0 where these
        are too few to matter or cannot be told.

    Raises:
        DataError: a sample cannot be read.
    """
    looked = runs_of(order) if len(order) > LOOKED else order
    near = find_neighbours(source, looked, batch_size)
    if near is not None and near.share >= SHARE and len(looked) < len(order):
        near = find_neighbours(source, order, batch_size)
    if near is None or near.share < SHARE:
        return order[count:], order[:count], 0
    held = torch.zeros(len(order), dtype=torch.bool)
    held[torch.tensor(held_together(near.links(), count))] = True
    return order[~held], order[held], int(near.related.sum())


def runs_of(order: Tensor) -> Tensor:
    """At most `LOOKED` of the numbers in `order` (N,): runs of neighbours in the source, from `RUNS` places."""
    numbers, length = order.sort().values, LOOKED // RUNS
    starts = torch.linspace(0, len(numbers) - length, RUNS).round().long()
    return numbers[(starts[:, None] + torch.arange(length)).flatten().unique()]  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The samples that each of N is most like.

    Attributes:
        places: (N, `NEIGHBOURS`) of them among the N, the most alike first; `cosines`: of the descriptions.
        chance: a cosine that no two unrelated samples are likely to reach.
        numbers: (N,) of the samples in their source.
        beside: (M, 2) places of samples that are neighbours in the source and more alike than most two are.
    """

    places: Tensor
    cosines: Tensor
    chance: float
    numbers: Tensor
    beside: Tensor

    @property
    def related(self) -> Tensor:
        """(N,) whether there is a sample that belongs to it."""
        nearest, last = self.cosines[:, 0], self.cosines[:, -1]
        return (nearest > max(ALIKE, self.chance)) & (1 - nearest < GAP * (1 - last))

    @property
    def share(self) -> float:
        """Of the samples that have a related one."""
        return float(self.related.double().mean())

    @property
    def in_order(self) -> bool:
        """Whether most related samples follow one another in the source."""
        apart = (self.numbers - self.numbers[self.places[:, 0]])[self.related].abs()
        return bool((apart <= REACH).double().mean() > 0.5)

    def links(self) -> list[set[int]]:
        """For each sample those that it is kept together with."""
        rows, columns = (1 - self.cosines < LINK * (1 - self.cosines[:, -1:])).nonzero().T
        pairs = torch.stack([rows, self.places[rows, columns]], 1)
        links: list[set[int]] = [set() for _ in self.numbers]
        for first, second in (torch.cat([pairs, self.beside]) if self.in_order else pairs).tolist():
            links[first].add(second)
            links[second].add(first)
        return links


def held_together(links: Sequence[set[int]], count: int) -> list[int]:
    """`count` samples: the first and those that hang together with it, then the next one, and so on.

    Where more hang together than a part of `count`, a place's nearest ones alone; few are not torn apart for it.
    """
    held: dict[int, None] = {}  # a set in order
    most = max(math.ceil(count / PLACES), min(NEIGHBOURS, count // 2), 1)
    for start in range(len(links)):
        together = [] if start in held else [start]
        for place in together:  # grows meanwhile
            together += sorted(links[place] - held.keys() - set(together))
            if len(together) >= most:
                break
        held.update(dict.fromkeys(together[: min(most, count - len(held))]))
        if len(held) == count:
            break
    return list(held)


def find_neighbours(source: DataSource, numbers: Tensor, batch_size: int) -> Neighbours | None:
    """Whom each of the samples (N,) is most like; None where that cannot be told."""
    if len(numbers) < FEWEST:
        return None
    parts = [describe(batch.inputs.cpu()) for batch in source.batches(batch_size, numbers)]
    if len({part.shape[1] for part in parts}) > 1:
        return None
    rows, directions = whitened(torch.cat(parts))
    chance = math.sqrt(4 * math.log(len(rows)) / directions) if directions else math.inf
    if chance >= 1:
        return None
    found = []
    for first in range(0, len(rows), max(1, BLOCK // len(rows))):
        cosines = rows[first : first + max(1, BLOCK // len(rows))] @ rows.T
        own = torch.arange(len(cosines))
        cosines[own, first + own] = -1.0
        found.append(cosines.topk(NEIGHBOURS, 1))
    places, cosines = (torch.cat([getattr(top, name) for top in found]) for name in ("indices", "values"))
    return Neighbours(places, cosines, chance, numbers, beside(rows, numbers, SURE / math.sqrt(directions)))


def beside(rows: Tensor, numbers: Tensor, least: float) -> Tensor:
    """Pairs (M, 2) of rows (N, D) whose samples' numbers (N,) are at most `REACH` apart, of a cosine above `least`."""
    order = numbers.argsort()
    pairs = torch.cat([torch.stack([order[:-apart], order[apart:]], 1) for apart in range(1, REACH + 1)])
    first, second = pairs.T
    alike = (rows[first] * rows[second]).sum(1) > least
    return pairs[alike & (numbers[second] - numbers[first] <= REACH)]


def describe(inputs: Tensor) -> Tensor:
    """Descriptions (B, F) of inputs: tokens (B, …), images and films (B, …, H, W), signals (B, C, T) or (B, T).

    Single numbers (B,) are a signal of one step.
    """
    inputs = inputs.reshape(len(inputs), -1) if inputs.ndim == 1 else inputs
    if not inputs.is_floating_point() and inputs[0].numel() <= TOKENS:
        return describe_tokens(inputs.flatten(1))
    inputs = inputs.float().nan_to_num(posinf=0.0, neginf=0.0)
    numbers = inputs.flatten(1)
    if inputs.ndim >= 4 and min(inputs.shape[-2:]) > 2 * FILTER_SIDE:
        return describe_signals(inputs.flatten(1, -3))
    if inputs.ndim == 3 and inputs.shape[2] > 2 * FILTER_LENGTH:
        return describe_signals(inputs)
    if inputs.ndim == 2 and numbers.shape[1] > PLAIN:
        return torch.cat([sums_of(numbers, SUMS), describe_signals(inputs[:, None])], 1)
    return numbers if numbers.shape[1] <= PLAIN else sums_of(numbers, PLAIN)


def describe_signals(values: Tensor) -> Tensor:
    """Of channels over one or two dimensions (B, C, …): means and spreads, and means of random filters' answers."""
    axes = tuple(range(2, values.ndim))
    plane = len(axes) == 2
    convolve, pool = (functional.conv2d, functional.avg_pool2d) if plane else (functional.conv1d, functional.avg_pool1d)
    if values.shape[1] > CHANNELS:
        values = torch.einsum("bc...,cd->bd...", values, drawn(values.shape[1], CHANNELS))
    if plane and min(values.shape[2:]) // SIDE > 1:
        values = pool(values, min(values.shape[2:]) // SIDE)
    filters = drawn(FILTERS, values.shape[1], *((FILTER_SIDE,) * 2 if plane else (FILTER_LENGTH,)))
    filters = filters - filters.mean(axes, keepdim=True)
    parts = [values.mean(axes), values.std(axes, unbiased=False)]
    for signal, stride in ((values, 2), (pool(values, 2), 1)):
        answers = convolve(signal, filters, stride=stride)
        parts += [answers.relu().mean(axes), answers.square().mean(axes).add(1e-12).log()]
    return torch.cat(parts, 1)


def describe_tokens(tokens: Tensor) -> Tensor:
    """Of whole numbers (B, T): sums over numbers that look random and depend on the token alone."""
    generator = torch.Generator().manual_seed(0)
    pitch, phase = (1e4 * torch.rand(2 * FILTERS, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.stack([torch.cos(row.double()[:, None] * pitch + phase).sum(0) for row in tokens]).float()


def sums_of(numbers: Tensor, count: int) -> Tensor:
    """Rows (B, n) as `count` random sums of their numbers."""
    return numbers @ drawn(numbers.shape[1], count)


def drawn(*shape: int) -> Tensor:
    """The same random numbers at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def whitened(descriptions: Tensor) -> tuple[Tensor, float]:
    """Descriptions (N, D) of unit length without what most samples share, and how many directions tell them apart.

    No more directions are kept than half as many as there are samples.
    """
    rows = descriptions.double().nan_to_num(posinf=0.0, neginf=0.0)
    spread = rows.std(0, unbiased=False)
    told = spread > 1e-9 * spread.max()
    if not bool(told.any()):
        return descriptions, 0.0
    rows = ((rows - rows.mean(0)) / spread)[:, told]
    energies, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = min(len(energies), len(rows) // 2)
    energies, axes = energies[-kept:].clamp_min(0), axes[:, -kept:]
    floor = SHRINKAGE * energies.mean()
    directions = float((energies / (energies + floor)).sum())
    rows = (rows @ axes * (energies + floor).rsqrt()).float()
    return functional.normalize(rows, dim=1), directions

"""Where a consumer's output is added to something else: what it should give so that the *sum* is the original's.

Behind a residual connection the compressed network's shortcut already carries the errors of earlier layers. The
consumer that is refitted may take them back: its target is the original sum less the shortcut as it is now (He, Zhang
and Sun 2017), divided by the per-channel factors (batch norm, layer scale) between the consumer and the addition.
Behind a ReLU an error counts only where it comes through; a second refit may take that into account.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.graph.meaning import meaning_of_step
from compress.graph.ops import BatchNorm, Identity, Layout, Meaning, Product, Rearrangement, Rectification, Sum
from compress.graph.program import Program
from compress.graph.steps import Read
from compress.recording.positions import rows_at
from compress.units.groups import Consumer

WHOLE = slice(None)
SMALLEST_FACTOR = 1e-2  # relative to the largest channel's; a channel below takes no correction


@dataclass(frozen=True)
class Residual:
    """An addition behind a consumer.

    Attributes:
        other: name of the node whose value is added.
        factors: (state name of the scale or None, state name of the variance or None, eps) of each affine map between.
        order: permutation of the dimensions between the consumer's output and the sum; () for none.
    """

    other: str
    factors: tuple[tuple[str | None, str | None, float], ...] = ()
    order: tuple[int, ...] = ()

    def factor(self, state: Mapping[str, Tensor]) -> Tensor:
        """What a change of the consumer's output is multiplied by on its way to the sum (D,), float64; some factor."""
        device = next(iter(state.values())).device
        product = torch.ones((), dtype=torch.float64, device=device)
        for scale, variance, eps in self.factors:
            if scale is not None:
                product = product * state[scale].double().flatten()
            if variance is not None:
                product = product / (state[variance].double() + eps).sqrt()
        return product

    def correction(
        self,
        wanted: Tensor,
        now: Tensor,
        state: Mapping[str, Tensor],
        index: Tensor | None,
        *,
        linear: bool,
        part: slice = WHOLE,
    ) -> Tensor:
        """What must be added to the consumer's outputs (n, d) to make up for another shortcut.

        Args:
            wanted: `rows` (n, d) of the shortcut in the original network.
            now: the shortcut in the current one.
            index: output positions (B, P) that are read of a convolution; None for all.
            part: which d of the D channels.
        """
        rows = wanted.double() - self.rows(now, index, linear=linear, part=part).double()
        return self.undone(rows, state, part)

    def rows(self, value: Tensor, index: Tensor | None, *, linear: bool, part: slice = WHOLE) -> Tensor:
        """The sum's values (n, d) at the consumer's output positions `index` (None: all), in their own precision."""
        if self.order:
            value = value.permute(sorted(range(len(self.order)), key=self.order.__getitem__))
        if linear:
            return value.reshape(-1, value.shape[-1])[:, part]
        whole = part.start in (None, 0) and part.stop in (None, value.shape[1])
        return rows_at(value if whole else value[:, part], index)

    def undone(self, rows: Tensor, state: Mapping[str, Tensor], part: slice = WHOLE) -> Tensor:
        """Changes of the sum (n, d) as changes of the consumer's outputs; 0 where a factor is tiny."""
        if not self.factors:
            return rows
        factor = self.factor(state)
        usable = (factor.abs() > SMALLEST_FACTOR * factor.abs().max())[part]
        return torch.where(usable, rows / torch.where(usable, factor[part], 1.0), 0.0)


def find_residual(program: Program, consumer: Consumer) -> Residual | None:
    """The addition that alone reads the consumer's output, over per-channel maps; None where there is none."""
    for point in follow_output(program, consumer):
        if point.added is not None:
            return Residual(point.added, point.factors, point.order)
    return None


@dataclass(frozen=True)
class Point:
    """One reader on the way behind a consumer.

    Attributes:
        source: node whose value it reads; on the way from the consumer.
        meaning: what it computes; None where no rule says it.
        added: the value that it adds to `source`, where it does.
        factors, order: as of `Residual`, between the consumer and `source`.
    """

    source: str
    meaning: Meaning | None
    added: str | None
    factors: tuple[tuple[str | None, str | None, float], ...]
    order: tuple[int, ...]


def follow_output(program: Program, consumer: Consumer) -> Iterator[Point]:
    """What reads the consumer's output, one behind the other, as long as each value has one reader alone.

    The walk passes per-channel maps (a batch norm, a scale), permutations, identities, and additions of two values of
    one shape; it ends with the first reader that is none of these, which is given too.
    """
    if consumer.layout is Layout.CONVOLUTION_TRANSPOSED:
        return
    shape = program.shape(consumer.node)
    channel = 1 if consumer.layout.spatial else len(shape) - 1
    whole = tuple(range(len(shape)))
    order = whole
    factors: list[tuple[str | None, str | None, float]] = []
    name = consumer.node
    while len(readers := program.readers.get(name, ())) == 1 and name not in program.outputs:
        step = readers[0]
        meaning = meaning_of_step(program, step.name)
        read = [part.name if isinstance(part, Read) else None for part in step.args]
        other = read[1 - read.index(name)] if len(read) == 2 and read.count(name) == 1 else None
        plain = isinstance(meaning, Sum) and meaning.factor == 1
        added = other if plain and other is not None and _adds(program, other, name) else None
        point = Point(name, meaning, added, tuple(factors), () if order == whole else order)
        first = bool(read) and read[0] == name
        if isinstance(meaning, Identity):
            pass
        elif isinstance(meaning, Rearrangement) and meaning.order is not None and first:
            order = tuple(order[dim] for dim in meaning.order)
        elif isinstance(meaning, BatchNorm) and first and order.index(channel) == 1:
            if meaning.variance is None:
                return
            factors.append((meaning.scale, meaning.variance, meaning.eps))
        elif isinstance(meaning, Product) and other is not None and program.tensor(other) is not None:
            extent = program.shape(other)
            wanted = [1] * len(shape)
            wanted[order.index(channel)] = shape[channel]
            if list(extent) != wanted[len(wanted) - len(extent) :] or math.prod(extent) != shape[channel]:
                return
            factors.append((program.tensor(other), None, 0.0))
        elif added is not None:
            yield point
        else:
            yield point
            return
        name = step.name


@dataclass(frozen=True)
class Rectifier:
    """A ReLU, or one with a ceiling, behind a consumer: errors of its input matter only where they come through.

    Attributes:
        source: node whose value it rectifies.
        path: factors and order between the consumer and `source`, additions passed.
        low, high: what it cuts off below and above.
    """

    source: str
    path: Residual
    low: float = 0.0
    high: float = math.inf

    def correction(
        self,
        wanted: Tensor,
        now: Tensor,
        state: Mapping[str, Tensor],
        index: Tensor | None,
        *,
        linear: bool,
        part: slice = WHOLE,
    ) -> Tensor:
        """What must be added to the consumer's outputs (n, d) so that the rectified values become the original's.

        The least change: nothing where both are cut off, up to the bound where only the original is (Zhang, Zou, He and
        Sun 2015 alternate this step with least squares).

        Args:
            wanted: rows (n, d) of the rectifier's input in the original network, as `path.rows` gives them.
            now: the rectifier's input in the current one; the others as for `Residual.correction`.
        """
        current = self.path.rows(now, index, linear=linear, part=part)
        nearest = torch.where(wanted >= self.high, current.clamp_min(self.high), wanted)
        nearest = torch.where(wanted <= self.low, current.clamp_max(self.low), nearest)
        return self.path.undone((nearest - current).double(), state, part)


def find_rectifier(program: Program, consumer: Consumer) -> Rectifier | None:
    """The ReLU that alone reads the consumer's output, over per-channel maps and additions; None without one."""
    for point in follow_output(program, consumer):
        if isinstance(point.meaning, Rectification):
            path = Residual(point.source, point.factors, point.order)
            return Rectifier(point.source, path, point.meaning.low, point.meaning.high)
    return None


def _adds(program: Program, other: str, name: str) -> bool:
    """Whether the other value is computed and of the same shape, as in a residual connection."""
    return other not in program.leaves and program.shape(other) == program.shape(name)

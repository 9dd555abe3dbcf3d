"""What a group of units is: the values that find_units gives and that surgery and recording read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from compress.graph.ops import NO_WINDOW, BatchNorm, Layout, Normalisation, Window


class SkipKind(Enum):
    """Why a group of units is left whole."""

    PINNED = "the network needs every unit"
    SINGLE = "it has a single unit"
    UNREAD = "no weight of the network reads it"
    STREAM = "residual stream shared by several producers; use --couple"
    BAKED = "a size in forward() is fixed in Python and no attribute changes it"
    COUNTED = "what forward() computes would change with their number, as where it multiplies by a size"
    TAKEN = "its weights are cut as part of another group"


@dataclass(frozen=True)
class Skip:
    """That a group cannot be cut: the kind of reason, and the sentence that tells it."""

    kind: SkipKind
    message: str

    @classmethod
    def of(cls, kind: SkipKind, message: str | None = None) -> Skip:
        """A reason in the kind's own words, or in `message`."""
        return cls(kind, message or kind.value)


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """Positions (K, m) along dimension `dim` of the tensor `name` (state-dict name) that belong to units 0…K−1."""

    name: str
    dim: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear map that reads the units: its weight's columns at `positions` are their output weights V.

    Attributes:
        node: name of the graph's node; `input`: name of the node that carries its input activations.
        weight, bias: state-dict names; `bias` is None when it has none. `shift`: running mean of the batch norm that
            alone follows a consumer without bias, so that a constant c can be added there as running_mean − c.
        layout: how its weight lies.
        positions: (K, m) positions of unit k among the input channels. Columns run over unit, position, tap.
        taps: kernel taps, 1 for linear maps. A unit owns m·taps columns.
        window: of a convolution; `groups`: its blocks.
        shifted: whether a bias is added that forward() computes, and no tensor holds.
    """

    node: str
    weight: str
    bias: str | None
    layout: Layout
    positions: Tensor
    taps: int
    input: str
    shift: str | None = None
    window: Window = NO_WINDOW
    groups: int = 1
    shifted: bool = False


@dataclass(frozen=True)
class AttributeRule:
    """A number that forward() reads: it falls by `per_unit` for each unit removed. `index` points into a tuple."""

    module: str
    name: str
    per_unit: int
    index: int | None = None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True, eq=False)
class StatisticSlice:
    """Positions (K, m) along `dim` of the first argument of a mean, or of a normalisation, that runs over the units."""

    node: str
    dim: int
    size: int
    positions: Tensor
    normalisation: Normalisation | None


@dataclass(frozen=True, eq=False)
class ReadUnits:
    """K units as seen by the linear maps that read them: what moments are recorded of.

    Attributes:
        name: where they are made, for people.
        unit_count: K.
        consumers: the linear maps that read the units; unit k is `positions[k]` of a map's input channels.
    """

    name: str
    unit_count: int
    consumers: tuple[Consumer, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class UnitGroup(ReadUnits):
    """K units that are removed one by one, each with everything that belongs to it.

    For `Conv2d(3, 8, 3) -> BatchNorm2d(8) -> ReLU -> Conv2d(8, 4, 3)` in an `nn.Sequential` the group "0" has K = 8
    units: unit k is position k of dimension 0 of `0.weight`, `0.bias` and the four tensors of the BatchNorm, and of
    dimension 1 of `3.weight`, whose node is the only consumer and reads 3·3 = 9 taps of every unit. Keeping units 0, 2
    and 5 makes the first convolution (3, 3, 3, 3) and the second (4, 3, 3, 3).

    Attributes:
        name: module of the first producer; unique in the network. `producers`: modules of all of them.
        slices: everything that shrinks.
        attributes: numbers that change with the units kept.
        statistics: normalisations over the units. The masked original computes them over the kept units only; where
            there are none, it differs from the original by the consumers' columns alone.
        activation: names of the activations between producers and consumers, None when there are none.
        homogeneous: whether scaling a unit's producers by γ > 0 scales all that its consumers read by γ.
        coupled: whether several layers add into the units (a residual stream).
        blocks: the units are this many equal, contiguous blocks of which each must keep the same number.
        norms: batch normalisations whose statistics shrink with the units.
        skip: None when the group can be cut, else why not.
    """

    producers: tuple[str, ...]
    slices: tuple[ParameterSlice, ...]
    attributes: tuple[AttributeRule, ...] = ()
    statistics: tuple[StatisticSlice, ...] = ()
    activation: str | None = None
    homogeneous: bool = True
    coupled: bool = False
    blocks: int = 1
    norms: tuple[BatchNorm, ...] = ()
    skip: Skip | None = None

    @property
    def prunable(self) -> bool:
        """Whether units can be removed."""
        return self.skip is None

    @property
    def skip_reason(self) -> str | None:
        """Why not, as a sentence; None when the group can be cut."""
        return None if self.skip is None else self.skip.message

    def skipped(self, skip: Skip) -> UnitGroup:
        """The same group, not prunable."""
        return replace(self, skip=skip)

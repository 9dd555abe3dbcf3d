"""Numbers and small tuples that reports are made of, and how any value of them becomes JSON and comes back."""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter

DEEPEST = 32  # levels of nesting of options and arguments


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """The mapping if it is at most `DEEPEST` levels deep. Raises ValueError."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


Count = Annotated[int, Field(ge=0, lt=2**63)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Plain = Annotated[dict[str, Any], AfterValidator(plain)]


def finite(value: float) -> float | None:
    """The value; None where it is infinite or NaN, which JSON cannot hold."""
    return value if math.isfinite(value) else None


AnyValue = TypeVar("AnyValue")


class Counts(NamedTuple):
    """A count of the original and of the compressed network."""

    before: Count
    after: Count

    @property
    def factor(self) -> float:
        """How many times smaller; 1 where nothing is left."""
        return self.before / self.after if self.after else 1.0

    @property
    def kept(self) -> float:
        """The part that is left; 1 where there was nothing."""
        return self.after / self.before if self.before else 1.0


class Measured(NamedTuple):
    """A measure of the original and of the compressed network."""

    before: Real
    after: Real


class Point(NamedTuple):
    """A point of a curve; the value is None where there is no measure."""

    place: Count
    value: Real | None


class Step(NamedTuple):
    """A measure at a step or at a width."""

    step: Count
    value: Real


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}  # built once each


def adapter(kind: type[AnyValue]) -> TypeAdapter[AnyValue]:
    """What reads, checks, writes and describes one kind of value. Raises pydantic's ValidationError on reading."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def plain_data(value: Any) -> dict[str, Any]:
    """A value of this file as JSON knows it."""
    plain: dict[str, Any] = adapter(type(value)).dump_python(value, mode="json")
    return plain

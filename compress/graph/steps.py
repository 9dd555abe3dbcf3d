"""What a program is made of: steps that each compute one value, and the leaves that they start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = Any  # what a node gives: a tensor, a number, or a tuple of these


@dataclass(frozen=True)
class InputLeaf:
    """An input of the network, by its position."""

    position: int


@dataclass(frozen=True)
class TensorLeaf:
    """A parameter or buffer, by its name in the state dict; a tensor with several names goes by its first."""

    name: str


@dataclass(frozen=True)
class ConstantLeaf:
    """A constant of the graph that is in no state dict, by its name in the graph."""

    name: str


Leaf: TypeAlias = InputLeaf | TensorLeaf | ConstantLeaf


@dataclass(frozen=True)
class Read:
    """Stands in a step's arguments for the value of another step or leaf."""

    name: str


@dataclass(frozen=True, eq=False)
class Step:
    """One value to compute.

    Attributes:
        target: a function that changes none of its arguments.
        args, kwargs: its arguments, with `Read` where values come in.
        inputs: names of all values that are read.
    """

    name: str
    target: Callable[..., Value]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[str, ...]


Override: TypeAlias = Callable[[Step, tuple[Any, ...], dict[str, Any]], Value]

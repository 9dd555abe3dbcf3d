"""How a network is called: its tensors in one flat order, and the arguments that they stand in.

Everything behind the door runs networks on a tuple of tensors. A network that takes keywords, dictionaries or nested
tuples is given a subclass of its own class whose forward() takes that tuple and puts each tensor in its place; names,
tensors and modules stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

MOST_LEAVES, MOST_DEPTH = 256, 8  # of a call that a manifest describes


@dataclass(frozen=True)
class CallShape:
    """Where the tensors of a call stand among its arguments.

    For `net({"image": x, "size": 3}, mask=m)` the tensors are (x, m), and 3 is a constant of the call.

    Attributes:
        spec: of (positional arguments, keywords).
        constants: (place, value) of the leaves that are no tensors, among all leaves.
        count: tensors.
    """

    spec: TreeSpec
    constants: tuple[tuple[int, Any], ...]
    count: int

    @classmethod
    def of(cls, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[CallShape, tuple[Tensor, ...]]:
        """The shape of a call and its tensors in order."""
        leaves, spec = tree_flatten((tuple(args), dict(keywords)))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        constants = tuple((place, leaf) for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        return cls(spec, constants, len(tensors)), tensors

    def as_plain(self) -> dict[str, Any] | None:
        """Plain data for JSON, `{"input": 0}` for a tensor; None where a constant or a container is not plain."""
        args, keywords = self.arguments([_Place(number) for number in range(self.count)])
        try:
            return {"arguments": [_plain(argument) for argument in args], "keywords": _plain(keywords)}
        except TypeError:
            return None

    @classmethod
    def from_plain(cls, value: Any) -> CallShape:
        """The shape that `as_plain` described. Raises ValueError where it describes none."""
        if not isinstance(value, dict) or set(value) != {"arguments", "keywords"}:
            raise ValueError("`call` does not say how the network is called")
        if not isinstance(value["arguments"], list) or set(_entry(value["keywords"])) != {"dict"}:
            raise ValueError("`call` does not say how the network is called")
        left = [MOST_LEAVES]
        args = tuple(_rebuilt(argument, 0, left) for argument in value["arguments"])
        keywords = _rebuilt(value["keywords"], 0, left)
        if not all(isinstance(key, str) and key.isidentifier() for key in keywords):
            raise ValueError("`call` has a keyword that is no name")
        leaves, spec = tree_flatten((args, keywords))
        numbers = [leaf.number for leaf in leaves if isinstance(leaf, _Place)]
        if numbers != list(range(len(numbers))) or not numbers:
            raise ValueError("`call` does not number its inputs in their order")
        constants = tuple((place, leaf) for place, leaf in enumerate(leaves) if not isinstance(leaf, _Place))
        return cls(spec, constants, len(numbers))

    def names(self, parameters: Sequence[str] = ()) -> tuple[str, ...]:
        """A name for each tensor: its place in the call, such as `mask` or `batch.image`.

        Args:
            parameters: names of the positional ones.
        """
        args, keywords = self.arguments([_Place(number) for number in range(self.count)])
        named = {parameters[n] if n < len(parameters) else f"input{n}": place for n, place in enumerate(args)}
        paths: dict[int, str] = {}

        def walk(value: Any, path: str) -> None:
            if isinstance(value, _Place):
                paths[value.number] = path
            elif isinstance(value, Mapping):
                for key, part in value.items():
                    walk(part, f"{path}.{key}" if path else str(key))
            elif isinstance(value, (list, tuple)):
                for number, part in enumerate(value):
                    walk(part, f"{path}.{number}")

        walk({**named, **keywords}, "")
        return tuple(paths.get(number, f"input{number}") for number in range(self.count))

    @property
    def is_plain(self) -> bool:
        """Whether the tensors are the positional arguments themselves."""
        args, keywords = self.arguments(range(self.count))
        return not keywords and not self.constants and args == tuple(range(self.count))

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and keywords with these tensors in their places."""
        if len(tensors) != self.count:
            raise ValueError(f"the network takes {self.count} tensors, got {len(tensors)}.")
        left, constants = iter(tensors), dict(self.constants)
        places = self.count + len(constants)
        leaves = [constants[place] if place in constants else next(left) for place in range(places)]
        args, keywords = tree_unflatten(leaves, self.spec)
        return args, keywords


@dataclass(frozen=True)
class _Place:
    """Where tensor `number` stands."""

    number: int


def _plain(value: Any) -> dict[str, Any]:
    """One argument as plain data. Raises TypeError."""
    if isinstance(value, _Place):
        return {"input": value.number}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_plain(part) for part in value]}
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _plain(part)] for key, part in value.items()]}
    raise TypeError(f"{type(value).__name__} is not plain")


def _entry(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("`call` holds something that is no argument")
    return value


def _rebuilt(value: Any, depth: int, left: list[int]) -> Any:
    """What `_plain` described. Raises ValueError."""
    left[0] -= 1
    if depth > MOST_DEPTH or left[0] < 0:
        raise ValueError("`call` is too large")
    ((kind, inner),) = _entry(value).items()
    if kind == "input" and type(inner) is int and 0 <= inner < MOST_LEAVES:
        return _Place(inner)
    if kind == "value" and (inner is None or type(inner) in (bool, int, float, str)):
        return inner
    if kind in ("list", "tuple") and isinstance(inner, list):
        parts = [_rebuilt(part, depth + 1, left) for part in inner]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict" and isinstance(inner, list):
        pairs = [pair for pair in inner if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)]
        if len(pairs) == len(inner):
            return {key: _rebuilt(part, depth + 1, left) for key, part in pairs}
    raise ValueError("`call` holds something that is no argument")


def spread(module: nn.Module, shape: CallShape) -> nn.Module:
    """The module itself, of a subclass of its class whose forward() takes the tensors one after another.

    `gather` undoes it, on the module and on every copy of it.
    """
    if shape.is_plain:
        return module
    kind = type(module)

    def forward(self: nn.Module, *tensors: Tensor) -> Any:
        args, keywords = shape.arguments(tensors)
        return kind.forward(self, *args, **keywords)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "_spread_from": kind, "_call": shape})
    return module


def call_of(module: nn.Module) -> CallShape | None:
    """The shape that a module was spread by; None where it was not."""
    return type(module).__dict__.get("_call")


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """What the forward() of a module takes by name, of the class that it had before `spread`."""
    kind = type(module).__dict__.get("_spread_from")
    forward = module.forward if kind is None else kind.forward.__get__(module)
    return [
        parameter
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]


def gather(module: nn.Module) -> nn.Module:
    """The module itself, of the class that it had before `spread`."""
    kind = type(module).__dict__.get("_spread_from")
    if kind is not None:
        module.__class__ = kind
    return module

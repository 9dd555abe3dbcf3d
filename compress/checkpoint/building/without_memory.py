"""Building a network without its memory: names and shapes only, and no more of them than expected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from compress.errors import UnsupportedError


class WithoutMemory(TorchFunctionMode):
    """Within it, parameters take no memory: new empty, zero, one or random tensors are made on the `meta` device.

    Constants that a constructor computes with (`arange`, `linspace`, `tensor`) stay real, so that RegNet, whose widths
    are computed with tensors, can be built.
    """

    FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand})

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add `device="meta"` to the calls that make parameters."""
        options = dict(kwargs or {})
        if function in self.FACTORIES and options.get("device") is None:
            options["device"] = "meta"
        return function(*args, **options)


@dataclass(frozen=True)
class Bounds:
    """How large a network may be.

    Attributes:
        numbers: in all its parameters and buffers, and in any one tensor that building it computes.
        calls: of torch operations that building it may take.
    """

    numbers: int
    calls: int

    @classmethod
    def of_file(cls, numbers: int, tensors: int) -> Bounds:
        """For the original of a network whose file holds so many numbers in so many tensors.

        A cut takes units and leaves every layer, so that the original has about as many tensors, but any number of
        numbers: 64 times as many, or a gigabyte in float32 where that is more.
        """
        return cls(numbers=max(1 << 28, 64 * numbers), calls=5_000 + 500 * tensors)


NAMED = Bounds(numbers=1 << 40, calls=10_000_000)  # of a network that the user named, with no file to compare with


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it no operation makes a tensor larger than the bounds allow, and there are not too many of them.

    The size of what is not on the meta device is found on it first, so that nothing is taken before it is allowed.
    """

    def __init__(self, bounds: Bounds, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bounds, self.what, self.calls = bounds, what, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own question: nothing is compiled in here, and saying so to its compiler would import that (2 s)."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, measure, then compute."""
        options = dict(kwargs or {})
        self.calls += 1
        if self.calls > self.bounds.calls:
            raise UnsupportedError(f"{self.what} is refused: it has far more parts than the file has tensors.")
        tensors = [value for value in tree_iter((args, options)) if isinstance(value, Tensor)]
        if not any(tensor.is_meta for tensor in tensors) and str(options.get("device")) != "meta":
            self.check(sizes(function, args, options))
        return function(*args, **options)

    def check(self, numbers: int) -> None:
        """Refuse a tensor of so many numbers."""
        if numbers > self.bounds.numbers:
            raise UnsupportedError(
                f"{self.what} is refused: building it would take a tensor of {numbers:.1e} numbers, far more than the "
                "file holds."
            )


def sizes(function: Any, args: Any, options: dict[str, Any]) -> int:
    """Numbers that an operation would give, found without memory; 0 where values decide (then its inputs bound it)."""
    args, options = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, options))
    if "device" in options or any(argument.name == "device" for argument in function._schema.arguments):
        options = {**options, "device": torch.device("meta")}
    try:
        outputs = function(*args, **options)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return 0
    return sum(value.numel() for value in tree_iter(outputs) if isinstance(value, Tensor))


@contextmanager
def without_memory(bounds: Bounds, what: str) -> Iterator[None]:
    """Build within it what takes no memory. Raises UnsupportedError, in the middle of building, what is too large."""
    with WithoutMemory(), Bounded(bounds, what):
        yield


def total_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, those with several names once."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())

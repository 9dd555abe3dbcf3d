"""What a user's own function says of a network: called with copies and the same random numbers, its faults in words."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.copying import deep_copy
from compress.data.calls import gather
from compress.data.importing import describe_fault
from compress.errors import CompressError, DataError

Function = Callable[[nn.Module], "float | Mapping[str, float]"]
NOISE = 0.1  # of what may be lost, by which a measure may differ from itself


@dataclass(frozen=True, eq=False)
class OwnMeasure:
    """A function from a network to a number, or to several by name.

    Attributes:
        name: how messages call it.
        higher: whether more of the first number is better.
        dress: makes a copy of a network into what the function is called with.
        answers: whether it is fed labelled samples by us; else it brings its own.
    """

    function: Function
    name: str = "`evaluate`"
    higher: bool = True
    seed: int = 0
    dress: Callable[[nn.Module], nn.Module] = gather
    answers: bool = False

    def of(self, network: nn.Module, which: str) -> dict[str, float]:
        """What it says of a copy of the network, by name; `which` network it is, in words.

        Raises:
            CompressError: it raises, or gives no finite number; the network is untouched.
        """
        copied = self.dress(deep_copy(network)).eval()
        try:
            with torch.no_grad(), same_randomness(self.seed):
                value = self.function(copied)
        except CompressError:
            raise
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"{self.name} raised on {which}: {describe_fault(error)}.") from error
        return self._numbers(value, which)

    def _numbers(self, returned: Any, which: str) -> dict[str, float]:
        named = dict(returned) if isinstance(returned, Mapping) else {"metric": returned}
        numbers: dict[str, float] = {}
        for name, value in named.items():
            try:
                numbers[str(name)] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                kind = type(value).__name__
                raise DataError(
                    f"{self.name} must give a number or a mapping of numbers; `{name}` is {kind}."
                ) from error
            if not math.isfinite(numbers[str(name)]):
                raise DataError(f"{self.name} gives {name} = {value} on {which}.")
        if not numbers:
            raise DataError(f"{self.name} gave an empty mapping; at least one number was expected.")
        return numbers

    def loss(self, before: Mapping[str, float], after: Mapping[str, float]) -> float:
        """By how much the first number is worse. Raises DataError where it is missing."""
        name, first = next(iter(before.items()))
        if name not in after:
            raise DataError(f"{self.name} gave `{name}` for the original network, and not for the compressed one.")
        return first - after[name] if self.higher else after[name] - first

    def of_original(
        self, network: nn.Module, allowed: Callable[[float], float] | None = None
    ) -> tuple[dict[str, float], str | None]:
        """What it says of the original, asked twice, and how the answers differ, in words (None: they do not).

        Args:
            allowed: from its first number, what may be lost of that.

        Raises:
            DataError: it differs from itself by too much for that bound.
        """
        first, second = (self.of(network, "the original network") for _ in range(2))
        if first == second:
            return first, None
        name = next((metric for metric in first if first[metric] != second.get(metric)), next(iter(second)))
        said = (
            f"{self.name} does not repeat itself: {name} = {first.get(name, math.nan):.6g}, then "
            f"{second.get(name, math.nan):.6g} on the same network"
        )
        if allowed is not None:
            most = allowed(next(iter(first.values())))
            if abs(self.loss(first, second)) > NOISE * most:
                raise DataError(
                    f"{said}, too far apart to bound a loss of {most:.3g}; fix its samples and random numbers."
                )
        return first, said


@contextmanager
def same_randomness(seed: int) -> Iterator[None]:
    """The generators of Python, NumPy and torch at a seed; afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""Copies of networks that have run: tensors that forward() left in them, and that torch refuses to copy, included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


def deep_copy(value: T, known: Mapping[int, Any] | None = None) -> T:
    """A deep copy in which a tensor that was computed under autograd is a constant of the same numbers.

    Networks keep such tensors in attributes, in lists (features, attention maps) and in buffers that they update.

    Args:
        known: id of an object -> what stands for it in the copy.
    """
    with _Constants():
        return copy.deepcopy(value, dict(known or {}))


class _Constants(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        constant = memo[id(tensor)] = memo.get(id(tensor), tensor.detach().clone())
        return constant

"""A CUDA device that is not there: tensors that say they lie on it, and faults where torch would find two devices.

The numbers are the CPU's. It sees what no machine without a card would: an index, a mask or a constant that was made on
the CPU and meets a tensor of the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
ATEN = torch.ops.aten
LIBRARY = torch.library.Library("aten", "IMPL")
MIXES = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default,
         ATEN._index_put_impl_.default, ATEN.set_.source_Tensor}  # fmt: skip


DUMMY: Any = getattr(
    backend_registration, "_DummyBackendModule", object
)  # older torch has none: nothing is pretended there


class Backend(DUMMY):  # type: ignore[misc]
    """What torch asks a device's module for."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Random numbers are made on the CPU."""
        return torch.zeros(1, dtype=torch.uint8)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Of autocast."""
        return [torch.bfloat16]

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Nothing to set."""


@cache
def register() -> None:
    """Tell torch of a device without kernels; where the tensors say they lie there, these give the numbers."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
    LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
    LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")


def empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> Tensor:
    """What composed operations make for themselves."""
    return OnDevice(torch.empty(size, dtype=dtype, device="cpu"))


def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    """The same, with strides."""
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """A copy of numbers that composed operations write down."""
    numbers, place = (each.held if isinstance(each, OnDevice) else each for each in (source, target))
    place.copy_(numbers)
    return target


class OnDevice(Tensor):
    """A tensor of the CPU that says it lies on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> OnDevice:
        with torch.inference_mode(False):  # version counters are kept by what is outside
            made: OnDevice = Tensor._make_wrapper_subclass(
                cls,
                real.shape,
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                device=torch.device(NAME, 0),
            )
        made.held = real
        return made

    def __init__(self, real: Tensor) -> None:
        """See `__new__`."""

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func not in MIXES and any(not isinstance(each, cls) and each.ndim for each in tensors):
            raise RuntimeError(f"{func}: tensors on the device and on the CPU")
        there = True
        places = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.device)]
        if places:
            there = places[0].type == NAME
        elif func is ATEN.copy_.default or func in MIXES:
            there = isinstance(args[0], cls)
        kwargs.pop("pin_memory", None)

        def take(each: Any) -> Any:
            if isinstance(each, torch.device):
                return torch.device("cpu")
            return each.held if isinstance(each, cls) else each

        given, named = tree_map(take, (args, kwargs))
        result = func(*given, **named)
        known = {id(each.held): each for each in tensors if isinstance(each, cls)}

        def back(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            if places and not there:  # a copy, also where the numbers lay on the CPU all along
                return each.clone() if id(each) in known else each
            for tensor in tensors:
                if each is tensor:
                    return tensor
            return known.get(id(each)) if id(each) in known else cls(each) if there else each

        return tree_map(back, result)


def put(tensor: Tensor) -> Tensor:
    """The tensor on the device."""
    return tensor if isinstance(tensor, OnDevice) else Move.apply(tensor)


class Move(torch.autograd.Function):
    """To the device, and gradients back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnDevice(tensor.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.held if isinstance(grad, OnDevice) else grad


class Pretence(TorchFunctionMode):
    """Makes on the CPU what is asked for on the device, and wraps it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        args = list(args)
        asked = False

        def is_there(value: Any) -> bool:
            return (isinstance(value, torch.device) and value.type == NAME) or (
                isinstance(value, str) and value.partition(":")[0] == NAME
            )

        if is_there(kwargs.get("device")):
            kwargs["device"], asked = torch.device("cpu"), True
        name = getattr(func, "__name__", "")
        if name in ("to", "type_as", "new_tensor"):
            for place, value in enumerate(args[1:], 1):
                if is_there(value):
                    args[place], asked = torch.device("cpu"), True
                elif isinstance(value, OnDevice) and name == "to" and not isinstance(args[0], OnDevice):
                    args[place], asked = value.held, True
            if asked and isinstance(args[0], OnDevice):  # there already
                rest = [value for value in args[1:] if isinstance(value, (torch.dtype, torch.memory_format))]
                kwargs.pop("device", None)
                kwargs.pop("non_blocking", None)
                return func(args[0], *rest, **kwargs) if rest or kwargs else args[0]
        if name == NAME and isinstance(args[0], Tensor):
            return put(args[0])
        if name == "new_tensor" and isinstance(args[0], OnDevice):
            return put(args[0].held.new_tensor(*args[1:], **kwargs))
        if name == "as_strided" and isinstance(args[0], OnDevice):
            return put(args[0].held.as_strided(*args[1:], **kwargs))
        if name == "tolist" and isinstance(args[0], OnDevice):
            return args[0].held.tolist()
        if name == "numpy" and isinstance(args[0], OnDevice) and kwargs.get("force"):
            return args[0].held.numpy(force=True)
        result = func(*args, **kwargs)
        return put(result) if asked and isinstance(result, Tensor) else result


@contextmanager
def pretend() -> Iterator[None]:
    """A device called `NAME` is there within, and every command takes it."""
    register()
    with Pretence(), ExitStack() as patches:
        for place in ("preparation", "api.training", "api.evaluating", "api.verifying", "api.live"):
            patches.enter_context(mock.patch(f"compress.{place}.check_device", torch.device))
        yield

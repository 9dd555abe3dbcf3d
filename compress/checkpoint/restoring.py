"""Giving a freshly built network the shapes and numbers of a narrowed one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import SurgeryError


def restore_shapes(module: nn.Module, shapes: Mapping[str, Sequence[int]], attributes: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built original (changed in place, and returned) the shapes and attributes of a narrowed network.

    Tensors that shrink are left uninitialised, to be filled by load_state_dict; a buffer that no state dict holds keeps
    its first values. A bias that a module has a place for and was built without is put there.

    Raises:
        SurgeryError: a name is not in the module, a tensor would grow, or an attribute is no plain number.
    """
    empty = {
        f"{path}.bias".lstrip("."): nn.Parameter(weight.new_empty(0))
        for path, part in module.named_modules()
        if "bias" in part._parameters
        and part._parameters["bias"] is None
        and isinstance(weight := getattr(part, "weight", None), Tensor)
    }
    named = {**named_tensors(module), **empty}
    fresh: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        old = named.get(name)
        if old is None:
            raise SurgeryError(f"The network has no tensor `{name}`, which should have shape {tuple(shape)}.")
        largest = max(named[f"{name.removesuffix('bias')}weight"].shape, default=0) if name in empty else None
        if not shrinks(tuple(shape), tuple(old.shape), largest):
            raise SurgeryError(f"`{name}` is {tuple(old.shape)} in the network and cannot become {tuple(shape)}.")
        if id(old) not in fresh:
            value = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
            if not isinstance(old, nn.Parameter) and not _is_stored(module, name):
                value = old[tuple(slice(size) for size in shape)].clone()  # it is the same along what shrinks
            fresh[id(old)] = (
                nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
            )
        set_tensor(module, name, fresh[id(old)])
    set_attributes(module, attributes)
    return module


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer under its dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    table = owner._parameters if leaf in owner._parameters else owner._buffers
    table[leaf] = value  # type: ignore[assignment]


def _is_stored(module: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in module.get_submodule(path)._non_persistent_buffers_set


def shrinks(new: tuple[int, ...], old: tuple[int, ...], largest: int | None) -> bool:
    """Whether a tensor of shape `old` may become `new`; a bias that was not there has at most `largest` numbers."""
    if largest is not None:
        return len(new) == 1 and 0 <= new[0] <= largest
    return len(new) == len(old) and all(0 <= size <= most for size, most in zip(new, old, strict=True))


def set_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Write whole numbers into attributes by their dotted paths; a list takes the type of the sequence it replaces.

    Only what a module itself holds as a plain number, or a sequence with numbers in it, may be written: no method, no
    submodule, no name with a leading underscore.

    Raises:
        SurgeryError: there is no such attribute, or the value is of another kind.
    """
    for path, value in attributes.items():
        owner_path, _, name = path.rpartition(".")
        try:
            owner = module.get_submodule(owner_path)
            old = inspect.getattr_static(owner, name)  # a property or method stays one, and is refused
        except AttributeError as fault:
            raise SurgeryError(f"The network has no attribute `{path}`.") from fault
        if name.startswith("_") or not same_kind(old, value):
            raise SurgeryError(f"The network's attribute `{path}` is {old!r:.60} and cannot become {value!r:.60}.")
        setattr(owner, name, type(old)(value) if isinstance(old, (tuple, list)) else value)


def same_kind(old: Any, new: Any) -> bool:
    """Whether both are whole numbers, or sequences of one length that differ in whole numbers only."""
    if isinstance(old, (tuple, list)):
        same_length = isinstance(new, (tuple, list)) and len(new) == len(old)
        return same_length and all(a is b or a == b or is_whole(a, b) for a, b in zip(old, new, strict=True))
    return is_whole(old, new)


def is_whole(*values: Any) -> bool:
    """Whether all are whole numbers."""
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }

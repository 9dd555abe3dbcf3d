"""Giving a freshly built network the shapes and numbers of a narrowed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import SurgeryError


def restore_shapes(module: nn.Module, shapes: Mapping[str, Sequence[int]], attributes: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built original (changed in place, and returned) the shapes and attributes of a narrowed network.

    Tensors that shrink are left uninitialised, to be filled by load_state_dict; a buffer that no state dict holds keeps
    its first values. A bias that a module has a place for
    and was built without is put there. Raises SurgeryError when a name is not in the module.
    """
    empty = {
        f"{path}.bias".lstrip("."): nn.Parameter(part.weight.new_empty(0))
        for path, part in module.named_modules()
        if "bias" in part._parameters and part.bias is None and isinstance(part.weight, Tensor)
    }
    named = {**named_tensors(module), **empty}
    fresh: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        old = named.get(name)
        if old is None:
            raise SurgeryError(f"The network has no tensor `{name}`, which should have shape {tuple(shape)}.")
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


def set_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Write attributes by their dotted paths; a list takes the type of the sequence that it replaces."""
    for path, value in attributes.items():
        owner_path, _, name = path.rpartition(".")
        try:
            owner = module.get_submodule(owner_path)
            old = getattr(owner, name)
        except AttributeError as fault:
            raise SurgeryError(f"The network has no attribute `{path}`.") from fault
        setattr(owner, name, type(old)(value) if isinstance(old, (tuple, list)) else value)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }

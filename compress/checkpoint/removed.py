"""What stands in a network where layers were taken out: a constant, zeros of a shape, an identity, or two layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint.pairs import checked_rank, make_pair
from compress.errors import SurgeryError


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a removed module gives, whatever it is given.

    Attributes:
        value: a constant of the output's rank, of extent 1 along all dimensions but at most one; None for zeros, which
            nothing reads but what gives a constant itself.
        along: dimensions in which the output is as large as the input. There are none where the reader spreads it
            itself; a sum that is written into the branch (`out += x`) cannot.
        outputs: 0 where the module gives a tensor; else the length of the tuple that it gives, whose first entry the
            tensor is, and whose others are None.
    """

    value: Tensor | None = None
    along: tuple[int, ...] = ()
    outputs: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As a manifest holds it; the value stands among the tensors."""
        return {"along": list(self.along), "outputs": self.outputs}


class Removed(nn.Module):
    """In the place of layers that were removed."""

    value: Tensor | None

    def __init__(self, replacement: Replacement) -> None:
        super().__init__()
        value = replacement.value
        self.register_parameter("value", None if value is None else nn.Parameter(value.detach().clone()))
        self.along, self.outputs = replacement.along, replacement.outputs

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The constant, or zeros: a tensor of its own, which may be changed in place."""
        given = next(argument for argument in (*inputs, *named.values()) if isinstance(argument, Tensor))
        if self.value is None:
            constant = given.new_zeros([size if dim in self.along else 1 for dim, size in enumerate(given.shape)])
        else:
            extents = enumerate(self.value.shape)
            shape = [given.shape[dim] if dim in self.along else size for dim, size in extents]
            constant = self.value.expand(shape).clone()
        return (constant, *[None] * (self.outputs - 1)) if self.outputs else constant

    def extra_repr(self) -> str:
        """What is left, for print()."""
        return "" if self.value is None else f"value={tuple(self.value.shape)}"


def remove_modules(module: nn.Module, removed: Mapping[str, Mapping[str, Any]], values: Mapping[str, Tensor]) -> None:
    """Put `Removed`, an identity or two layers of a low rank into a freshly built network (changed in place).

    Args:
        removed: as a manifest says it: module path -> as `Replacement.as_dict` gives it, `rank` of the pair of layers
            in its place, or `through` where a batch norm is folded.
        values: the file's tensors by state name; `PATH.value` is the constant of a module that has one.

    Raises:
        SurgeryError: there is no such module, or no two layers can stand for it.
    """
    for path, entry in removed.items():
        old = taken_out(module, path)
        if entry.get("through"):
            put_in_place(module, old, passed_through(old))
            continue
        if entry.get("rank") is not None:
            put_in_place(module, old, make_pair(old, checked_rank(old, path, entry["rank"])))
            continue
        value = values.get(f"{path}.value")
        if value is not None and not value.is_floating_point():
            raise SurgeryError(f"The constant in the place of `{path}` must be of floating point, got {value.dtype}.")
        empty = None if value is None else torch.empty_like(value, dtype=torch.float32)
        replacement = Replacement(empty, tuple(entry.get("along", ())), int(entry.get("outputs", 0)))
        put_in_place(module, old, Removed(replacement))


def passed_through(norm: nn.Module) -> nn.Module:
    """What is left of a batch norm without it: the parts that it calls behind, one after another."""
    parts = OrderedDict(norm.named_children())
    return nn.Sequential(parts).eval() if parts else nn.Identity()


def taken_out(module: nn.Module, path: str) -> nn.Module:
    """The part of the network at a path. Raises SurgeryError where there is none, or it is all of the network."""
    try:
        part = module.get_submodule(path)
    except AttributeError as fault:
        raise SurgeryError(f"The network has no module `{path}`, which should be removed.") from fault
    if part is module:
        raise SurgeryError("The whole network cannot be removed.")
    return part


def put_in_place(module: nn.Module, old: nn.Module, fresh: nn.Module) -> None:
    """Let `fresh` stand wherever `old` does in a network, which is changed in place."""
    for owner in list(module.modules()):
        for name, part in owner._modules.items():
            if part is old:
                owner._modules[name] = fresh


def outside(entries: Mapping[str, Any], removed: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries, by dotted name, that do not lie in one of the removed modules."""
    within = tuple(f"{path}." for path in removed)
    return {name: entry for name, entry in entries.items() if not name.startswith(within) and name not in removed}

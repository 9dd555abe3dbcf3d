"""How a network computes what it computes: activations that write over what they read, convolutions channels last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compress.checkpoint.removed import outside
from compress.errors import SurgeryError

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a convolution's weight
CHANNELS_LAST = "channels_last"


@dataclass(frozen=True)
class Execution:
    """What is set in a freshly built network beside its shapes and numbers; it changes no output.

    Attributes:
        in_place: paths of activations that write over what they read.
        channels_last: the channels of each place lie together, in the weights of convolutions and so in their outputs.
    """

    in_place: tuple[str, ...] = ()
    channels_last: bool = False

    def applied(self, module: nn.Module) -> nn.Module:
        """The module itself, changed in place. Raises SurgeryError where it has no such activation."""
        for path in self.in_place:
            try:
                part = module.get_submodule(path)
            except AttributeError as fault:
                raise SurgeryError(f"The network has no module `{path}`, which should work in place.") from fault
            if not isinstance(getattr(part, "inplace", None), bool):
                raise SurgeryError(f"`{path}` ({type(part).__name__}) cannot work in place.")
            vars(part)["inplace"] = True
        if self.channels_last:
            for weight in convolution_weights(module):
                weight.data = with_channels_last(weight.data)
        return module

    def and_then(self, later: Execution, removed: Mapping[str, Any]) -> Execution:
        """Both, without the activations that lie in removed modules."""
        paths = outside(dict.fromkeys((*self.in_place, *later.in_place)), removed)
        return Execution(tuple(paths), self.channels_last or later.channels_last)

    def as_dict(self) -> dict[str, Any]:
        """As a manifest holds it; empty where there is nothing to set."""
        layout = {"memory_format": CHANNELS_LAST} if self.channels_last else {}
        return {**layout, **({"in_place": list(self.in_place)} if self.in_place else {})}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Execution:
        """As `as_dict` gave it, checked by the manifest."""
        return cls(tuple(entry.get("in_place") or ()), entry.get("memory_format") == CHANNELS_LAST)


def convolution_weights(module: nn.Module) -> Iterator[Tensor]:
    """The weights of two- and three-dimensional convolutions, plain ones: parametrised ones are computed anew."""
    for part in module.modules():
        weight = part._parameters.get("weight") if isinstance(part, _ConvNd) else None
        if weight is not None and weight.ndim in LAYOUTS:
            yield weight


def is_channels_last(module: nn.Module) -> bool:
    """Whether the channels of each place lie together in some convolution's weight, and not by its shape alone."""
    return any(has_layout(weight) for weight in convolution_weights(module))


def has_layout(weight: Tensor) -> bool:
    """Whether a tensor lies channels last, and not by its shape alone."""
    layout = LAYOUTS.get(weight.ndim)
    return layout is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=layout)


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """The value, its channels last where those of `like` are."""
    return with_channels_last(value) if has_layout(like) else value


def with_channels_last(value: Tensor) -> Tensor:
    """Feature maps or the weight of a convolution with the channels of each place together; others as they are."""
    return value.contiguous(memory_format=LAYOUTS[value.ndim]) if value.ndim in LAYOUTS else value

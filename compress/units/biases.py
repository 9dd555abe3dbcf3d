"""Biases for consumers that have none: a constant that the refit may use, in the module's own empty place for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from compress.checkpoint.removed import outside
from compress.checkpoint.restoring import named_tensors
from compress.units.groups import Consumer, UnitGroup
from compress.units.surgery import Narrowed, copy_with

_FORWARDS = tuple(
    kind.forward
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
)


def missing_biases(module: nn.Module, groups: Iterable[UnitGroup]) -> tuple[str, ...]:
    """State names of the biases that prunable groups' consumers could have, in order.

    A consumer has a place for one when its module is one of torch's linear maps or convolutions, made without a bias.
    With a batch norm behind it that takes the constant it needs none.
    """
    consumers = [consumer for group in groups if group.prunable for consumer in group.consumers]
    free = [consumer for consumer in consumers if consumer.bias is None and consumer.shift is None]
    return tuple(dict.fromkeys(_bias_name(consumer) for consumer in free if _has_place(module, consumer)))


def _bias_name(consumer: Consumer) -> str:
    return f"{consumer.weight.rpartition('.')[0]}.bias".lstrip(".")


def _has_place(module: nn.Module, consumer: Consumer) -> bool:
    path, _, leaf = consumer.weight.rpartition(".")
    owner = dict(module.named_modules()).get(path)
    if owner is None or leaf != "weight" or type(owner).forward not in _FORWARDS:
        return False
    return "bias" in owner._parameters and owner._parameters["bias"] is None


def with_biases(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy that shares all tensors of `module` and has zero biases under the given state names besides."""
    biased = copy_with(module, {id(tensor): tensor for tensor in named_tensors(module).values()})
    for name in names:
        owner = biased.get_submodule(name.rpartition(".")[0])
        weight = owner.weight
        assert isinstance(weight, torch.Tensor), "only called for maps that have a weight"
        transposed, groups = bool(getattr(owner, "transposed", False)), int(getattr(owner, "groups", 1))
        outputs = weight.shape[1] * groups if transposed else weight.shape[0]
        owner.bias = nn.Parameter(weight.new_zeros(outputs), requires_grad=weight.requires_grad)
    return biased


def without_idle_biases(narrowed: Narrowed, names: Iterable[str]) -> Narrowed:
    """The narrowed network without those of the named biases that are zero; the others are listed with their shapes.

    The module is changed in place: it is the caller's own.
    """
    shapes = dict(narrowed.shapes)
    for name in outside(dict.fromkeys(names), narrowed.removed):
        owner = narrowed.module.get_submodule(name.rpartition(".")[0])
        bias = owner.bias
        assert isinstance(bias, torch.Tensor), "put there by `with_biases`"
        if bool(bias.any()):
            shapes[name] = list(bias.shape)
        else:
            owner.register_parameter("bias", None)
            shapes.pop(name, None)
    return replace(narrowed, shapes=shapes)

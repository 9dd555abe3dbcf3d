"""Batch norms that the layer in front of them can take in: its weight scaled, a bias of its own, and a step less.

By fixed statistics a batch norm is a scale and a shift of each channel, so that the network gives what it gave. Only
layers that are called once, with a batch norm right behind; a copy without the batch norms was tried. The
network that is written has an identity in their place, or what a derived class calls behind the norm (an activation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from compress.checkpoint.execution import laid_out_like
from compress.checkpoint.pairs import KINDS
from compress.checkpoint.removed import outside, passed_through, put_in_place
from compress.checkpoint.restoring import named_tensors
from compress.graph.meaning import batch_norms, linear_maps
from compress.graph.ops import LinearMap
from compress.graph.trace import module_path
from compress.units.low_rank import has_hooks, largest_sound, stands_once
from compress.units.network import Network
from compress.units.surgery import TOLERANCES, Narrowed, module_outputs, narrow, relative_deviation

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
THROUGH = {"through": True}  # what a manifest says of a batch norm that is folded


@dataclass(frozen=True)
class Foldable:
    """A layer and the batch norm behind it, by the paths of their modules."""

    layer: str
    norm: str


def find_foldable(network: Network) -> tuple[Foldable, ...]:
    """The batch norms that the layer in front of them can take in, front to back."""
    modules = dict(network.module.named_modules())
    maps = {linear.node.name: linear for linear in linear_maps(network.graph)}
    norms = batch_norms(network.graph)
    nodes = {node.name: node for node in network.graph.graph.nodes}
    drafts: list[Foldable] = []
    for norm in norms:
        linear = maps.get(norm.input)
        path = module_path(nodes[norm.node])
        alone = sum(module_path(nodes[other.node]) == path for other in norms) == 1
        if linear is not None and alone and takes_in(network, linear, modules) and is_plain(network, modules.get(path)):
            drafts.append(Foldable(str(linear.weight).rpartition(".")[0], path))
    return largest_sound(drafts, lambda each: goes_well(network, each))


def takes_in(network: Network, linear: LinearMap, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the map's module is a layer whose value nothing but the norm behind it reads."""
    path = str(linear.weight).rpartition(".")[0]
    layer = modules.get(path)
    if not isinstance(layer, KINDS) or module_path(linear.node) != path or not path:
        return False
    flat = not isinstance(layer, nn.Linear) or linear.node.meta["val"].ndim == 2
    return flat and len(linear.node.users) == 1 and len(linear.matrix.users) == 1 and is_plain(network, layer)


def is_plain(network: Network, part: nn.Module | None) -> bool:
    """Whether a module has no hooks, and shares no tensor; batch norms keep running statistics and no other tensor."""
    if part is None or has_hooks(part):
        return False
    if not isinstance(part, KINDS) and not is_norm(part):
        return False
    if len(named_tensors(part)) != len(own_tensors(part)):
        return False
    held = {id(tensor) for tensor in named_tensors(part).values()}
    owners = [each for each in network.module.modules() if held & {id(tensor) for tensor in own_tensors(each)}]
    return len(owners) == 1 and stands_once(network.module, part)


def is_norm(part: nn.Module) -> bool:
    """Whether it is a batch norm by running statistics; classes derived from torch's may call other modules behind."""
    return isinstance(part, NORMS) and part.running_mean is not None and part.running_var is not None


def own_tensors(part: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module itself."""
    return [tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]


def goes_well(network: Network, folds: Sequence[Foldable]) -> bool:
    """Whether a copy without these batch norms gives what the network gives."""
    try:
        without = folded(narrow(network.module, {}, ()), folds)
        got, wanted = (module_outputs(each, network.examples) for each in (without.module, network.module))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
        return False
    return relative_deviation(wanted, got) <= TOLERANCES.get(network.examples[0].dtype, TOLERANCES[torch.float32])


def folded(narrowed: Narrowed, folds: Sequence[Foldable]) -> Narrowed:
    """The network without those of the batch norms whose layer is still there, as one. Its module is changed in place.

    Computed in float64, and rounded once.
    """
    shapes, removed = dict(narrowed.shapes), dict(narrowed.removed)
    gone: dict[str, Any] = {}
    for fold in folds:
        if not {fold.layer: None, fold.norm: None}.keys() <= outside({fold.layer: 0, fold.norm: 0}, removed).keys():
            continue
        layer, norm = (narrowed.module.get_submodule(path) for path in (fold.layer, fold.norm))
        take_in(layer, norm)
        put_in_place(narrowed.module, norm, passed_through(norm))
        gone[fold.norm] = dict(THROUGH)
        shapes |= {f"{fold.layer}.{name}": list(getattr(layer, name).shape) for name in ("weight", "bias")}
    return replace(
        narrowed,
        shapes=outside(shapes, gone),
        attributes=outside(narrowed.attributes, gone),
        removed={**removed, **gone},
    )


def take_in(layer: Any, norm: Any) -> None:
    """Give a linear layer or convolution the scale and shift of the batch norm behind it."""
    weight, bias = layer.weight, layer.bias
    given: list[Any] = [
        None if tensor is None else tensor.detach().double()
        for tensor in (weight, bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    ]
    fuse: Any = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    fused = fuse(*given[:4], norm.eps, *given[4:])
    for name, value in zip(("weight", "bias"), fused, strict=True):
        value = value.detach().to(weight)
        value = laid_out_like(value, weight) if name == "weight" else value
        setattr(layer, name, nn.Parameter(value, requires_grad=weight.requires_grad))

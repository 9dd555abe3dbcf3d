"""Which layers two layers of a low rank can stand for, and the network in which they do.

Only torch's own linear layers and convolutions whose weight nothing else reads: their forward pass must be all that
asks for it. Each was tried: a copy with two layers in its place, of full rank, gave what the original gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.checkpoint.pairs import extents, make_pair, most_rank, plain_kind, sizes_of
from compress.checkpoint.removed import outside, put_in_place
from compress.checkpoint.restoring import named_tensors
from compress.convex.low_rank import balanced_factors
from compress.errors import CompressError
from compress.graph.flow import ChannelFlow
from compress.graph.meaning import linear_maps
from compress.graph.ops import LinearMap
from compress.graph.rules import RULES
from compress.graph.trace import module_path
from compress.units.drafts import whole_consumers
from compress.units.groups import Consumer, ReadUnits, UnitGroup
from compress.units.network import Network
from compress.units.surgery import TOLERANCES, Narrowed, module_outputs, narrow, relative_deviation

Draft = TypeVar("Draft")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FAULTS = (CompressError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


@dataclass(frozen=True, eq=False)
class Factorable:
    """A layer that two layers can stand for.

    Attributes:
        path: of its module.
        consumer: as it reads all its input channels, one unit each.
        outputs, inputs, taps: of its weight.
    """

    path: str
    consumer: Consumer
    outputs: int
    inputs: int
    taps: int

    @property
    def weight(self) -> str:
        """State name of its weight."""
        return self.consumer.weight

    @property
    def read(self) -> ReadUnits:
        """All its input channels."""
        return ReadUnits(self.path, self.inputs, (self.consumer,))

    @property
    def most(self) -> int:
        """The largest rank at which two layers multiply less; 0 where none does."""
        return most_rank(self.outputs, self.inputs, self.taps)


@dataclass(frozen=True, eq=False)
class Factorables:
    """The layers that two layers can stand for, front to back, and path -> why not, of the others."""

    layers: tuple[Factorable, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def find_factorable(network: Network, groups: Sequence[UnitGroup], wanted: Iterable[str] | None = None) -> Factorables:
    """The layers of which a side cannot be cut, as far as two layers can stand for them.

    Args:
        groups: those that may lose units; a layer whose outputs and inputs are all theirs is left to them.
        wanted: paths of the only modules in question; None: all.
    """
    consumers = {consumer.weight: consumer for consumer in whole_consumers(ChannelFlow(network.graph, RULES))}
    modules = dict(network.module.named_modules())
    only = None if wanted is None else set(wanted)
    drafts: list[Factorable] = []
    refused: dict[str, str] = {}
    for linear in linear_maps(network.graph):
        assert linear.weight is not None, "linear_maps gives those by a tensor of the network"
        path = linear.weight.rpartition(".")[0]
        if (only is not None and path not in only) or is_cut_on_both_sides(linear, groups):
            continue
        reason = why_not(network, linear, modules, consumers)
        if reason is not None:
            refused[path or linear.weight] = reason
            continue
        draft = Factorable(path, consumers[linear.weight], *extents(modules[path]))
        if draft.most:
            drafts.append(draft)
        else:
            refused[path] = "no two layers multiply less"
    passed = largest_sound(drafts, lambda each: goes_well(network, each))
    refused |= {each.path: "the network does not run without its weight" for each in drafts if each not in passed}
    return Factorables(passed, refused)


def is_cut_on_both_sides(linear: LinearMap, groups: Sequence[UnitGroup]) -> bool:
    """Whether every output and every input channel of the map belongs to a group that may be cut."""
    cut: dict[int, set[int]] = {}
    for group in groups:
        for part in group.slices:
            if part.name == linear.weight:
                cut.setdefault(part.dim, set()).update(part.positions.flatten().tolist())
    shape = linear.matrix.meta["val"].shape
    return all(len(cut.get(dim, ())) == int(shape[dim]) for dim in (linear.layout.output_dim, linear.layout.input_dim))


def why_not(
    network: Network, linear: LinearMap, modules: Mapping[str, nn.Module], consumers: Mapping[str, Consumer]
) -> str | None:
    """Why no two layers can stand for the module of a map; None where nothing is known to speak against it."""
    assert linear.weight is not None, "asked of maps by a tensor of the network"
    path, _, leaf = linear.weight.rpartition(".")
    layer = modules.get(path)
    if layer is None or leaf != "weight" or plain_kind(layer) is None:
        return f"{'its module' if layer is None else type(layer).__name__} is no plain linear layer or convolution"
    if not path:
        return "it is the whole network"
    if getattr(layer, "groups", 1) != 1:
        return "its channels are mapped in groups"
    tensors = [linear.weight, *([] if linear.bias is None else [linear.bias])]
    shared = {*network.aliases, *network.aliases.values()}
    if shared.intersection(tensors) or linear.weight not in consumers or not stands_once(network.module, layer):
        return "its weight is shared"
    operands = [operand for operand in (linear.matrix, linear.offset) if operand is not None]
    if linear.bias not in (None, f"{path}.bias") or any(len(operand.users) > 1 for operand in operands):
        return "its weight is read elsewhere"
    if module_path(linear.node) != path:
        return "its weight is read outside its own forward()"
    if has_hooks(layer):
        return "it has hooks"
    return None


def has_hooks(layer: nn.Module) -> bool:
    """Whether anything is called besides the forward pass of its class."""
    return any(bool(getattr(layer, name)) for name in HOOKS) or "forward" in vars(layer)


def stands_once(module: nn.Module, layer: nn.Module) -> bool:
    """Whether the layer is a child of one module of the network alone."""
    return sum(child is layer for part in module.modules() for child in part.children()) == 1


def largest_sound(drafts: Sequence[Draft], sound: Callable[[Sequence[Draft]], bool]) -> tuple[Draft, ...]:
    """All of the drafts where they are sound together, else those of each half by itself."""
    if not drafts:
        return ()
    if sound(drafts):
        return tuple(drafts)
    middle = len(drafts) // 2
    return (*largest_sound(drafts[:middle], sound), *largest_sound(drafts[middle:], sound)) if middle else ()


def goes_well(network: Network, drafts: Sequence[Factorable]) -> bool:
    """Whether a copy with two layers of full rank in these places gives what the network gives."""
    try:
        whole = {each.path: min(each.outputs, each.inputs * each.taps) for each in drafts}
        pairs = factored(narrow(network.module, {}, ()), whole)
        got, wanted = (module_outputs(each, network.examples) for each in (pairs.module, network.module))
    except _FAULTS:
        return False
    return relative_deviation(wanted, got) <= TOLERANCES.get(network.examples[0].dtype, TOLERANCES[torch.float32])


def factored(narrowed: Narrowed, ranks: Mapping[str, int]) -> Narrowed:
    """The network with two layers in the place of each that `ranks` (module path -> rank) names.

    Their weights are of one scale, and multiply to the layer's own where that has the rank. The module is changed in
    place: it is the caller's own.
    """
    shapes, attributes = (outside(entries, ranks) for entries in (narrowed.shapes, narrowed.attributes))
    removed = dict(narrowed.removed)
    for path, rank in ranks.items():
        layer = narrowed.module.get_submodule(path)
        pair = factored_layer(layer, rank)
        put_in_place(narrowed.module, layer, pair)
        shapes |= {f"{path}.{name}": list(tensor.shape) for name, tensor in named_tensors(pair).items()}
        attributes |= {f"{path}.{name}": size for name, size in sizes_of(pair).items()}
        removed[path] = {"rank": rank}
    return replace(narrowed, shapes=shapes, attributes=attributes, removed=removed)


def factored_layer(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two layers that compute what the layer does, but for what its weight has beyond the rank."""
    pair = make_pair(layer, rank)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor), "asked of linear maps alone"
    parts: Any = pair
    into, out = balanced_factors(weight.detach().double().flatten(1).T, rank)  # (I·taps, r), (r, D)
    with torch.no_grad():
        for part, factor in zip(parts, (into, out), strict=True):
            part.weight.copy_(factor.T.reshape(part.weight.shape))
        if isinstance(bias, Tensor):
            parts[1].bias.copy_(bias)
    return pair


def describe_layer(layer: nn.Module) -> str:
    """What kind of layer it is, in words."""
    size = getattr(layer, "kernel_size", ())
    return f"convolution {' × '.join(map(str, size))}" if isinstance(size, tuple) and size else "linear"

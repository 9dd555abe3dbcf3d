"""Plain chains: convolutions and linear layers one after another, under whatever names a file gives them.

What a state dict says is read off its shapes: kinds, sizes, kernels and the order. What it cannot say, the user does:
the activation between the layers (`chain:relu`), where a convolution is followed by pooling, and how it is padded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
}  # fmt: skip
LAYER_NAME = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,8}")
MOST_LAYERS = 1000
MOST_SORTED, MOST_ORDERS = 32, 64  # layers that are put in order by their widths, and orders that are followed


class PlainChain(nn.Module):
    """Layers in order, an activation after each but the last; images are flattened in front of the first linear one.

    Args:
        layers: [name, "linear", outputs, inputs, bias] or [name, "conv", outputs, inputs, kernel, bias] or
            [name, "norm", channels, affine]: a BatchNorm, which stands in front of the activation.
        activation: a key of `ACTIVATIONS`.
        pool: numbers (from 1) of the convolutions that a 2×2 max pooling follows; or "global": an average over all
            pixels follows the last one.
        padding: pixels around the input of every convolution.

    Raises:
        ValueError: no such chain.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Any]],
        activation: str,
        pool: Sequence[int] | str | None = None,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.names = check_layers(layers)
        self.kinds = [str(layer[1]) for layer in layers]
        self.activation = ACTIVATIONS[activation]()
        self.pooling = nn.MaxPool2d(2)
        convolutions = [number for number, kind in enumerate(self.kinds) if kind == "conv"]
        if convolutions and (pool is None or padding is None):
            raise ValueError(
                "a file does not say where a chain of convolutions pools and how it pads: give pool=[…], the numbers "
                "of the convolutions that a 2×2 max pooling follows (or pool=global), and padding=1, say"
            )
        if not (
            pool is None or pool == "global" or (is_counts(pool) and set(pool) <= {*range(1, 1 + len(convolutions))})
        ):
            raise ValueError(f"pool must be global or a list of numbers from 1 to {len(convolutions)}, got {pool!r}")
        pooled = [] if pool is None or isinstance(pool, str) else [convolutions[number - 1] for number in pool]
        self.pooled = [self._last_of(number) for number in pooled]
        self.averaged = self._last_of(convolutions[-1]) if pool == "global" and convolutions else -1
        for name, layer in zip(self.names, layers, strict=True):
            place(self, name, make_layer(layer, padding or 0))

    def _last_of(self, number: int) -> int:
        """The layer behind which the activation of a convolution stands: itself, or its norm."""
        return number + 1 if self.kinds[number + 1 : number + 2] == ["norm"] else number

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (B, …) of a batch (B, …)."""
        x = inputs
        last = len(self.names) - 1
        for number, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True)):
            if kind == "linear" and (number == 0 or "linear" not in self.kinds[:number]):
                x = torch.flatten(x, 1)
            x = self.get_submodule(name)(x)
            if number < last and self.kinds[number + 1] != "norm":
                x = self.activation(x)
            if number in self.pooled:
                x = self.pooling(x)
            if number == self.averaged:
                x = x.mean((2, 3))
        return x


def check_layers(layers: Sequence[Sequence[Any]]) -> list[str]:
    """The layers' names. Raises ValueError where a layer is not described as it should be."""
    if not isinstance(layers, (list, tuple)) or not 1 <= len(layers) <= MOST_LAYERS:
        raise ValueError(f"layers must be a list of 1 to {MOST_LAYERS} layers")
    wanted = {"linear": 5, "conv": 6, "norm": 4}
    for layer in layers:
        plain = isinstance(layer, (list, tuple)) and len(layer) >= 2 and isinstance(layer[0], str)
        if not plain or len(layer) != wanted.get(str(layer[1])) or not LAYER_NAME.fullmatch(layer[0]):
            raise ValueError(f"a layer is [name, kind, sizes …, bias], got {layer!r:.80}")
        if not is_counts(layer[2:-1]) or not isinstance(layer[-1], bool):
            raise ValueError(f"sizes of a layer are positive whole numbers, got {layer!r:.80}")
    names = [str(layer[0]) for layer in layers]
    if any(
        name in names[:number] or any(other.startswith(f"{name}.") for other in names)
        for number, name in enumerate(names)
    ):
        raise ValueError("two layers have one name, or one lies inside another")
    return names


def is_counts(values: Any) -> bool:
    """Whether it is a list of positive whole numbers."""
    return isinstance(values, (list, tuple)) and all(type(value) is int and 1 <= value <= 1 << 24 for value in values)


def make_layer(layer: Sequence[Any], padding: int) -> nn.Module:
    """The module of a description."""
    kind = layer[1]
    if kind == "linear":
        return nn.Linear(layer[3], layer[2], bias=layer[4])
    if kind == "norm":
        return nn.BatchNorm2d(layer[2], affine=layer[3])
    return nn.Conv2d(layer[3], layer[2], layer[4], padding=padding, bias=layer[5])


def place(module: nn.Module, name: str, part: nn.Module) -> None:
    """Put a module under a dotted name."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent] or nn.Module()
    if hasattr(module, leaf):
        raise ValueError(f"a layer cannot be named {leaf!r}")
    module.add_module(leaf, part)


def read_layers(shapes: Shapes) -> list[list[Any]] | None:
    """The layers of a plain chain with these tensors, in the order of the names given; None where they make none.

    A linear layer may read the pixels of the last convolution, so that its inputs are a multiple of its channels.
    """
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        groups.setdefault(owner, {})[leaf] = shape
    layers = [read_layer(owner, tensors) for owner, tensors in groups.items()]
    if not owner_names(groups) or any(layer is None for layer in layers):
        return None
    chain = [layer for layer in layers if layer is not None]
    weighted = [layer for layer in chain if layer[1] != "norm"]
    if len(weighted) < 2 or not all(follows(before, after) for before, after in pairwise(chain)):
        return None
    return chain if all(fits_channels(chain, number) for number in range(len(chain))) else None


def only_order(shapes: Shapes) -> dict[str, tuple[int, ...]] | None:
    """The shapes in the one order in which linear layers read one another; None where there is none, or several.

    For files that keep no order, under names that tell none.
    """
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = shape
    sizes = {owner: group.get(f"{owner}.weight", ()) for owner, group in groups.items()}
    if len(groups) > MOST_SORTED or any(len(size) != 2 for size in sizes.values()):
        return None
    orders: list[tuple[str, ...]] = [(owner,) for owner in sizes]
    for _ in range(len(sizes) - 1):
        orders = [
            (*order, owner)
            for order in orders
            for owner, (_, inputs) in sizes.items()
            if owner not in order and sizes[order[-1]][0] == inputs
        ]
        if len(orders) > MOST_ORDERS:
            return None
    if len(orders) != 1:
        return None
    return {name: shape for owner in orders[0] for name, shape in groups[owner].items()}


def owner_names(groups: Mapping[str, Any]) -> bool:
    """Whether all layers have names that a chain can use."""
    return all(LAYER_NAME.fullmatch(owner) for owner in groups)


def read_layer(name: str, tensors: Mapping[str, tuple[int, ...]]) -> list[Any] | None:
    """A layer's description read off the shapes of its tensors; None where it is none of the three kinds."""
    weight = tensors.get("weight", ())
    rest = set(tensors) - {"weight", "bias", "num_batches_tracked"}
    if rest == {"running_mean", "running_var"}:
        return [name, "norm", tensors["running_mean"][0], "weight" in tensors]
    if rest or "num_batches_tracked" in tensors or tensors.get("bias", weight[:1]) != weight[:1]:
        return None
    if len(weight) == 2:
        return [name, "linear", *weight, "bias" in tensors]
    if len(weight) == 4 and weight[2] == weight[3]:
        return [name, "conv", weight[0], weight[1], weight[2], "bias" in tensors]
    return None


def follows(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether one kind may follow the other: convolutions with norms, then linear layers."""
    if after[1] == "norm":
        return bool(before[1] == "conv")
    return not (after[1] == "conv" and before[1] == "linear")


def fits_channels(layers: Sequence[Sequence[Any]], number: int) -> bool:
    """Whether a layer reads what the one before gives."""
    before = [layer for layer in layers[:number] if layer[1] != "norm"]
    layer = layers[number]
    if not before:
        return bool(layer[1] != "norm")
    given, wanted = before[-1][2], layer[2] if layer[1] == "norm" else layer[3]
    if layer[1] == "linear" and before[-1][1] == "conv":
        return bool(wanted % given == 0 and isqrt(wanted // given) ** 2 == wanted // given)
    return bool(given == wanted)


def chain_input_shape(arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of one sample, from the pixels that the first linear layer reads and the pools; None where unknown."""
    layers = arguments["layers"]
    first = layers[0]
    if first[1] == "linear":
        return (int(first[3]),)
    convolutions = [layer for layer in layers if layer[1] == "conv"]
    linear = next((layer for layer in layers if layer[1] == "linear"), None)
    pool, padding = arguments.get("pool"), arguments.get("padding")
    if linear is None or not is_counts(pool) or padding is None:
        return None
    side = isqrt(linear[3] // convolutions[-1][2])
    for number in range(len(convolutions), 0, -1):
        side = side * (2 if number in set(pool or ()) else 1) + convolutions[number - 1][4] - 1 - 2 * padding
    return (int(first[3]), side, side) if side > 0 else None


def describe_layers(layers: Sequence[Sequence[Any]]) -> str:
    """The chain in words."""
    words = []
    for layer in layers:
        if layer[1] == "norm":
            continue
        kernel = f" {layer[4]}×{layer[4]}" if layer[1] == "conv" else ""
        words.append(f"{layer[0]}{kernel} {layer[3]}→{layer[2]}")
    return ", ".join(words[:8]) + (f", … {len(words)} in all" if len(words) > 8 else "")

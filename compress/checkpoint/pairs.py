"""Two plain layers in the place of one whose weight has a low rank: r outputs without a bias, then a map of these."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from compress.errors import SurgeryError

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def plain_kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class of torch's that the layer is, its weight computed or not; None for any other, derived ones too."""
    kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
    return kind if kind in KINDS else None


def extents(layer: nn.Module) -> tuple[int, int, int]:
    """Outputs, inputs and taps of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor), "asked of linear maps alone"
    return weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])


def most_rank(outputs: int, inputs: int, taps: int = 1) -> int:
    """The largest rank at which two layers have fewer weights, and multiply less, than one; 0 where none has."""
    return (outputs * inputs * taps - 1) // (outputs + inputs * taps)


def checked_rank(layer: nn.Module, path: str, rank: int) -> int:
    """The rank, where two layers of it stand for this one. Raises SurgeryError."""
    if plain_kind(layer) is None or getattr(layer, "groups", 1) != 1:
        raise SurgeryError(f"`{path}` is {type(layer).__name__}, in whose place no two layers can stand.")
    most = most_rank(*extents(layer))
    if not 1 <= rank <= most:
        raise SurgeryError(f"Two layers in the place of `{path}` have a rank from 1 to {most}, got {rank}.")
    return rank


def make_pair(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two layers, their weights uninitialised, of one that `checked_rank` passes: k × k with r outputs, then 1 × 1."""
    kind: Any = plain_kind(layer)
    outputs, inputs, _ = extents(layer)
    plain: Any = layer
    made = {"dtype": plain.weight.dtype, "device": plain.weight.device}
    if kind is nn.Linear:
        first = empty(kind, inputs, rank, bias=False, **made)
        second = empty(kind, rank, outputs, bias=plain.bias is not None, **made)
    else:
        window = (plain.kernel_size, plain.stride, plain.padding, plain.dilation)
        first = empty(kind, inputs, rank, *window, bias=False, padding_mode=plain.padding_mode, **made)
        second = empty(kind, rank, outputs, 1, bias=plain.bias is not None, **made)
    pair = nn.Sequential(first, second).train(layer.training)
    return pair.requires_grad_(plain.weight.requires_grad)


def empty(kind: Any, *sizes: Any, **options: Any) -> Any:
    """A layer whose weights are not initialised, and no random number drawn."""
    return skip_init(kind, *sizes, **options)  # type: ignore[no-untyped-call]


def sizes_of(pair: nn.Sequential) -> dict[str, int]:
    """The numbers of channels that the two layers keep, by their dotted names: what narrowing changes of them."""
    into, out = ("in_features", "out_features") if isinstance(pair[0], nn.Linear) else ("in_channels", "out_channels")
    return {f"0.{into}": extents(pair[0])[1], f"1.{out}": extents(pair[1])[0]}


def resized(layer: nn.Module, outputs: int, inputs: int) -> nn.Module:
    """A layer of the same kind with other extents, its weights zero; of one that `plain_kind` knows."""
    kind: Any = plain_kind(layer)
    plain: Any = layer
    made = {"bias": plain.bias is not None, "dtype": plain.weight.dtype, "device": plain.weight.device}
    window = () if kind is nn.Linear else (plain.kernel_size, plain.stride, plain.padding, plain.dilation)
    more = {} if kind is nn.Linear else {"padding_mode": plain.padding_mode}
    return zeroed(empty(kind, inputs, outputs, *window, **more, **made))


def zeroed(module: nn.Module) -> nn.Module:
    """The module, all its parameters zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module.eval()

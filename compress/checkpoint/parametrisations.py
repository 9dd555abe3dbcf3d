"""Weights that a network computes from others (weight norm, spectral norm, masks), written out as plain numbers.

In evaluation such a weight is a constant. `materialise` lets the module compute it once and drops the computation, for
torch's parametrisations and for the hooks that went before them. `plain_state` does the same to a state dict alone,
where the names say without doubt how the weight follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from compress.errors import UnsupportedError

_FAULTS = (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError)
_NEW_NORM = re.compile(r"(.*?)\.?parametrizations\.([^.]+)\.original0$")
_COUNTER = "num_batches_tracked"


def materialise(module: nn.Module) -> tuple[str, ...]:
    """Replace every computed weight of the module, in place, by a parameter of its value in evaluation; their names.

    Raises:
        UnsupportedError: a weight that cannot be written out.
    """
    done: list[str] = []
    for path, part in module.named_modules():
        for name in _computed(part):
            full = f"{path}.{name}".lstrip(".")
            try:
                _write_out(part, name)
            except _FAULTS as error:
                reason = " ".join(str(error).split())[:200]
                raise UnsupportedError(f"The computed weight `{full}` cannot be written out: {reason}") from error
            done.append(full)
    return tuple(done)


def _computed(part: nn.Module) -> list[str]:
    parametrised: Any = part.parametrizations if parametrize.is_parametrized(part) else {}
    hooks = [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]
    masks = [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
    return [*parametrised, *(hook.name for hook in hooks), *(str(mask._tensor_name) for mask in masks)]


def _write_out(part: nn.Module, name: str) -> None:
    training = part.training
    part.eval()  # the power iteration of a spectral norm goes on in training
    trained = any(value.requires_grad for value in part.parameters())
    if parametrize.is_parametrized(part, name):
        _own_class(part)
        parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    elif any(isinstance(hook, WeightNorm) and hook.name == name for hook in part._forward_pre_hooks.values()):
        remove_weight_norm(part, name)
    elif any(isinstance(hook, SpectralNorm) and hook.name == name for hook in part._forward_pre_hooks.values()):
        remove_spectral_norm(part, name)
        _forget_versions(part)
    else:
        prune.remove(part, name)  # type: ignore[no-untyped-call]
    value = getattr(part, name).detach().clone()
    delattr(part, name)  # where nothing is trained it was left as a buffer
    part.register_parameter(name, nn.Parameter(value, requires_grad=trained))
    part.train(training)


def _own_class(part: nn.Module) -> None:
    """Give a parametrised module a class like its own for itself: torch takes the property off the class, which it
    shares with the copies that were made of it."""
    shared = type(part)
    contents = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    part.__class__ = type(shared.__name__, shared.__bases__, contents)


def _forget_versions(part: nn.Module) -> None:
    """Take the old spectral norm's hooks off the state dict, where torch leaves them."""
    for hooks in (part._load_state_dict_pre_hooks, part._state_dict_hooks):
        for key, hook in list(hooks.items()):
            if type(getattr(hook, "hook", hook)).__name__.startswith("SpectralNorm"):
                del hooks[key]


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with weight-normalised and masked weights under their plain names; the same where there are none.

    `X_g` and `X_v`, or `parametrizations.X.original0` and `original1`, are length and direction: X = g·v/‖v‖, the norm
    over the dimensions along which g has one entry. `X_orig` and `X_mask` are factors.
    """
    plain = dict(state)
    for name in state:
        new = _NEW_NORM.match(name)
        if new is not None:
            base, others = f"{new[1]}.{new[2]}".lstrip("."), (name, f"{name.removesuffix('0')}1")
        elif name.endswith("_g"):
            base, others = name.removesuffix("_g"), (name, f"{name.removesuffix('_g')}_v")
        elif name.endswith("_mask"):
            base, others = name.removesuffix("_mask"), (name, f"{name.removesuffix('_mask')}_orig")
        else:
            continue
        if base in state or others[1] not in state:
            continue
        first, second = (state[other] for other in others)
        if name.endswith("_mask"):
            value = second * first.to(second) if first.shape == second.shape else None
        else:
            value = _normed(first, second)
        if value is not None:
            for other in others:
                del plain[other]
            plain[base] = value
    return plain


def _normed(length: Tensor, direction: Tensor) -> Tensor | None:
    fits = length.ndim == direction.ndim and all(
        extent in (1, whole) for extent, whole in zip(length.shape, direction.shape, strict=True)
    )
    if length.numel() != 1 and not (fits and sum(extent > 1 for extent in length.shape) == 1):
        return None
    wide = direction.double()
    over = [dim for dim in range(wide.ndim) if length.numel() == 1 or length.shape[dim] == 1]
    norm: Tensor = torch.linalg.vector_norm(wide, dim=over, keepdim=True)
    return (length.double() * (wide / norm)).reshape(direction.shape).to(direction.dtype)


def in_common_form(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as it can be loaded; where module and state say differently how weights are computed, both plain.

    The module is changed in place in that case. Buffers that the module no longer stores are left out where the file
    has the values that it computes itself (position numbers of older transformers).
    """
    state = without_derived(module, state)
    expected = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(_COUNTER)}
    computed = any(_computed(part) for part in module.modules())
    if expected.keys() <= state.keys() and not (
        computed and any(expected[name].shape != state[name].shape for name in expected)
    ):
        return dict(state)
    materialise(module)
    return plain_state(state)


def without_derived(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without buffers that the module makes itself, to the same values, and keeps out of its state dict."""
    stored = module.state_dict().keys()
    derived = {name: value for name, value in module.named_buffers() if name not in stored and not value.is_meta}
    return {
        name: value
        for name, value in state.items()
        if name not in derived or not torch.equal(value.to(derived[name]), derived[name])
    }

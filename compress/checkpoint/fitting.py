"""Whether a state dict is a module's: every difference in names and shapes, and the copy where there is none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.checkpoint.parametrisations import in_common_form
from compress.errors import CheckpointError

COUNTER = "num_batches_tracked"
SHOWN_FAULTS = 3


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state into a module of exactly these names and shapes; BatchNorm's batch counters may be missing.

    Raises:
        CheckpointError: names or shapes differ; the first differences are listed.
    """
    state = in_common_form(module, state)
    check_fit(module, state, type(module).__name__)
    module.load_state_dict(with_versions(module, state), strict=False)


def in_precision(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The module itself, in double precision where a tensor of the state is; not where its class mixes precisions."""
    own = {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()}
    wide = any(tensor.dtype == torch.float64 for tensor in state.values())
    return module.double() if wide and len(own) == 1 else module


def with_versions(module: nn.Module, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The state with the format versions of the module's own state dict, which some modules refuse to load without."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(module.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    return versioned


def compare(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How a module's tensors differ from the shapes of a state dict, one entry a difference.

    A tensor with several names may stand in the file under any one of them.
    """
    present = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if hasattr(tensor, "shape")}
    elsewhere = {name for names in shared_names(module) if any(name in shapes for name in names) for name in names}
    faults = [
        f"`{name}` is {shapes[name]} in the file and {shape} in the network"
        for name, shape in present.items()
        if name in shapes and shapes[name] != shape
    ]
    faults += [
        f"the file lacks `{name}`"
        for name in present
        if name not in shapes and name not in elsewhere and not name.endswith(COUNTER)
    ]
    faults += [f"the network has no `{name}`" for name in shapes if name not in present]
    return faults


def shared_names(module: nn.Module) -> list[list[str]]:
    """The names of every tensor that has several (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        names.setdefault(id(tensor), []).append(name)
    return [known for known in names.values() if len(known) > 1]


def check_fit(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Refuse a state that is not the module's. Raises CheckpointError."""
    faults = compare(module, {key: tuple(tensor.shape) for key, tensor in state.items()})
    if faults:
        more = f"; {len(faults) - SHOWN_FAULTS} more differences" if len(faults) > SHOWN_FAULTS else ""
        told = f"{'; '.join(faults[:SHOWN_FAULTS])}{more}{side_by_side(module, state)}"
        raise CheckpointError(f"The checkpoint does not fit {name}: {told}.")


def side_by_side(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """The names that only the file has beside those that only the network has, in words; nothing where it has none."""
    expected = module.state_dict()
    lacking = [key for key in expected if key not in state and not key.endswith(COUNTER)]
    beside = [f"`{key}` {tuple(value.shape)}" for key, value in state.items() if key not in expected]
    if not beside or not lacking:
        return ""
    more = ", …" if len(beside) > SHOWN_FAULTS else ""
    return f". Where `{lacking[0]}` was expected, the file has {', '.join(beside[:SHOWN_FAULTS])}{more}"

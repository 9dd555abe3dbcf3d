"""What training loops put around a network, taken off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.errors import UnsupportedError


def unwrap(model: Any) -> nn.Module:
    """The module without what `torch.compile` and data parallelism put around it. Raises UnsupportedError."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be an nn.Module, got {type(model).__module__}.{type(model).__qualname__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError("A TorchScript module has no class to rebuild; give the nn.Module it was made from.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model

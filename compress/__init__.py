"""Post-training compression of trained networks: `compress.run`, `compress.inspect`, `compress.load`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from compress.errors import CompressError

_LAZY = {
    "Recipe": "compress.recipe",
    "compare": "compress.api",
    "demo_recipe": "compress.api",
    "evaluate": "compress.api",
    "export": "compress.api",
    "first_tensor": "compress.graph.program",
    "inspect": "compress.api",
    "load": "compress.artifact.loading",
    "make_recipe": "compress.recipe",
    "run": "compress.api",
    "verify": "compress.api",
}

__all__ = ["CompressError", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: `import compress` and `compress --help` do not wait for torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

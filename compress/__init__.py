"""Post-training compression of trained networks: every command of the command line as a function.

    result = compress.run(compress.make_recipe({"checkpoint": "net.pt", "data": "train.npz", "macs": 0.5}))
    network = compress.load(result.folder)

The names are imported on first use: `import compress` and `compress --help` do not wait for torch.
"""

from __future__ import annotations

from compress.safe_path import leave_working_directory as _leave_working_directory

_leave_working_directory(__path__[0])

from importlib import import_module  # noqa: E402  not before
from typing import TYPE_CHECKING, Any  # noqa: E402

from compress.errors import CompressError  # noqa: E402

if TYPE_CHECKING:
    from compress.api import (
        FinetuneResult,
        PruneResult,
        balance,
        compare,
        demo_recipe,
        doctor,
        evaluate,
        export,
        finetune,
        inspect,
        plateau,
        prune,
        rebuild_report,
        run,
        train,
        verify,
    )
    from compress.artifact.loading import load
    from compress.recipe import Recipe, TrainingOptions, make_recipe, read_recipe
    from compress.zoo import plan_zoo, run_zoo

_PLACES = {
    "compress.api": (
        "balance",
        "compare",
        "demo_recipe",
        "doctor",
        "evaluate",
        "export",
        "finetune",
        "inspect",
        "FinetuneResult",
        "PruneResult",
        "plateau",
        "prune",
        "rebuild_report",
        "run",
        "train",
        "verify",
    ),
    "compress.artifact.loading": ("load",),
    "compress.recipe": ("Recipe", "TrainingOptions", "make_recipe", "read_recipe"),
    "compress.zoo": ("plan_zoo", "run_zoo"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "CompressError",
    "FinetuneResult",
    "PruneResult",
    "Recipe",
    "TrainingOptions",
    "balance",
    "compare",
    "demo_recipe",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "make_recipe",
    "plan_zoo",
    "plateau",
    "prune",
    "read_recipe",
    "rebuild_report",
    "run",
    "run_zoo",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, imported on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*__all__, *globals()})

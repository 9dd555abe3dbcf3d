"""What matters for a bug report: versions, machine, and whether the packaged files are as they were shipped."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
from importlib import metadata
from typing import Any

import torch

from compress.artifact.folder import versions
from compress.demo import DEMO_OPTIONS
from compress.errors import CompressError
from compress.progress import Progress, SilentProgress

EXTRAS = ("timm", "transformers", "onnx", "onnxscript", "onnxruntime", "ray", "submitit")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF", "NO_COLOR", "LANG", "LC_ALL",
)  # fmt: skip


def doctor(progress: Progress | None = None) -> dict[str, Any]:
    """Versions, machine and settings that a result may depend on, and a small network compressed here.

    No path, name or address of this machine is told.

    Returns:
        `versions`, `extras` (None where one is not installed), `machine`, `settings` and `checks`: what was tried ->
        "works", or what went wrong.
    """
    progress = progress or SilentProgress()
    checks = {}
    for name, attempt in (("packaged network", load_packaged), ("one layer solved", solve_layer)):
        progress.stage(f"trying: {name}")
        try:
            attempt()
            checks[name] = "works"
        except (CompressError, OSError, RuntimeError, ValueError, ImportError) as error:
            checks[name] = f"{type(error).__name__}: {error}"
    return {
        "versions": versions(),
        "extras": {name: installed(name) for name in EXTRAS},
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "memory": memory(),
            "free disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
            "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        },
        "settings": {
            "output encoding": getattr(sys.stdout, "encoding", None),
            "file encoding": locale.getpreferredencoding(False),
            **{name: os.environ[name] for name in VARIABLES if name in os.environ},
        },
        "checks": checks,
    }


def installed(name: str) -> str | None:
    """The version of an optional package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def memory() -> str | None:
    """The machine's memory, where the system tells."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):
        return None


def load_packaged() -> None:
    """Read the network that is shipped. Raises CompressError."""
    from compress.checkpoint.reading.read import load_checkpoint

    load_checkpoint(str(DEMO_OPTIONS["checkpoint"]))


def solve_layer() -> None:
    """Solve one certified lasso. Raises SolverError."""
    from compress.convex import Moments, MultitaskLasso, solve

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    moments = Moments.of(features, features @ torch.randn(8, 3, generator=generator, dtype=torch.float64))
    costs = torch.ones(8, dtype=torch.float64)
    solve(MultitaskLasso(moments, 0.1, costs), "newton")

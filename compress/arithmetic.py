"""The arithmetic of a run: the same on every call, and single precision where single precision is asked for.

On a CUDA device torch rounds the products of convolutions to ten bits unless told otherwise, picks algorithms by what
was free at the time, and adds in the order in which threads end. Second moments and certificates forgive none of that.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils import deterministic as _deterministic

deterministic: Any = _deterministic  # its switch is set on the module itself
UNSURE = ".*does not have a deterministic implementation"
FUSED = ("flash", "mem_efficient", "cudnn")  # kernels of attention, whose gradients are added in any order


@contextmanager
def reproducible() -> Iterator[None]:
    """Full single precision and fixed algorithms within; the caller's settings and random state after it.

    Also a decorator. On a machine without CUDA only the random state is put back.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices), ExitStack() as settings:
        if devices:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product on a device
            settings.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", UNSURE, UserWarning)
            for put_back in (fix_algorithms(), fix_precision()):
                settings.callback(put_back)
        yield


def fix_algorithms() -> Callable[[], None]:
    """Deterministic algorithms wherever torch has them; gives what undoes it."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, deterministic.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.benchmark, cudnn.deterministic, deterministic.fill_uninitialized_memory = False, True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    cuda = torch.backends.cuda
    fused = {kernel: getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in FUSED}
    for kernel in FUSED:
        getattr(cuda, f"enable_{kernel}_sdp")(False)

    def put_back() -> None:
        for kernel, enabled in fused.items():
            getattr(cuda, f"enable_{kernel}_sdp")(enabled)
        cudnn.benchmark, cudnn.deterministic, deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])

    return put_back


def fix_precision() -> Callable[[], None]:
    """All 24 bits in products on a device; gives what undoes it. Torch refuses to mix its older and newer settings."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    places: list[tuple[Any, str, Any]]
    try:
        places = [(place, "allow_tf32", place.allow_tf32) for place in (cudnn, matmul)]
        wanted: Any = False
    except RuntimeError:
        newer: Any = cudnn
        places = [(place, "fp32_precision", place.fp32_precision) for place in (newer.conv, newer.rnn, matmul)]
        wanted = "ieee"
    for place, name, _ in places:
        setattr(place, name, wanted)

    def put_back() -> None:
        for place, name, value in places:
            setattr(place, name, value)

    return put_back

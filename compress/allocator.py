"""How the C library hands out memory: tensors of many megabytes are freed and taken again all the time."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)
_LARGEST = 1 << 30  # bytes; larger blocks still go straight back
_KEPT = (1 << 31) - 1  # bytes of free memory that stay with the process


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process for the next tensor; whether the C library took that.

    By default glibc gives each large block back to the kernel when it is freed, and the next one comes zeroed, page by
    page: on networks of large activations up to half of the processor's time. Only glibc on Linux knows the setting.
    Whoever set MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES wants it otherwise: nothing is changed.
    """
    told = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in told):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(bool(mallopt(*setting)) for setting in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT)))


def give_back_freed_memory() -> bool:
    """Give memory that is free at this moment back to the kernel; whether the C library knows how, as glibc does.

    Worth it between stages whose tensors have other sizes: what one of them leaves in pieces is of no use to the next.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    return trim is not None and bool(trim(0))

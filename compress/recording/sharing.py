"""Calibration data shared out over the processes of one torch.distributed group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar, cast

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's part of the batches: every `count`-th, from number `rank`."""

    rank: int = 0
    count: int = 1

    def owns(self, batch: int) -> bool:
        """Whether this process records batch number `batch`."""
        return batch % self.count == self.rank

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all: of a measurement that each one would take apart."""
        if self.count == 1:
            return make()
        values = [make() if self.rank == 0 else None]
        distributed.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def any(self, here: bool) -> bool:
        """Whether it is so in this process or in another one."""
        if self.count == 1:
            return here
        values: list[bool | None] = [None] * self.count
        distributed.all_gather_object(values, here)
        return any(values)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Share]:
    """This process's share under torchrun (its group is opened and closed here) or of a group that is open; else all.

    CPU tensors are reduced by gloo, those on accelerators by NCCL.
    """
    if not distributed.is_available():
        yield Share()
    elif distributed.is_initialized():
        yield Share(distributed.get_rank(), distributed.get_world_size())
    elif "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Its functions keep, as default arguments, the group that is open when they are imported: a group that was kept
        # outlives `destroy_process_group`, and its threads end the process with SIGABRT where Python is shutting down.
        import_module("torch.distributed.nn")
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield Share(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()
    else:
        yield Share()


def local_device(device: str) -> str:
    """The device of this process: under torchrun each one on "cuda" has the card of its local rank."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device

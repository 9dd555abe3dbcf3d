"""Processes of this machine, forked from one that has the libraries loaded; as many at once as its memory holds."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from compress.zoo.backends.protocol import Event, describe_exit, failure
from compress.zoo.execution import end_with, execute, isolate
from compress.zoo.plan import Job

PRELOADED = ["compress.api", "compress.zoo.execution"]


@dataclass
class _Running:
    job: Job
    process: Any
    pipe: connection.Connection
    deadline: float | None
    device: str | None
    started: float = field(default_factory=time.monotonic)
    outcome: dict[str, Any] | None = None


class LocalBackend:
    """At most `jobs` processes at once, and no more than `memory` bytes by what the jobs are expected to take.

    The processes are forked from a server that has imported torch and computed nothing, so a model starts within
    milliseconds. Each leads a process group, which is ended as a whole; all end with this process, however it ends.
    A job on "cuda" gets one of `devices` for itself.

    Args:
        memory: None: what the machine has left now.
        devices: accelerators; None: those that CUDA_VISIBLE_DEVICES or the driver names.
    """

    def __init__(self, jobs: int, *, memory: int | None = None, devices: int | None = None) -> None:
        self.jobs = jobs
        self.memory = available_memory() if memory is None else memory
        self.devices = visible_devices() if devices is None else devices
        os.environ["PYTHONSAFEPATH"] = "1"  # the server is started by `python -c`, which would look for modules here
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._running: dict[str, _Running] = {}
        self._lifeline, self._held_end = self._context.Pipe(duplex=False)

    @property
    def running(self) -> int:
        """Processes at work."""
        return len(self._running)

    def accepts(self, job: Job) -> bool:
        """Whether a process, its memory and its device are free; a job too big for the machine runs alone."""
        if not self._running:
            return True
        taken = sum(one.job.memory for one in self._running.values())
        fits = len(self._running) < self.jobs and taken + job.memory <= self.memory
        return fits and (not job.wants_gpu or self._free_device(job) is not None)

    def submit(self, job: Job) -> None:
        """Start one process."""
        receiver, sender = self._context.Pipe(duplex=False)
        device = self._free_device(job) if job.wants_gpu else None
        process = self._context.Process(target=work, args=(job, device, sender, self._lifeline), name=job.name)
        with no_main_module():
            process.start()
        sender.close()
        deadline = None if job.timeout is None else time.monotonic() + job.timeout
        self._running[job.name] = _Running(job, process, receiver, deadline, device)

    def wait(self, seconds: float) -> list[Event]:
        """Progress and outcomes; a process past its deadline is ended."""
        for one in self._running.values():
            if one.deadline is not None:
                seconds = min(seconds, max(0.0, one.deadline - time.monotonic()))
        sources: dict[Any, _Running] = {}
        for one in self._running.values():
            sources[one.process.sentinel] = one
            if not one.pipe.closed:
                sources[one.pipe] = one
        events = []
        ready = connection.wait(list(sources), seconds)
        for one in {id(sources[source]): sources[source] for source in ready}.values():
            events.extend(self._read(one))
            if one.outcome is not None or one.process.sentinel in ready:
                events.append(self._end(one, None))
        now = time.monotonic()
        for one in list(self._running.values()):
            if one.deadline is not None and now >= one.deadline:
                limit = one.job.timeout
                events.append(self._end(one, f"it took longer than the {limit:g} seconds that --timeout allows"))
        return events

    def close(self) -> None:
        """End every process and its group."""
        for one in list(self._running.values()):
            self._end(one, "interrupted")
        self._held_end.close()
        self._lifeline.close()

    def _read(self, one: _Running) -> list[Event]:
        """Messages that lie in a job's pipe; its outcome is kept."""
        events = []
        while not one.pipe.closed:
            try:
                if not one.pipe.poll():
                    break
                message = json.loads(one.pipe.recv_bytes())
            except (EOFError, OSError, ValueError):
                one.pipe.close()
                break
            if "status" in message:
                one.outcome = message
            else:
                events.append(Event(one.job.name, progress=message))
        return events

    def _end(self, one: _Running, reason: str | None) -> Event:
        """End a process and its group, and give its outcome."""
        if reason is None and one.outcome is not None:
            one.process.join(5)  # it has said everything and is on its way out
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(one.process.pid, signal.SIGKILL)
        if one.process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(one.process.pid, signal.SIGKILL)
        one.process.join()
        if reason is None and one.outcome is None:
            self._read(one)
        code = one.process.exitcode
        one.process.close()
        one.pipe.close()
        del self._running[one.job.name]
        seconds = round(time.monotonic() - one.started, 3)
        if reason is not None:
            return Event(one.job.name, outcome=failure(reason, seconds))
        return Event(one.job.name, outcome=one.outcome or failure(describe_exit(code), seconds))

    def _free_device(self, job: Job) -> str | None:
        """The number of an accelerator that no running job has: the one that the job names, or any; None: all taken."""
        taken = {one.device for one in self._running.values()}
        _, colon, number = job.recipe.device.partition(":")
        wanted = [number] if colon else [str(index) for index in range(max(1, self.devices))]
        return next((device for device in wanted if device not in taken), None)


def work(job: Job, device: str | None, pipe: connection.Connection, lifeline: connection.Connection) -> None:
    """What a job's process does: run it and send JSON through the pipe, the outcome last."""
    isolate(job)
    end_with(lifeline)
    if device is not None and ":" not in job.recipe.device:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if int(device) < len(visible) else device

    def tell(message: Mapping[str, Any]) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    tell(execute(job, tell))


def available_memory() -> int:
    """Bytes that new processes may take: what the machine and its control group have left."""
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError):
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        left = min(left, max(0, int(limit) - int(used)))
    return left


def visible_devices() -> int:
    """Accelerators that this process may use; counted without loading torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1")])
    with suppress(OSError):
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    return 0


@contextmanager
def no_main_module() -> Iterator[None]:
    """While processes are started: they do not import the caller's script, which may lack a guard and be run anew."""
    own = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = own

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
        taken = sum(running.job.memory for running in self._running.values())
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
        for running in self._running.values():
            if running.deadline is not None:
                seconds = min(seconds, max(0.0, running.deadline - time.monotonic()))
        sources: dict[Any, _Running] = {}
        for running in self._running.values():
            sources[running.process.sentinel] = running
            if not running.pipe.closed:
                sources[running.pipe] = running
        events = []
        ready = connection.wait(list(sources), seconds)
        for running in {id(sources[source]): sources[source] for source in ready}.values():
            events.extend(self._read(running))
            if running.outcome is not None or running.process.sentinel in ready:
                events.append(self._end(running, None))
        now = time.monotonic()
        for running in list(self._running.values()):
            if running.deadline is not None and now >= running.deadline:
                limit = running.job.timeout
                events.append(self._end(running, f"it took longer than the {limit:g} seconds that --timeout allows"))
        return events

    def close(self) -> None:
        """End every process and its group."""
        for running in list(self._running.values()):
            self._end(running, "interrupted")
        self._held_end.close()
        self._lifeline.close()

    def _read(self, running: _Running) -> list[Event]:
        """Messages that lie in a job's pipe; its outcome is kept."""
        events = []
        while not running.pipe.closed:
            try:
                if not running.pipe.poll():
                    break
                message = json.loads(running.pipe.recv_bytes())
            except (EOFError, OSError, ValueError):
                running.pipe.close()
                break
            if "status" in message:
                running.outcome = message
            else:
                events.append(Event(running.job.name, progress=message))
        return events

    def _end(self, running: _Running, reason: str | None) -> Event:
        """End a process and its group, and give its outcome."""
        if reason is None and running.outcome is not None:
            running.process.join(5)  # it has said everything and is on its way out
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(running.process.pid, signal.SIGKILL)
        if running.process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(running.process.pid, signal.SIGKILL)
        running.process.join()
        if reason is None and running.outcome is None:
            self._read(running)
        code = running.process.exitcode
        running.process.close()
        running.pipe.close()
        del self._running[running.job.name]
        seconds = round(time.monotonic() - running.started, 3)
        if reason is not None:
            return Event(running.job.name, outcome=failure(reason, seconds))
        return Event(running.job.name, outcome=running.outcome or failure(describe_exit(code), seconds))

    def _free_device(self, job: Job) -> str | None:
        """The number of an accelerator that no running job has: the one that the job names, or any; None: all taken."""
        taken = {running.device for running in self._running.values()}
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
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module

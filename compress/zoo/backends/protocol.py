"""The port between the zoo's runner and where models run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from compress.zoo.execution import Status
from compress.zoo.plan import Job


@dataclass(frozen=True)
class Event:
    """Something a model did: `progress` while it runs, or its `outcome` (see `execution.execute`) once it ended."""

    name: str
    progress: Mapping[str, Any] | None = None
    outcome: Mapping[str, Any] | None = None


class Backend(Protocol):
    """Runs jobs, each apart from the others. One that crashes, hangs or is killed ends with an outcome all the same."""

    @property
    def running(self) -> int:
        """Jobs that were submitted and have not ended."""

    def accepts(self, job: Job) -> bool:
        """Whether this job may be submitted now."""

    def submit(self, job: Job) -> None:
        """Start, or queue, one job."""

    def wait(self, seconds: float) -> list[Event]:
        """What happened; waits at most so long for the first event."""

    def close(self) -> None:
        """End everything that still runs."""


def failure(reason: str, seconds: float | None = None) -> dict[str, Any]:
    """The outcome of a job that could not say one itself."""
    return {"status": Status.FAILED, "exit_code": 1, "reason": reason, "seconds": seconds, "peak_bytes": None}


def describe_exit(code: int | None) -> str:
    """Why a process ended without an outcome, from its exit code."""
    if code is not None and code < 0:
        import signal

        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        advice = "; out of memory, or killed from outside" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{advice}"
    return f"its process ended with exit code {code} before it was done"

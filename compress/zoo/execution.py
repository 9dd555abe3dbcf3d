"""One model in the process that is its own: run it, and say in plain data what came of it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from compress.errors import CompressError, GateError
from compress.report.model import RunReport
from compress.zoo.plan import Job


class Status(StrEnum):
    """How a model of a zoo ended; its text stands in journals and summaries."""

    DONE = "done"
    GATE = "gate failed"
    FAILED = "failed"


COMPLETE = (Status.DONE, Status.GATE)
PROGRESS_SECONDS = 0.2
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")

Report = Callable[[Mapping[str, Any]], None]


class RelayedProgress:
    """Progress that is told to another process, at most five times a second. A stage's start is always told."""

    def __init__(self, tell: Report) -> None:
        self.notes: list[str] = []
        self._tell = tell
        self._stage, self._done, self._total = "", 0, None  # type: str, int, int | None
        self._told = 0.0

    def stage(self, title: str, total: int | None = None) -> None:
        """Open a stage."""
        self._stage, self._done, self._total = title, 0, total
        self._say()

    def advance(self, steps: int = 1) -> None:
        """Count finished steps."""
        self._done += steps
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._say()

    def reach(self, share: float) -> None:
        """Nobody asks how much of a model is done."""

    def note(self, message: str) -> None:
        """Keep a line for the report, and print it to the log."""
        self.notes.append(message)
        print(message, flush=True)

    def _say(self) -> None:
        self._told = time.monotonic()
        self._tell({"stage": self._stage, "done": self._done, "total": self._total})


def execute(job: Job, tell: Report | None = None) -> dict[str, Any]:
    """Run one model here and give its outcome as plain data; no fault of the model leaves this function.

    Args:
        tell: receives {"stage", "done", "total"} while it works.
    """
    import torch

    from compress.api import run

    started = time.perf_counter()
    torch.set_num_threads(job.threads)
    outcome: dict[str, Any] = {"status": Status.FAILED, "exit_code": 1, "reason": None}
    report: RunReport | None = None
    try:
        report = run(job.recipe, RelayedProgress(tell or (lambda _: None))).report
        outcome.update(status=Status.DONE, exit_code=0)
    except GateError as error:
        report = error.report
        outcome.update(status=Status.GATE, exit_code=error.exit_code, reason=one_line(error))
    except CompressError as error:
        outcome.update(exit_code=error.exit_code, reason=one_line(error))
    except Exception as error:  # the boundary of a model: one that fails in an unforeseen way ends alone
        traceback.print_exc()
        text = f"{type(error).__name__}: {one_line(error)}"[:500]
        memory = isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)
        outcome["reason"] = f"not enough memory ({text})" if memory else f"unforeseen, see the log: {text}"
    if report is not None:
        outcome["figures"] = figures(report)
    outcome["seconds"] = round(time.perf_counter() - started, 3)
    outcome["peak_bytes"] = peak_bytes()
    return outcome


def one_line(error: Exception) -> str:
    """Its message without line breaks."""
    return " ".join(str(error).split())


def figures(report: RunReport) -> dict[str, Any]:
    """The figures of a report that a summary shows; None where there is no such figure."""
    cost, evaluation = report.cost, report.evaluation
    top1 = None if evaluation is None else evaluation.top1
    return {
        "parameters": list(cost.parameters),
        "macs": list(cost.macs),
        "top1": None if top1 is None else list(top1),
        "drop_points": None if evaluation is None else evaluation.drop_points,
        "agreement": None if evaluation is None else evaluation.agreement,
        "latency_ms": [cost.latency[0].before_ms, cost.latency[0].after_ms] if cost.latency else None,
    }


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def isolate(job: Job) -> None:
    """Let this process end alone: own group, log and temporary folder; the kernel, out of memory, takes it first."""
    os.setsid()
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    use_scratch(job)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL)
    try:
        Path("/proc/self/oom_score_adj").write_text("800")
    except OSError:
        return  # only Linux has it


def use_scratch(job: Job) -> None:
    """Put this process's temporary files where the runner removes them, whatever happens; and fix its threads."""
    Path(job.scratch).mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = job.scratch
    os.environ["TMPDIR"] = job.scratch
    os.environ["OMP_NUM_THREADS"] = str(job.threads)


def end_with(lifeline: Any) -> None:
    """End this process and all that it started once the other end of `lifeline` closes, however its owner ends."""

    def watch() -> None:
        try:
            lifeline.recv_bytes()
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_at(seconds: float | None) -> None:
    """Kill this process after so many seconds; for schedulers whose own limits are coarse."""
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

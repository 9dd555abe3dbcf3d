"""Tiny zoos for the tests: copies of the packaged network, and factories that misbehave."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.demo import CHECKPOINT
from compress.zoo import ZooPlan, plan_zoo
from compress.zoo.backends.protocol import Event
from compress.zoo.plan import Job

QUICK: dict[str, Any] = {"data": "digits", "calibration_samples": 100, "keep": 0.5, "selection": "magnitude"}

MISBEHAVIOUR = """
import os, signal, subprocess, sys, time

def abort(): os.abort()
def leave(): os._exit(7)
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def hang(pids=None):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if pids:
        open(pids, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
def raises(): raise RuntimeError("first line\\nsecond line")
def exhausted(): raise MemoryError
"""


def copies(folder: Path, count: int) -> list[str]:
    """`count` copies of the packaged checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"net{index:03d}.safetensors") for index in range(count)]
    for path in paths:
        shutil.copy(CHECKPOINT, path)
    return paths


def write_misbehaviour(folder: Path) -> None:
    """A module `misbehaviour` whose factories crash, hang or raise."""
    (folder / "misbehaviour.py").write_text(MISBEHAVIOUR)


def small_plan(folder: Path, models: Sequence[dict[str, Any] | str], **settings: Any) -> ZooPlan:
    """A plan of these models, written to `folder`/zoo."""
    import yaml

    file = folder / "zoo.yaml"
    content = {"output": str(folder / "zoo"), "defaults": QUICK, "models": list(models), **settings}
    file.write_text(yaml.safe_dump(content))
    return plan_zoo([str(file)])


class ScriptedBackend:
    """Gives each job the outcome that the test wrote down, and writes a pretended artifact for those that are done.

    Attributes:
        submitted: names in order.
    """

    def __init__(self, outcomes: dict[str, dict[str, Any]] | None = None, at_once: int = 2) -> None:
        self.outcomes = outcomes or {}
        self.submitted: list[str] = []
        self.at_once = at_once
        self.closed = False
        self._queue: list[Job] = []

    @property
    def running(self) -> int:
        return len(self._queue)

    def accepts(self, job: Job) -> bool:
        return len(self._queue) < self.at_once

    def submit(self, job: Job) -> None:
        self.submitted.append(job.name)
        self._queue.append(job)

    def wait(self, seconds: float) -> list[Event]:
        job = self._queue.pop()
        outcome = self.outcomes.get(job.name, {"status": "done", "exit_code": 0, "reason": None, "seconds": 1.0})
        if outcome["status"] == "done":
            job.folder.mkdir(parents=True)
            for name in ("config.json", "model.safetensors", "recipe.yaml", "report.html"):
                (job.folder / name).write_text(f"{name} of {job.fingerprint}")
        return [Event(job.name, outcome=outcome)]

    def close(self) -> None:
        self.closed = True

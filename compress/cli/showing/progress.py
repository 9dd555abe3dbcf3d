"""Progress on stderr: a live line on a terminal, elsewhere a line for what takes longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from contextvars import ContextVar
from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from compress.cli.showing.console import PlainConsole
from compress.cli.spelling import spell

QUIET_SECONDS = 2.0  # without a terminal, a stage is named once it has lasted this long
FORESEEN_SECONDS, FORESEEN_SHARE = 5.0, 0.05  # from when on the time left is estimated
LOUDNESS: ContextVar[int] = ContextVar("loudness", default=0)  # −1: --quiet, 1: --verbose


class StderrProgress:
    """What is being done, for how long, and about how long the whole will take yet.

    Without a terminal a stage is named after two seconds, and its duration told at its end; `--verbose` tells all of
    them, `--quiet` none and no note either.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.console = PlainConsole(stderr=True)
        self.loudness = LOUDNESS.get()
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._title, self._named = "", False
        self._began = self._started = time.monotonic()
        self._reached = 0.0
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> StderrProgress:
        if self.loudness < 0:
            return self
        if self.console.is_terminal:
            self._live = Progress(
                SpinnerColumn("dots" if self.console.encoding.startswith("utf") else "line"),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._live.start()
        else:
            threading.Thread(target=self._name_long_stages, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._reached = 1.0  # of what is told now nothing is left
        self._close_stage()
        if self._live is not None:
            self._live.stop()

    def stage(self, title: str, total: int | None = None) -> None:
        """Open a stage."""
        self._close_stage()
        with self._lock:
            self._title, self._started, self._named = title, time.monotonic(), False
        if self._live is not None:
            if self._task is not None:
                self._live.remove_task(self._task)
            self._task = self._live.add_task(spell(title, self.console.encoding), total=total, left=self._time_left(""))

    def advance(self, steps: int = 1) -> None:
        """Count finished steps."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, advance=steps, left=self._time_left(""))

    def reach(self, share: float) -> None:
        """So much of the whole is done."""
        self._reached = max(self._reached, share)

    def note(self, message: str) -> None:
        """Say a line now, and keep it for the report."""
        self.notes.append(message)
        if self.loudness >= 0:
            self.console.print(message, style="yellow", soft_wrap=True)

    def _time_left(self, before: str) -> str:
        elapsed = time.monotonic() - self._began
        if elapsed < FORESEEN_SECONDS or not FORESEEN_SHARE <= self._reached < 1:
            return ""
        return f"{before}about {in_words(elapsed * (1 - self._reached) / self._reached)} left"

    def _close_stage(self) -> None:
        with self._lock:
            lasted, title, self._title = time.monotonic() - self._started, self._title, ""
        if title and (self.loudness > 0 or (self._live is None and lasted > QUIET_SECONDS)):
            self._say(f"{title}: {lasted:.1f} s{self._time_left(', ')}")

    def _name_long_stages(self) -> None:
        while not self._ended.wait(QUIET_SECONDS / 4):
            with self._lock:
                due = self._title and not self._named and time.monotonic() - self._started > QUIET_SECONDS
                title, self._named = self._title, self._named or bool(due)
            if due:
                self._say(f"{title} …")

    def _say(self, message: str) -> None:
        if self.loudness < 0:
            return
        if self._live is not None:
            self.console.print(message)
        else:
            print(spell(message, self.console.encoding), file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """A duration as one would say it: 40 s, 3 min, 1.5 h."""
    if seconds < 90:
        return f"{max(round(seconds, -1), 10):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

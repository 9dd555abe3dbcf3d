"""The port through which long work says how far it is; the command line hands in a real display."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol, TextIO


class Progress(Protocol):
    """Receives what is being done. One stage is open at a time; a new `stage` closes the one before."""

    def stage(self, title: str, total: int | None = None) -> None:
        """Open a stage of `total` steps (None: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """Count finished steps of the open stage."""

    def reach(self, share: float) -> None:
        """So much of the whole, from 0 to 1, is done by now."""

    def note(self, message: str) -> None:
        """Say one line that outlives the stage: a warning, a choice that was made."""


class SilentProgress:
    """Shows nothing; keeps the notes, so that a program can read them."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, title: str, total: int | None = None) -> None:
        """Ignore the stage."""

    def advance(self, steps: int = 1) -> None:
        """Ignore the steps."""

    def reach(self, share: float) -> None:
        """Ignore what is done."""

    def note(self, message: str) -> None:
        """Keep the note."""
        self.notes.append(message)


class LineProgress(SilentProgress):
    """One line on a stream that is written over: for programs at a terminal and in notebooks, which show it as well.

    Args:
        stream: default: stderr.
        every: seconds between two updates.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 0.2) -> None:
        super().__init__()
        self._stream, self._every = stream or sys.stderr, every
        self._title, self._done, self._last, self._width = "", 0, 0.0, 0
        self._total: int | None = None

    def stage(self, title: str, total: int | None = None) -> None:
        """Show the stage."""
        self._title, self._total, self._done = title, total, 0
        self._show()

    def advance(self, steps: int = 1) -> None:
        """Count, and show now and then."""
        self._done += steps
        if time.monotonic() - self._last >= self._every:
            self._show()

    def note(self, message: str) -> None:
        """Write the note on a line of its own, and keep it."""
        super().note(message)
        self.close()
        self._stream.write(f"{message}\n")
        self._stream.flush()

    def close(self) -> None:
        """Wipe the line."""
        self._stream.write("\r" + " " * self._width + "\r")
        self._stream.flush()
        self._width = 0

    def _show(self) -> None:
        share = f" {100 * self._done // self._total} %" if self._total else ""
        text = f"{self._title}{share}"[:78]
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width, self._last = max(self._width, len(text)), time.monotonic()


@dataclass(frozen=True)
class Portion:
    """The progress of a part of something longer: what it has done of itself is told as what that has done.

    choose_widths(…, Portion(progress, 0.1, 0.7))  # expected to take the run from 10 to 70 % of its time
    """

    whole: Progress
    start: float
    end: float

    def stage(self, title: str, total: int | None = None) -> None:
        """Open a stage."""
        self.whole.stage(title, total)

    def advance(self, steps: int = 1) -> None:
        """Count finished steps of the open stage."""
        self.whole.advance(steps)

    def reach(self, share: float) -> None:
        """So much of this part is done."""
        self.whole.reach(self.start + share * (self.end - self.start))

    def note(self, message: str) -> None:
        """Say one line that outlives the stage."""
        self.whole.note(message)


class Stages:
    """Wall seconds of the run's stages: `with stages("cut"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str) -> _Stage:
        return _Stage(self.seconds, stage)


@dataclass
class _Stage:
    seconds: dict[str, float]
    stage: str
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.started

"""The port through which long work says how far it is; the command line hands in a real display."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


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

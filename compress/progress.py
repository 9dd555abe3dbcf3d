"""The port through which long work says how far it is; the command line hands in a real display."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what is being done. One stage is open at a time; a new `stage` closes the one before."""

    def stage(self, title: str, total: int | None = None) -> None:
        """Open a stage of `total` steps (None: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """Count finished steps of the open stage."""

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

    def note(self, message: str) -> None:
        """Keep the note."""
        self.notes.append(message)

"""What `compress zoo` shows: a live table of what runs on a terminal, one line for every model that ended elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from compress.cli.showing.console import PlainConsole
from compress.cli.showing.progress import LOUDNESS
from compress.zoo.backends.protocol import Event
from compress.zoo.execution import Status
from compress.zoo.summary import factor

MOST_ROWS = 20


class LiveZoo:
    """Progress of a zoo on stderr."""

    def __init__(self) -> None:
        self.console = PlainConsole(stderr=True)
        self._live: Live | None = None
        self._loudness = LOUDNESS.get()
        self._total, self._before = 0, 0
        self._ended: dict[str, Mapping[str, Any]] = {}
        self._running: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self._started = time.monotonic()

    def __enter__(self) -> LiveZoo:
        if self.console.is_terminal and self._loudness >= 0:
            self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, names: list[str], complete: Mapping[str, Mapping[str, Any]]) -> None:
        """How many there are, and how many were complete before."""
        self._total, self._before = len(names), len(complete)
        if complete:
            print(f"{len(complete)} of {len(names)} models were complete before", file=sys.stderr, flush=True)

    def started(self, name: str) -> None:
        """A model runs, or waits for the cluster."""
        self._running[name] = (time.monotonic(), {})

    def event(self, event: Event) -> None:
        """A model got on, or ended."""
        if event.outcome is None:
            since = self._running.get(event.name, (time.monotonic(), {}))[0]
            self._running[event.name] = (since, event.progress or {})
            return
        self._running.pop(event.name, None)
        self._ended[event.name] = event.outcome
        place = f"[{self._before + len(self._ended)}/{self._total}]"
        style = "green" if event.outcome["status"] == Status.DONE else "red"
        line = Text.assemble(place, " ", event.name, ": ", (outcome_text(event.outcome), style))
        if self._live is not None:
            self._live.console.print(line)
        elif self._loudness >= 0:
            print(line.plain, file=sys.stderr, flush=True)

    def _table(self) -> Group:
        table = Table("model", "stage", "", "seconds", box=SIMPLE_HEAD)
        now = time.monotonic()
        for name, (since, progress) in list(self._running.items())[:MOST_ROWS]:
            total = progress.get("total")
            bar = ProgressBar(total=total or None, completed=progress.get("done", 0), width=20, pulse=not total)
            table.add_row(name, progress.get("stage", "starting"), bar, f"{now - since:.0f}")
        failed = sum(outcome["status"] != Status.DONE for outcome in self._ended.values())
        done = self._before + len(self._ended)
        return Group(table, Text(f"{done} of {self._total} models, {failed} not passed, {now - self._started:.0f} s"))


def outcome_text(outcome: Mapping[str, Any]) -> str:
    """One outcome in a line."""
    if outcome["status"] != Status.DONE:
        return f"{outcome['status']}: {outcome['reason']}"
    figures = outcome.get("figures") or {}
    parts = []
    if figures:
        parts.append(f"{factor(*figures['parameters'])} fewer parameters")
        if figures["top1"] is not None:
            parts.append(f"accuracy {100 * figures['top1'][0]:.2f} → {100 * figures['top1'][1]:.2f} %")
    if outcome.get("seconds") is not None:
        parts.append(f"{outcome['seconds']:.1f} s")
    return ", ".join(parts)


def show_zoo(summary: Mapping[str, Any]) -> None:
    """The models that did not pass with their reasons, the counts, and where the summary lies."""
    console = PlainConsole()
    wrong = [row for row in summary["rows"] if row["status"] != Status.DONE]
    if wrong:
        table = Table("model", "status", "why", box=SIMPLE_HEAD)
        for row in wrong:
            table.add_row(Text(row["name"]), row["status"], Text(row["reason"] or ""))
        console.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items() if count)
    console.print(f"{summary['models']} models: {counts}")
    console.print(f"written to {summary['output']}")

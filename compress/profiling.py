"""Where the time of a run went, stage by stage: wall, user and system seconds, peak memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from compress.atomic import new_file
from compress.progress import Progress


@dataclass(frozen=True)
class Spent:
    """What one stage took.

    Attributes:
        wall, user, system: seconds; user and system over all threads of this process.
        peak_bytes: the most memory the process had held by its end.
        times: how often the stage ran.
    """

    stage: str
    wall: float
    user: float
    system: float
    peak_bytes: int
    times: int = 1

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(
            self.stage,
            self.wall + other.wall,
            self.user + other.user,
            self.system + other.system,
            max(self.peak_bytes, other.peak_bytes),
            self.times + other.times,
        )


@dataclass
class Profiled:
    """A progress display that also notes what every stage takes; a stage lasts until the next one opens or `close`."""

    shown: Progress
    stages: list[Spent] = field(default_factory=list)
    _open: tuple[str, tuple[float, float, float]] | None = None

    @property
    def notes(self) -> list[str]:
        """The notes of the display."""
        return list(getattr(self.shown, "notes", []))

    def stage(self, title: str, total: int | None = None) -> None:
        """Open a stage."""
        self.close()
        self._open = title, _clocks()
        self.shown.stage(title, total)

    def advance(self, steps: int = 1) -> None:
        """Hand the steps on."""
        self.shown.advance(steps)

    def reach(self, share: float) -> None:
        """Hand on what is done."""
        self.shown.reach(share)

    def note(self, message: str) -> None:
        """Hand the note on."""
        self.shown.note(message)

    def close(self) -> None:
        """End the stage that is open."""
        if self._open is None:
            return
        title, before = self._open
        wall, user, system = (after - start for after, start in zip(_clocks(), before, strict=True))
        self.stages.append(Spent(title, wall, user, system, _peak_bytes()))
        self._open = None


def summarise(stages: Sequence[Spent]) -> list[Spent]:
    """The stages of one kind together, in the order of their first.

    What is done to one layer after another is one kind; a layer's is the last of two words that stands behind several
    verbs, such as "recording NAME" and "solving NAME".
    """
    verbs: dict[str, set[str]] = {}
    for spent in stages:
        verb, _, last = spent.stage.rpartition(" ")
        if " " not in verb:
            verbs.setdefault(last, set()).add(verb)
    kinds: dict[str, Spent] = {}
    for spent in stages:
        verb, _, last = spent.stage.rpartition(" ")
        kind = f"{verb} each layer" if " " not in verb and len(verbs[last] - {""}) > 1 else spent.stage
        renamed = replace(spent, stage=kind)
        kinds[kind] = kinds[kind].plus(renamed) if kind in kinds else renamed
    return list(kinds.values())


@contextmanager
def profiled(progress: Progress, path: str | None) -> Iterator[Progress]:
    """The display, and at the end of the block (a failed one too) the profile in `path`; None: the display alone.

    Raises:
        OutputError: the file cannot be written.
    """
    if path is None:
        yield progress
        return
    watched = Profiled(progress)
    try:
        yield watched
    finally:
        watched.close()
        write_profile(path, watched.stages)


def write_profile(path: str | Path, stages: Sequence[Spent]) -> None:
    """A table by kind of stage; where the name ends in .json, that and every single stage as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    kinds = summarise(stages)
    target = Path(path)
    if target.suffix == ".json":
        content = {"summary": [asdict(spent) for spent in kinds], "stages": [asdict(spent) for spent in stages]}
        _write(target, json.dumps(content, indent=1))
        return
    whole = Spent("all", 0.0, 0.0, 0.0, 0, 0)
    for spent in kinds:
        whole = whole.plus(spent)
    rows = [("stage", "times", "wall s", "user s", "system s", "peak MB")] + [
        (spent.stage, str(spent.times), *(f"{value:.2f}" for value in (spent.wall, spent.user, spent.system)),
         str(spent.peak_bytes // 2**20))
        for spent in (*kinds, whole)
    ]  # fmt: skip
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    _write(target, "\n".join(lines))


def _write(target: Path, text: str) -> None:
    with new_file(target) as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def _clocks() -> tuple[float, float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime, used.ru_stime


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # the kernels count it in unlike units

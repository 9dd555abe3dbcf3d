"""What every benchmark prints: its options, the machine, its tables and one line per goal.

A benchmark is a module with a `main()` that is run as `python -m benchmarks.NAME`:

    run = start("solvers", __doc__)                  # parses --quick and --json
    run.say("K 512, D 10; quick sizes" if run.quick else "K 512, D 10")
    run.table("Problem A", ("method", "seconds"), [("ours", 0.01), ("celer", 0.25)])
    run.goal("faster-than-celer", 25.0, 20.0, unit="x", at_least=True)
    return run.finish()                              # prints the goal lines last (or everything as JSON)

A goal line reads `goal NAME measured X wanted Y met` or `goal NAME measured X wanted Y short`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass
class Goal:
    """One number that was promised: what came, what was wanted, whether it is met (None: not run; `note` says why)."""

    name: str
    measured: Cell
    wanted: str
    met: bool | None
    note: str = ""

    def line(self) -> str:
        verdict = "not run" if self.met is None else ("met" if self.met else "short")
        text = f"goal {self.name} measured {format_cell(self.measured)} wanted {self.wanted} {verdict}"
        return f"{text} ({self.note})" if self.note else text


@dataclass
class Run:
    """The output of one benchmark run; nothing but text on stdout, or one JSON object with `--json`."""

    name: str
    quick: bool
    as_json: bool
    options: argparse.Namespace
    started: float = field(default_factory=time.perf_counter)
    notes: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line of prose: sizes, seeds, limits."""
        self.notes.append(text)
        if not self.as_json:
            print(text, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """A Markdown table; numbers are printed with three significant digits."""
        kept = [list(row) for row in rows]
        self.tables.append({"title": title, "header": list(header), "rows": kept})
        if not self.as_json:
            print("\n" + markdown_table(title, header, kept) + "\n", flush=True)

    def goal(
        self,
        name: str,
        measured: float | int | None,
        wanted: float | int | str,
        *,
        at_least: bool = False,
        met: bool | None = None,
        unit: str = "",
        note: str = "",
    ) -> None:
        """Record a goal: `measured <= wanted` unless `at_least`; `met` overrides; a measured None is a goal not run."""
        if met is None and measured is not None:
            if isinstance(wanted, str):
                raise ValueError(f"goal {name}: a wanted value in words needs `met=`.")
            met = measured >= wanted if at_least else measured <= wanted
        sign = "" if isinstance(wanted, str) else (">=" if at_least else "<=")
        shown = None if measured is None else f"{format_cell(measured)}{unit}"
        self.goals.append(Goal(name, shown, f"{sign}{format_cell(wanted)}{unit}", met, note))

    def finish(self) -> int:
        """Print the goal lines (or the JSON object); the exit status is 1 when a goal is short."""
        seconds = time.perf_counter() - self.started
        if self.as_json:
            body = {
                "benchmark": self.name,
                "quick": self.quick,
                "machine": machine_line(),
                "seconds": round(seconds, 2),
                "notes": self.notes,
                "tables": self.tables,
                "goals": [vars(goal) for goal in self.goals],
            }
            print(json.dumps(body, indent=2, default=str))
        else:
            print(f"took {seconds:.1f} s")
            for goal in self.goals:
                print(goal.line())
        return int(any(goal.met is False for goal in self.goals))


def start(
    name: str, description: str | None, *, add_options: Callable[[argparse.ArgumentParser], None] | None = None
) -> Run:
    """Parse `--quick`, `--json` and the benchmark's own options, and print the machine line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, stated in the output; under 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args()
    run = Run(name=name, quick=options.quick, as_json=options.json, options=options)
    run.say(f"machine: {machine_line()}")
    return run


SHORT = 0.1  # seconds: calls are repeated up to here, since the first few after a pause are slow


def best_time(call: Callable[[], Any], *, repeats: int = 3, at_most: float = 10.0) -> tuple[float, Any]:
    """Shortest wall time (seconds) of `repeats` calls, and the last result.

    Short calls are repeated until they fill `SHORT` seconds; long ones stop past `at_most`.
    """
    shortest, spent, count = float("inf"), 0.0, 0
    while True:
        begin = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begin
        shortest, spent, count = min(shortest, elapsed), spent + elapsed, count + 1
        if spent > at_most or (count >= repeats and spent > SHORT):
            return shortest, result


def machine_line() -> str:
    """Cores, processor, memory, accelerator and library versions, on one line."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, memory = platform.processor() or platform.machine(), ""
    wide = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read()
        model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line), model)
        wide = " (AVX-512)" if "avx512f" in text else ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB"
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    return (
        f"{cores} cores, {model}{wide}{memory}, {accelerator}, torch {torch.__version__} with {threads} threads, "
        f"Python {platform.python_version()}"
    )


def format_cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(format_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)

"""What a zoo came to: summary.json, summary.csv and index.html, each whole or as it was before."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.atomic import new_file
from compress.zoo.execution import Status
from compress.zoo.plan import LOGS, MODELS, Job

COLUMNS = (
    "name", "status", "exit_code", "reason", "checkpoint", "parameters_before", "parameters_after", "macs_before",
    "macs_after", "top1_before", "top1_after", "drop_points", "agreement", "latency_before_ms", "latency_after_ms",
    "seconds", "peak_bytes", "same_as", "fingerprint",
)  # fmt: skip


def summarise(jobs: Sequence[Job], outcomes: Mapping[str, Mapping[str, Any]], output: Path) -> dict[str, Any]:
    """The content of summary.json: counts, the exit code, and a row for every model in the order of the plan."""
    rows = [summary_row(job, outcomes.get(job.name)) for job in jobs]
    counts = {status: sum(row["status"] == status for row in rows) for status in Status}
    return {
        "format": 1,
        "models": len(rows),
        "counts": counts,
        "exit_code": 1 if counts[Status.FAILED] else 3 if counts[Status.GATE] else 0,
        "output": str(output),
        "rows": rows,
    }


def summary_row(job: Job, outcome: Mapping[str, Any] | None) -> dict[str, Any]:
    """One model's row; every column is there, None where there is nothing to say."""
    outcome = outcome or {"status": Status.FAILED, "exit_code": 1, "reason": "it was not run"}
    figures = outcome.get("figures") or {}
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update(name=job.name, checkpoint=job.recipe.checkpoint, fingerprint=job.fingerprint)
    for name in ("status", "exit_code", "reason", "seconds", "peak_bytes", "same_as"):
        row[name] = outcome.get(name)
    for name in ("parameters", "macs", "top1"):
        row[f"{name}_before"], row[f"{name}_after"] = figures.get(name) or (None, None)
    row["latency_before_ms"], row["latency_after_ms"] = figures.get("latency_ms") or (None, None)
    row["drop_points"], row["agreement"] = figures.get("drop_points"), figures.get("agreement")
    return row


def write_summary(output: Path, summary: Mapping[str, Any], suffix: str = "") -> None:
    """Write the three files into a zoo's folder. Raises OutputError."""
    with new_file(output / f"summary{suffix}.json") as draft:
        draft.write_text(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with new_file(output / f"summary{suffix}.csv") as draft, draft.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows({name: csv_safe(value) for name, value in row.items()} for row in summary["rows"])
    with new_file(output / f"index{suffix}.html") as draft:
        draft.write_text(render_index(summary, output), encoding="utf-8")


def csv_safe(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


@cache
def _environment() -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader("compress.zoo"), PackageLoader("compress.report.html")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def render_index(summary: Mapping[str, Any], output: Path) -> str:
    """The page of a zoo: a row for every model, linked to its report or its log.

    Its only script sorts the table by a column; without it everything is there in the order of the plan.
    """
    templates = resources.files("compress.report.html").joinpath("templates")
    script = templates.joinpath("sort.js").read_text("utf-8")
    counts = summary["counts"]
    verdict = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no models"
    return (
        _environment()
        .get_template("index.html.j2")
        .render(
            title=f"{summary['models']} models",
            style=Markup(templates.joinpath("style.css").read_text("utf-8").strip()),
            script=Markup(script),
            permission="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            verdict=verdict,
            columns=INDEX_COLUMNS,
            rows=[index_row(row, output) for row in summary["rows"]],
        )
    )


@dataclass(frozen=True)
class Column:
    """A column of the page."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what a numerical column is sorted by; empty where there is nothing."""

    text: str = ""
    value: str = ""


INDEX_COLUMNS = (
    Column("model"),
    Column("status"),
    Column("fewer parameters", number=True),
    Column("fewer MACs", number=True),
    Column("faster", number=True),
    Column("accuracy after", number=True),
    Column("points lost", number=True),
    Column("agreement", number=True),
    Column("seconds", number=True),
    Column("why"),
)


def index_row(row: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """One model's name, link and cells behind the name, in the order of INDEX_COLUMNS."""
    report, log = f"{MODELS}/{row['name']}/report.html", f"{LOGS}/{row['name']}.log"
    link = report if row["status"] == Status.DONE else log
    same = f"same as {row['same_as']}" if row["same_as"] else ""
    cells = [
        Cell(row["status"]),
        *(factor(row[f"{name}_before"], row[f"{name}_after"]) for name in ("parameters", "macs")),
        factor(row["latency_before_ms"], row["latency_after_ms"]),
        number(row["top1_after"], "{:.2f} %", 100),
        number(row["drop_points"], "{:.2f}"),
        number(row["agreement"], "{:.2f} %", 100),
        number(row["seconds"], "{:.1f}"),
        Cell(row["reason"] or same),
    ]
    return {"name": row["name"], "link": link if (output / link).is_file() else "", "cells": cells}


def number(value: float | None, form: str, scale: float = 1) -> Cell:
    """A number as a cell."""
    return Cell() if value is None else Cell(form.format(scale * value), repr(value))


def factor(before: float | None, after: float | None) -> Cell:
    """How many times smaller."""
    return number(before / after if before and after else None, "{:.2f}×")

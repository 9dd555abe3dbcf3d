"""Reports of runs that are done: rebuilt, and set side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from compress.artifact.checksums import write_checksums
from compress.artifact.folder import REPORT_JSON, REPORT_PAGE, REPORT_TEXT, TRAINING_JSON
from compress.atomic import new_file
from compress.checkpoint.manifest import CHECKSUMS
from compress.errors import OutputError
from compress.report.html import render_comparison, render_report
from compress.report.markdown import comparison, markdown_report
from compress.strict_json import read_object as read_json

MALFORMED = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RecursionError,
    TemplateError,
)


def read_report(folder: str | Path) -> dict[str, Any]:
    """The content of a run's `report.json`. Raises OutputError."""
    path = Path(folder) / REPORT_JSON
    if is_training(folder):
        raise OutputError(
            f"{str(folder)!r} holds a training, whose report is {TRAINING_JSON}; `compress verify` and `export` take "
            "the folder, and `compress FOLDER --data …` compresses the network in it."
        )
    return read_object(path)


def read_training(folder: str | Path) -> dict[str, Any]:
    """The content of a training's `training.json`. Raises OutputError."""
    return read_object(Path(folder) / TRAINING_JSON)


def is_training(folder: str | Path) -> bool:
    """Whether a training wrote the folder, not a run."""
    return (Path(folder) / TRAINING_JSON).is_file() and not (Path(folder) / REPORT_JSON).exists()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OutputError."""
    return read_json(path, OutputError, "a report written by compress")


def rebuild_report(folder: str | Path) -> list[Path]:
    """Write `report.md` and `report.html` anew from `report.json`; returns their paths. Raises OutputError."""
    folder = Path(folder)
    paths = write_pages(folder, read_report(folder))
    if (folder / CHECKSUMS).is_file():
        write_checksums(folder)
    return paths


def write_pages(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write `report.md` and `report.html`; returns their paths. Raises OutputError."""
    try:
        texts = {REPORT_TEXT: markdown_report(report), REPORT_PAGE: render_report(report)}
    except MALFORMED as error:
        raise OutputError(f"{str(folder / REPORT_JSON)!r} is damaged: {explain(error)}.") from None
    for name, text in texts.items():
        with new_file(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def compare(folders: Sequence[str | Path], page: str | Path | None = None) -> dict[str, Any]:
    """Several runs side by side: figures of each, kept units by layer, and the same as texts.

    Args:
        page: where to write an HTML page of it.

    Raises:
        OutputError: a folder holds no report, or the page cannot be written.
    """
    reports = [(str(folder), read_report(folder)) for folder in folders]
    try:
        found = comparison(reports)
        text = render_comparison(reports)
    except MALFORMED as error:
        raise OutputError(f"One of the reports is damaged: {explain(error)}.") from None
    if page is not None:
        with new_file(page) as draft:
            draft.write_text(text, encoding="utf-8")
    return found


def explain(error: Exception) -> str:
    """What a malformed report lacks, in words."""
    return f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())

"""Reports of runs that are done: read, rebuilt, and set side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.artifact.checksums import write_checksums
from compress.artifact.folder import REPORT_PAGE, REPORT_TEXT
from compress.atomic import new_file
from compress.checkpoint.manifest import CHECKSUMS
from compress.errors import OutputError
from compress.report.comparison import Comparison, compare_reports
from compress.report.html import render_comparison, render_report
from compress.report.markdown import markdown_report
from compress.report.model import Report, RunReport, TrainingReport
from compress.strict_json import read_object


def read_report(folder: str | Path) -> RunReport:
    """The report of a run, of this release or of an earlier one. Raises OutputError."""
    report = read_any_report(folder)
    if not isinstance(report, RunReport):
        raise OutputError(
            f"{str(folder)!r} holds a training, whose report is {report.FILE}; `compress verify` and `export` take "
            "the folder, and `compress FOLDER --data …` compresses the network in it."
        )
    return report


def read_any_report(folder: str | Path) -> RunReport | TrainingReport:
    """The report of a run or of a training. Raises OutputError."""
    run, training = (Path(folder) / kind.FILE for kind in (RunReport, TrainingReport))
    if training.is_file() and not run.exists():
        return TrainingReport.from_json(read_report_json(training), str(training))
    return RunReport.from_json(read_report_json(run), str(run))


def read_report_json(path: Path) -> dict[str, Any]:
    """The JSON object in a report's file. Raises OutputError."""
    return read_object(path, OutputError, "a report written by compress")


def pages(report: Report) -> dict[str, str]:
    """File name -> content of what is made from a report for people."""
    if not isinstance(report, RunReport):
        return {}
    return {REPORT_TEXT: markdown_report(report), REPORT_PAGE: render_report(report)}


def rebuild_report(folder: str | Path) -> list[Path]:
    """Write `report.md` and `report.html` anew from `report.json`; returns their paths. Raises OutputError."""
    folder = Path(folder)
    paths = write_pages(folder, read_report(folder))
    if (folder / CHECKSUMS).is_file():
        write_checksums(folder)
    return paths


def write_pages(folder: Path, report: Report) -> list[Path]:
    """Write what is made from a report for people; returns the paths. Raises OutputError."""
    texts = pages(report)
    for name, text in texts.items():
        with new_file(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def compare(folders: Sequence[str | Path], page: str | Path | None = None) -> Comparison:
    """Several runs side by side: figures of each, and kept units by layer.

    Args:
        page: where to write an HTML page of it.

    Raises:
        OutputError: a folder holds no report, or the page cannot be written.
    """
    reports = [(str(folder), read_report(folder)) for folder in folders]
    if page is not None:
        text = render_comparison(reports)
        with new_file(page) as draft:
            draft.write_text(text, encoding="utf-8")
    return compare_reports(reports)

"""What the command line shows on stdout: tables, and lines below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from compress.api.verifying import MeasuredLatency
from compress.cli.showing.console import PlainConsole
from compress.report.comparison import Comparison
from compress.report.model import Check, ExportReport, RunReport
from compress.report.rows import decimals, forecast_text, headline, summary_rows


def show_run(report: RunReport, folder: Path | None) -> None:
    """The layer table, the summary and where the artifact lies."""
    console = PlainConsole()
    table = Table("layer", "units", "rank Φ · Ψ", "error", "held back", "gap", box=SIMPLE_HEAD)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap, column.justify = True, "right"
    for layer in report.layers:
        lasso = layer.certificate
        table.add_row(
            layer.name,
            f"{layer.units} → {layer.kept}",
            f"{layer.facts.rank_features} · {layer.facts.rank_outputs}",
            decimals(layer.fit.error),
            decimals(layer.fit.held_back_error),
            "–" if lasso is None else f"{lasso.relative_duality_gap:.0e}",
        )
    console.print(table)
    for skipped in report.skipped:
        console.print(f"skipped {skipped.name} ({skipped.units} units): {skipped.reason}")
    summary = Table(
        "", "before", "after", "change", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in summary.columns[1:]:
        column.justify = "right"
    for *figures, change in summary_rows(report):
        summary.add_row(*figures, change.replace(" (", "\n("))  # an interval on its own line
    console.print("", summary, "", sep="\n")
    console.print(headline(report), soft_wrap=not console.is_terminal)
    if (further := forecast_text(report)) is not None:
        console.print(f"recovery: {further}", soft_wrap=not console.is_terminal)
    if folder is not None:
        show_exports(str(folder), report.exports)
        console.print(f"written to {folder}")


def show_inspection(inspection: Mapping[str, Any]) -> None:
    """What could be compressed, layer by layer."""
    console = PlainConsole()
    console.print(f"{inspection['file']}: {inspection['architecture']}")
    recorded = any("rank_features" in layer for layer in inspection["layers"])
    columns = ("dead", "dupl.", "rank Φ · Ψ", "bound") if recorded else ()
    table = Table(
        "layer", "units", "activation", *columns, "‖w‖/‖v‖", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in table.columns[1:]:
        column.no_wrap = True
    table.columns[0].overflow = "fold"
    for column in (table.columns[1], *table.columns[3:]):
        column.justify = "right"
    skipped, inhomogeneous = [], False
    for layer in inspection["layers"]:
        if layer["skipped"]:
            skipped.append(layer)
            continue
        inhomogeneous = inhomogeneous or not layer["homogeneous"]
        cells = []
        if recorded:
            cells = [str(layer[key]) for key in ("dead", "duplicates")]
            cells += [f"{layer['rank_features']} · {layer['rank_outputs']}", str(layer["bound"])]
        table.add_row(
            layer["name"],
            str(layer["units"]),
            f"{layer['activation'] or '–'}{'' if layer['homogeneous'] else ' *'}",
            *cells,
            "–" if layer.get("balance") is None else f"{layer['balance']:.3g}",
        )
    if table.row_count:
        console.print(table)
    if inhomogeneous:
        console.print("* not positively homogeneous: the reconstruction holds, the theory's bound and balance do not.")
    for layer in skipped:
        console.print(f"skipped {layer['name']} ({layer['units']} units): {layer['skipped']}")


def show_evaluation(scores: Mapping[str, Any]) -> None:
    """One network's scores."""
    table = Table("", "value", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, value in scores.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
    PlainConsole().print(table)


def show_comparison(comparison: Comparison) -> None:
    """Runs as columns: their figures, then the units each layer kept."""
    console = PlainConsole()
    for number, run in enumerate(comparison.runs, 1):
        console.print(f"{number}  {run.name}")
    table = Table("", *(str(number) for number in range(1, len(comparison.runs) + 1)), box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in comparison.rows:
        table.add_row(*row)
    table.add_section()
    for layer in comparison.layers:
        table.add_row(layer.name, *("–" if units is None else f"{units} of {layer.units}" for units in layer.kept))
    console.print(table)


def show_checks(checks: Sequence[Check], latencies: Sequence[MeasuredLatency]) -> None:
    """Checks with their verdicts, then the latency measured here beside the recorded one."""
    console = PlainConsole()
    table = Table("check", "wanted", "measured", "", box=SIMPLE_HEAD)
    for check in checks:
        verdict = "passed" if check.passed else "not judged" if check.passed is None else "FAILED"
        table.add_row(check.name, check.wanted, check.measured, verdict)
    console.print(table)
    for latency in latencies:
        recorded = latency.recorded_milliseconds
        beside = "" if recorded is None else f" (the report says {recorded:.2f} ms)"
        console.print(
            f"latency, batch {latency.batch_size}, {latency.threads} threads, {latency.device}: "
            f"{latency.milliseconds:.2f} ms{beside}"
        )


def show_exports(folder: str, exports: Sequence[ExportReport]) -> None:
    """What was exported, how far it deviates, and how fast it is."""
    console = PlainConsole()
    for export in exports:
        checks = ", ".join(f"{check.deviation:.0e} at batch {check.batch_size}" for check in export.checks)
        console.print(f"{folder}/{export.file}: relative deviation {checks} ({export.checked_with})")
        for latency in export.latency:
            console.print(
                f"  batch {latency.batch_size}, {latency.threads} threads: {latency.exported_ms:.2f} ms, "
                f"torch {latency.torch_ms:.2f} ms"
            )


def show_findings(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Headings with a line for each finding."""
    console = PlainConsole()
    for heading, findings in sections.items():
        console.print(heading)
        for name, value in findings.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            console.print(f"  {name}: {'not installed' if shown is None else shown}", soft_wrap=True)

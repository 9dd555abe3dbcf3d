"""The report of a run as Markdown."""

from __future__ import annotations

from compress.report.escaping import code, escaped
from compress.report.model import LayerReport, RunReport
from compress.report.rows import (
    LOW_RANK,
    decimals,
    export_rows,
    forecast_text,
    headline,
    low_rank_rows,
    summary_rows,
    time_rows,
)


def markdown_report(report: RunReport) -> str:
    """The report for people: headline, costs, layers, what went in. Names from outside stay text."""
    checkpoint, fitting = report.checkpoint, report.inputs.data.fitting
    lines = [
        f"# {escaped(checkpoint.file)} compressed",
        "",
        f"Architecture {code(report.inputs.architecture.spec)}, file SHA-256 {code(checkpoint.sha256)}. "
        f"{headline(report)}",
        "",
        "| | before | after | |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(escaped(cell) for cell in row)} |" for row in summary_rows(report)),
        "",
        "| layer | units | kept | rank Φ | rank Ψ | bound | error | held back | λ | gap | rows |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(layer_row(layer) for layer in report.layers),
    ]
    for layer in report.skipped:
        name = code(layer.name, cell=True)
        lines.append(f"| {name} | {layer.units} | – | skipped: {escaped(layer.reason)} | | | | | | | |")
    lines += [""] if report.gates else []
    for gate in report.gates:
        verdict = "passed" if gate.passed else "FAILED"
        lines.append(
            f"- Gate, {escaped(gate.name)}: {escaped(gate.wanted)} wanted, {escaped(gate.measured)}: {verdict}."
        )
    exports = export_rows(report.exports)
    if exports:
        lines += ["", "| export | checked with | relative deviation | latency |", "|---|---|---|---|"]
        lines += [
            f"| {code(name, cell=True)} | {' | '.join(escaped(cell) for cell in cells)} |" for name, *cells in exports
        ]
    if report.search is not None and report.search.times:
        lines += ["", "| milliseconds by itself | whole | predicted | measured |", "|---|---:|---:|---:|"]
        lines += [
            f"| {code(name, cell=True)} | {' | '.join(cells)} |" for name, *cells in time_rows(report.search.times)
        ]
    if report.search is not None and report.search.low_rank:
        lines += ["", f"| {' | '.join(LOW_RANK)} |", "|---|---|---:|---:|---:|---:|---:|"]
        lines += [
            f"| {code(name, cell=True)} | {' | '.join(escaped(cell) for cell in cells)} |"
            for name, *cells in low_rank_rows(report.search.low_rank)
        ]
    lines += [
        "",
        f"Widths: {escaped(report.rule)}. Calibrated on {fitting.samples} samples of {code(str(fitting.source))}, "
        f"checked on {fitting.held_back} held back; seed {report.inputs.seed}.",
        "Errors are ‖Ψ − Ψ̂‖/‖Ψ − mean Ψ‖ after the refit. The gap certifies the lasso of each layer: its objective "
        "is at most that fraction above the optimum.",
        f"The narrowed network equals the masked original to {report.verification.narrowed_deviation:.1e} (relative).",
    ]
    further = forecast_text(report)
    lines += [f"\nRecovery: {escaped(further)}"] if further is not None else []
    lines += [f"\n> {escaped(note)}" for note in report.notes]
    return "\n".join(lines) + "\n"


def layer_row(layer: LayerReport) -> str:
    """One layer's row: width, ranks, errors, certificate."""
    lasso = layer.certificate
    cells = (
        code(layer.name, cell=True),
        layer.units,
        layer.kept,
        layer.facts.rank_features,
        layer.facts.rank_outputs,
        layer.facts.bound,
        decimals(layer.fit.error),
        decimals(layer.fit.held_back_error),
        "–" if lasso is None else f"{lasso.penalty:.2e}",
        "–" if lasso is None else f"{lasso.relative_duality_gap:.1e}",
        layer.fit.rows,
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"

"""A run in one sentence and in rows of text, shared by Markdown, pages, cards and the command line."""

from __future__ import annotations

from collections.abc import Sequence

from compress.measures.figures import GATED, MEANINGS, Meaning
from compress.report.model import (
    EvaluationReport,
    ExportReport,
    FigureReport,
    GuardReport,
    LowRankLayer,
    MapTime,
    OutputReport,
    RunReport,
)


def headline(report: RunReport) -> str:
    """One sentence: how much smaller, and at what accuracy."""
    cost, evaluation = report.cost, report.evaluation
    parts = [f"{cost.parameters.factor:.2f}× fewer parameters", f"{cost.macs.factor:.2f}× fewer MACs"]
    if evaluation is None:
        return ", ".join([*parts, *held_back_text(report)]) + "."
    gated = gated_figure(evaluation)
    if gated is not None:
        name = "accuracy" if gated.key == "top1" else meaning_of(gated).name
        parts.append(f"{name} {100 * gated.original:.2f} → {100 * gated.compressed:.2f} %")
        tuning = report.finetune
        untuned = None if tuning is None or tuning.evaluation_before is None else gated_figure(tuning.evaluation_before)
        if tuning is not None and untuned is not None:
            parts[-1] += f" ({100 * untuned.compressed:.2f} before {tuning.effort})"
    elif evaluation.squared_error is not None:
        before, after = evaluation.squared_error
        parts.append(f"squared error {before:.5g} → {after:.5g}")
    elif evaluation.agreement is not None:
        parts.append(f"agreement with the original {100 * evaluation.agreement:.2f} %")
    else:
        parts.append(f"relative output change {evaluation.relative_output_change:.4f}")
    return ", ".join(parts) + "."


def forecast_text(report: RunReport) -> str | None:
    """What recovery brought and what more samples without labels would bring; None where that could not be told."""
    forecast = None if report.finetune is None else report.finetune.forecast
    if forecast is None:
        return None
    likely, least, most = (forecast.gained(left) for left in (forecast.left, forecast.high, forecast.low))
    before, after = forecast.agreement_before, forecast.agreement_after
    if likely is None or least is None or most is None or before is None or after is None or most < 0.05:
        return (  # no points, or none that would be printed
            f"{forecast.samples:,} samples without labels; {forecast.further:,} would bring held-back outputs to about "
            f"{100 * forecast.left:.0f} % of their distance from the original's ({100 * forecast.low:.0f} to "
            f"{100 * forecast.high:.0f} %)."
        )
    return (
        f"{forecast.samples:,} samples without labels: {100 * (after - before):+.1f} points of held-back agreement; "
        f"{forecast.further:,} would bring about {likely:.1f} more ({least:.1f} to {most:.1f})."
    )


def gated_figure(evaluation: EvaluationReport) -> FigureReport | None:
    """The figure that a bound in points is of; None where nothing is right or wrong."""
    return next((figure for figure in evaluation.figures if figure.key in GATED), None)


def meaning_of(figure: FigureReport) -> Meaning:
    """How a figure is read."""
    return MEANINGS.get(figure.key, Meaning(figure.key, share=False, higher=False))


def held_back_text(report: RunReport) -> list[str]:
    """How the cut does on samples that nothing was fitted to, in words; none where that was not measured."""
    score = report.calibration.held_back
    if score is not None and score.agreement is not None:
        return [f"agreement with the original {100 * score.agreement:.2f} % on {score.samples} held-back samples"]
    errors = [
        layer.fit.held_back_error for layer in report.layers if layer.kept and layer.fit.held_back_error is not None
    ]
    return [f"held-back error of a layer at most {max(errors):.4f}"] if errors else []


def summary_rows(report: RunReport) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, change) of the summary."""
    cost, evaluation, held_back = report.cost, report.evaluation, report.calibration.held_back
    rows = [
        (name, f"{pair.before:,}", f"{pair.after:,}", f"{pair.factor:.2f}×")
        for name, pair in (
            ("parameters", cost.parameters),
            ("MACs per sample", cost.macs),
            ("bytes on disk", cost.bytes),
        )
    ]
    if report.removed:
        rows.append(("blocks removed", "", str(len(report.removed)), "; ".join(report.removed)))
    if report.search is not None and report.search.low_rank:
        names = [layer.name for layer in report.search.low_rank]
        rows.append(("layers of a low rank", "", str(len(names)), "; ".join(names)))
    for latency in cost.latency:
        where = latency.device if latency.device != "cpu" else f"{latency.threads} thread{'s' * (latency.threads > 1)}"
        rows.append(
            (
                f"latency, batch {latency.batch_size}, {where}",
                f"{latency.before_ms:.2f} ms",
                f"{latency.after_ms:.2f} ms",
                f"{latency.factor:.2f}×",
            )
        )
    if held_back is not None and held_back.agreement is not None:
        rows.append((f"agreement, {held_back.samples} held back", "", f"{100 * held_back.agreement:.2f} %", ""))
    if held_back is not None and held_back.distance is not None:
        rows.append((f"outputs moved, {held_back.samples} held back", "", f"{held_back.distance:.3g}", ""))
    for name, measured in report.metrics.items():
        change = measured.after - measured.before
        rows.append((name, f"{measured.before:.4g}", f"{measured.after:.4g}", f"{change:+.4g}"))
    for guard in report.guards:
        rows += guard_rows(guard)
    if evaluation is None:
        return rows
    rows += [figure_row(figure) for figure in evaluation.figures]
    rows += flip_rows(evaluation.figures)
    if evaluation.agreement is not None:
        rows.append(("agreement", "", f"{100 * evaluation.agreement:.2f} %", ""))
    if not evaluation.outputs:
        rows.append(("relative output change", "", f"{evaluation.relative_output_change:.4f}", ""))
    return rows + output_rows(evaluation.outputs)


def guard_rows(guard: GuardReport) -> list[tuple[str, str, str, str]]:
    """What a guard set says of both networks."""
    evaluation = guard.evaluation
    figure = gated_figure(evaluation)
    rows = []
    if figure is not None:
        name, before, after, change = figure_row(figure)
        rows.append((f"guard {guard.name}: {name}", before, after, change))
    if evaluation.agreement is not None:
        rows.append((f"guard {guard.name}: agreement", "", f"{100 * evaluation.agreement:.2f} %", ""))
    if not rows:
        change = f"{evaluation.relative_output_change:.4f}"
        rows.append((f"guard {guard.name}: relative output change", "", change, ""))
    return rows


def figure_row(figure: FigureReport) -> tuple[str, str, str, str]:
    """One figure of both networks, and its change with the interval where that is known."""
    meaning, change = meaning_of(figure), figure.change
    form, scale, unit = ("+.2f", 100, " points") if meaning.share else ("+.3g", 1, "")
    moved = f"{scale * (figure.compressed - figure.original):{form}}{unit}"
    if change is not None:
        sign = -1 if meaning.higher else 1  # a loss is counted positive
        ends = [None if end is None else sign * end + 0.0 for end in change.interval][::sign]
        moved += f" ({' … '.join('?' if end is None else format(end, form) for end in ends)})"
    if meaning.share:
        return meaning.name, f"{100 * figure.original:.2f} %", f"{100 * figure.compressed:.2f} %", moved
    return meaning.name, f"{figure.original:.5g}", f"{figure.compressed:.5g}", moved


def flip_rows(figures: Sequence[FigureReport]) -> list[tuple[str, str, str, str]]:
    """How many samples turned wrong and how many right, of the first figure where that is all there is to a sample."""
    for figure in figures:
        change = figure.change
        if change is not None and change.flips is not None:
            chance = "" if change.p_value is None else f"p {change.p_value:.2g}"
            return [("right → wrong, wrong → right", "", f"{change.flips.lost:,}, {change.flips.won:,}", chance)]
    return []


def time_rows(times: Sequence[MapTime]) -> list[tuple[str, ...]]:
    """Rows (layer, whole, predicted, measured) of milliseconds of each linear map by itself."""
    return [
        (time.name, *(f"{value:.3f}" for value in (time.whole_ms, time.predicted_ms, time.measured_ms)))
        for time in times
    ]


LOW_RANK = ("layer", "kind", "rank", "predicted damage", "measured", "MACs", "milliseconds")


def low_rank_rows(layers: Sequence[LowRankLayer]) -> list[tuple[str, ...]]:
    """Rows, as `LOW_RANK` heads them, of the layers that became two."""
    return [
        (
            layer.name,
            layer.kind,
            str(layer.rank),
            f"{layer.predicted_damage:.3g}",
            f"{layer.measured_damage:.3g}",
            f"{layer.macs.before:,} → {layer.macs.after:,}",
            f"{layer.milliseconds.before:.3f} → {layer.milliseconds.after:.3f}",
        )
        for layer in layers
    ]


def output_rows(outputs: Sequence[OutputReport]) -> list[tuple[str, str, str, str]]:
    """How far each output moved from the original's; where there are several, by name and with what it is."""
    lone = len(outputs) == 1
    rows = []
    for output in outputs:
        name = "relative output change" if lone else f"relative change of `{output.name}`"
        agreement = "" if output.agreement is None or lone else f", {100 * output.agreement:.2f} % agree"
        weight = "" if output.weight == 1 else f", weight {output.weight:g}"
        detail = f"{output.measure} {output.distance:.3g}{agreement}{weight}"
        rows.append((name, "", f"{output.relative_change:.4f}", detail))
    return rows


def export_rows(exports: tuple[ExportReport, ...]) -> list[tuple[str, str, str, str]]:
    """Rows (file, checked with, relative deviation, latency) of the exports."""
    return [
        (
            export.file,
            export.checked_with,
            ", ".join(f"{check.deviation:.0e} at batch {check.batch_size}" for check in export.checks),
            ", ".join(
                f"{latency.exported_ms:.2f} ms at batch {latency.batch_size} (torch {latency.torch_ms:.2f} ms)"
                for latency in export.latency
            ),
        )
        for export in exports
    ]


def decimals(value: float | None) -> str:
    """Four decimals, or a dash where there is no value."""
    return "–" if value is None else f"{value:.4f}"

"""The report of a run as plain data and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compress.graph.cost import Cost
from compress.measures.figures import GATED, MEANINGS
from compress.measures.statistics import CONFIDENCE, compare_figure
from compress.report.evaluation import Evaluation, Score
from compress.report.thumbnails import thumbnail


def cost_report(before: Cost, after: Cost, latencies: list[dict[str, Any]]) -> dict[str, Any]:
    """Costs before and after."""
    return {
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
        "bytes": [before.bytes_on_disk, after.bytes_on_disk],
        "latency": latencies,
    }


def evaluation_report(
    evaluation: Evaluation | None,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> dict[str, Any] | None:
    """Both networks on the evaluation data; None where there was none.

    Args:
        preprocessing: as recorded, to show the inputs of the worst disagreements as they were before it.
        confidence: of the intervals of what changed.
    """
    if evaluation is None:
        return None
    return {
        "samples": evaluation.samples,
        "original": _score(evaluation.original),
        "compressed": _score(evaluation.compressed),
        "drop_points": evaluation.drop,
        "agreement": evaluation.agreement,
        "relative_output_change": evaluation.relative_output_change,
        **({} if evaluation.squared_error is None else {"squared_error": list(evaluation.squared_error)}),
        "figures": [
            {
                "key": figure.key,
                "output": figure.output,
                "original": figure.values[0],
                "compressed": figure.values[1],
                "change": compare_figure(figure, confidence).as_report(),
            }
            for figure in evaluation.figures
        ],
        "outputs": [
            {
                "name": one.output.name,
                "kind": one.output.kind,
                "measure": one.output.measure,
                "because": one.output.reason,
                "weight": one.output.weight,
                "distance": one.distance,
                "relative_change": one.relative_change,
                "agreement": one.agreement,
            }
            for one in evaluation.outputs
        ],
        "per_class": {
            str(label): {"samples": count, "original": before, "compressed": after}
            for label, (count, before, after) in evaluation.per_class.items()
        },
        "class_names": None if class_names is None else list(class_names),
        "changes": [list(change) for change in evaluation.changes],
        "disagreements": [
            {
                "index": one.index,
                "label": one.label,
                "original": one.original,
                "compressed": one.compressed,
                "probabilities": list(one.probabilities),
                "lost": one.lost,
                "thumbnail": thumbnail(one.inputs, preprocessing),
            }
            for one in evaluation.disagreements
        ],
    }


def _score(score: Score | None) -> dict[str, float] | None:
    if score is None:
        return None
    top5 = {} if score.top5 is None else {"top5": score.top5}
    return {"top1": score.top1, **top5, "loss": score.loss}


def markdown_report(report: Mapping[str, Any]) -> str:
    """The report for people: headline, costs, layers, what went in."""
    checkpoint, architecture = report["checkpoint"], report["architecture"]
    lines = [
        f"# {checkpoint['file']} compressed",
        "",
        f"Architecture `{architecture['spec']}`, file SHA-256 `{checkpoint['sha256']}`. {headline(report)}",
        "",
        "| | before | after | |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {before} | {after} | {change} |" for name, before, after, change in summary_rows(report)),
        "",
        "| layer | units | kept | rank Φ | rank Ψ | bound | error | held back | λ | gap | rows |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for layer in report["layers"]:
        if "skipped" in layer:
            lines.append(f"| `{layer['name']}` | {layer['units']} | – | skipped: {layer['skipped']} | | | | | | | |")
            continue
        lasso = layer["lasso"]
        penalty = f"{lasso['penalty']:.2e}" if lasso else "–"
        gap = f"{lasso['relative_duality_gap']:.1e}" if lasso else "–"
        lines.append(
            f"| `{layer['name']}` | {layer['units']} | {layer['kept']} | {layer['rank_features']} "
            f"| {layer['rank_outputs']} | {layer['bound']} | {decimals(layer['error'])} "
            f"| {decimals(layer['held_back_error'])} | {penalty} | {gap} | {layer['rows']} |"
        )
    gates = report.get("gates") or []
    lines += [""] if gates else []
    for gate in gates:
        verdict = "passed" if gate["passed"] else "FAILED"
        lines.append(f"- Gate, {gate['name']}: {gate['wanted']} wanted, {gate['measured']}: {verdict}.")
    exports = export_rows(report)
    if exports:
        lines += ["", "| export | checked with | relative deviation | latency |", "|---|---|---|---|"]
        lines += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in exports]
    calibration = report["data"]["calibration"]
    lines += [
        "",
        f"Widths: {report['rule']}. Calibrated on {calibration['samples']} samples of `{calibration['source']}`, "
        f"checked on {calibration['held_back']} held back; seed {report['seed']}.",
        "Errors are ‖Ψ − Ψ̂‖/‖Ψ − mean Ψ‖ after the refit. The gap certifies the lasso of each layer: its objective "
        "is at most that fraction above the optimum.",
    ]
    deviation = report["verification"]["narrowed_deviation"]
    lines.append(f"The narrowed network equals the masked original to {deviation:.1e} (relative).")
    lines += [f"\n> {note}" for note in report["notes"]]
    return "\n".join(lines) + "\n"


def export_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (file, checked with, relative deviation, latency) of the exports."""
    rows = []
    for one in report.get("exports") or []:
        checks = ", ".join(f"{check['deviation']:.0e} at batch {check['batch_size']}" for check in one["checks"])
        latency = ", ".join(
            f"{each['exported_ms']:.2f} ms at batch {each['batch_size']} (torch {each['torch_ms']:.2f} ms)"
            for each in one.get("latency", ())
        )
        rows.append((one["file"], one["checked_with"], checks, latency))
    return rows


def decimals(value: float | None) -> str:
    """Four decimals, or a dash where there is no value."""
    return "–" if value is None else f"{value:.4f}"


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: how much smaller, and at what accuracy."""
    before, after = report["cost"]["parameters"]
    parts = [f"{before / after:.2f}× fewer parameters", f"{ratio(report['cost']['macs']):.2f}× fewer MACs"]
    evaluation = report["evaluation"]
    if evaluation is not None and evaluation["drop_points"] is not None:
        name, before, after = gated_figure(evaluation)
        parts.append(f"{name} {100 * before:.2f} → {100 * after:.2f} %")
        if report.get("finetune"):
            tuning = report["finetune"]
            untuned = gated_figure(tuning["evaluation_before"])[2]
            effort = f"{tuning['epochs']} epochs of {tuning['method']}" if "method" in tuning else ""
            parts[-1] += f" ({100 * untuned:.2f} before {effort or str(tuning['steps']) + ' label-free steps'})"
    elif evaluation is not None and "squared_error" in evaluation:
        parts.append(f"squared error {evaluation['squared_error'][0]:.5g} → {evaluation['squared_error'][1]:.5g}")
    elif evaluation is not None and evaluation["agreement"] is not None:
        parts.append(f"agreement with the original {100 * evaluation['agreement']:.2f} %")
    elif evaluation is not None:
        parts.append(f"relative output change {evaluation['relative_output_change']:.4f}")
    else:
        parts += held_back_text(report)
    return ", ".join(parts) + "."


def gated_figure(evaluation: Mapping[str, Any]) -> tuple[str, float, float]:
    """The figure that a bound in points is of: its name, and the value of both networks."""
    for figure in evaluation.get("figures") or []:
        if figure["key"] in GATED:
            name = "accuracy" if figure["key"] == "top1" else MEANINGS[figure["key"]].name
            return name, figure["original"], figure["compressed"]
    return "accuracy", evaluation["original"]["top1"], evaluation["compressed"]["top1"]


def held_back_text(report: Mapping[str, Any]) -> list[str]:
    """How the cut does on samples that nothing was fitted to, in words; none where that was not measured."""
    score = (report.get("calibration") or {}).get("held_back")
    if score is not None and score.get("agreement") is not None:
        return [f"agreement with the original {100 * score['agreement']:.2f} % on {score['samples']} held-back samples"]
    errors = [layer["held_back_error"] for layer in report["layers"] if layer.get("held_back_error") is not None]
    return [f"held-back error of a layer at most {max(errors):.4f}"] if errors else []


def ratio(pair: list[int]) -> float:
    """Before over after; 1 where there is nothing after."""
    return pair[0] / pair[1] if pair[1] else 1.0


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, change) of the summary, shared by Markdown and the command line."""
    cost, evaluation = report["cost"], report["evaluation"]
    rows = [
        ("parameters", *(f"{value:,}" for value in cost["parameters"]), f"{ratio(cost['parameters']):.2f}×"),
        ("MACs per sample", *(f"{value:,}" for value in cost["macs"]), f"{ratio(cost['macs']):.2f}×"),
        ("bytes on disk", *(f"{value:,}" for value in cost["bytes"]), f"{ratio(cost['bytes']):.2f}×"),
    ]
    for latency in cost["latency"]:
        before, after = latency["before_ms"], latency["after_ms"]
        where = f"latency, batch {latency['batch_size']}, {latency['threads']} threads, {latency['device']}"
        rows.append((where, f"{before:.2f} ms", f"{after:.2f} ms", f"{before / after:.2f}×"))
    held_back = (report.get("calibration") or {}).get("held_back")
    if held_back is not None and held_back.get("agreement") is not None:
        rows.append((f"agreement, {held_back['samples']} held back", "", f"{100 * held_back['agreement']:.2f} %", ""))
    if evaluation is not None:
        rows += [figure_row(figure) for figure in evaluation.get("figures") or []]
        rows += flip_rows(evaluation.get("figures") or [])
        if evaluation["agreement"] is not None:
            rows.append(("agreement", "", f"{100 * evaluation['agreement']:.2f} %", ""))
        rows += output_rows(evaluation.get("outputs") or [])
    return rows  # type: ignore[return-value]


def figure_row(figure: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """One figure of both networks, and its change with the interval."""
    meaning = MEANINGS[figure["key"]]
    first, second, change = figure["original"], figure["compressed"], figure["change"]
    sign = -1 if meaning.higher else 1  # a loss is counted positive
    ends = [None if end is None else sign * end for end in change["interval"]]
    low, high = ends if sign == 1 else ends[::-1]
    form = "+.2f" if meaning.share else "+.3g"
    shown = " … ".join("?" if end is None else format(end, form) for end in (low, high))
    moved = f"{sign * change['loss']:{form}}{' points' if meaning.share else ''} ({shown})"
    if meaning.share:
        return meaning.name, f"{100 * first:.2f} %", f"{100 * second:.2f} %", moved
    return meaning.name, f"{first:.5g}", f"{second:.5g}", moved


def flip_rows(figures: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """How many samples turned wrong and how many right, of the first figure where that is all there is to a sample."""
    for figure in figures:
        change = figure["change"]
        if change["flips"] is not None:
            lost, won = change["flips"]
            chance = f"p {change['p_value']:.2g}"
            return [("right → wrong, wrong → right", "", f"{lost:,}, {won:,}", chance)]
    return []


def output_rows(outputs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """How far each output moved from the original's; where there are several, by name and with what it is."""
    lone = len(outputs) == 1
    rows = []
    for one in outputs:
        name = "relative output change" if lone else f"relative change of `{one['name']}`"
        agreement = "" if one["agreement"] is None or lone else f", {100 * one['agreement']:.2f} % agree"
        detail = f"{one['measure']} {one['distance']:.3g}{agreement}"
        if one["weight"] != 1:
            detail += f", weight {one['weight']:g}"
        rows.append((name, "", f"{one['relative_change']:.4f}", detail))
    return rows


def comparison(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Several runs, each (name, report), side by side.

    Returns:
        `runs`: one mapping of figures each; `layers`: kept units by run, None where a run does not have the layer;
        `rows`: the same as texts, a row per figure with one cell per run.
    """
    runs = [run_figures(name, report) for name, report in reports]
    layers: dict[str, dict[str, Any]] = {}
    for number, (_, report) in enumerate(reports):
        for layer in report["layers"]:
            if "skipped" not in layer:
                row = layers.setdefault(
                    layer["name"], {"name": layer["name"], "units": 0, "kept": [None] * len(reports)}
                )
                row["units"] = max(row["units"], layer["units"])
                row["kept"][number] = layer["kept"]
    rows = [(name, *(show(run[key]) for run in runs)) for key, name, show in COMPARED]
    return {"runs": runs, "layers": list(layers.values()), "rows": [row for row in rows if set(row[1:]) != {"–"}]}


def run_figures(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that runs are compared by; None where a run has none."""
    cost, evaluation = report["cost"], report["evaluation"] or {}
    compressed, latencies = evaluation.get("compressed") or {}, cost["latency"]
    return {
        "name": name,
        "file": report["checkpoint"]["file"],
        "rule": report["rule"],
        "parameters": cost["parameters"][1],
        "parameters_kept": cost["parameters"][1] / cost["parameters"][0],
        "parameters_reduction": ratio(cost["parameters"]),
        "macs": cost["macs"][1],
        "macs_reduction": ratio(cost["macs"]),
        "bytes": cost["bytes"][1],
        "latency_ms": latencies[-1]["after_ms"] if latencies else None,
        "speedup": latencies[-1]["before_ms"] / latencies[-1]["after_ms"] if latencies else None,
        "top1": compressed.get("top1"),
        "drop_points": evaluation.get("drop_points"),
        "loss": compressed.get("loss"),
        "agreement": evaluation.get("agreement"),
        "relative_output_change": evaluation.get("relative_output_change"),
        "evaluation_samples": evaluation.get("samples"),
        "seed": report["seed"],
    }


def _shown(form: str, scale: int = 1, unit: str = "") -> Callable[[Any], str]:
    return lambda value: "–" if value is None else f"{format(scale * value if form else value, form)}{unit}"


COMPARED: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("file", "checkpoint", _shown("")),
    ("rule", "widths", _shown("")),
    ("parameters", "parameters", _shown(",")),
    ("parameters_reduction", "fewer parameters", _shown(".2f", unit="×")),
    ("macs", "MACs per sample", _shown(",")),
    ("macs_reduction", "fewer MACs", _shown(".2f", unit="×")),
    ("bytes", "bytes on disk", _shown(",")),
    ("latency_ms", "latency, largest batch", _shown(".2f", unit=" ms")),
    ("speedup", "faster than its original", _shown(".2f", unit="×")),
    ("top1", "top-1", _shown(".2f", 100, " %")),
    ("drop_points", "points lost", _shown(".2f")),
    ("loss", "loss", _shown(".4f")),
    ("agreement", "agreement", _shown(".2f", 100, " %")),
    ("relative_output_change", "relative output change", _shown(".4f")),
    ("evaluation_samples", "evaluation samples", _shown(",")),
    ("seed", "seed", _shown("")),
)

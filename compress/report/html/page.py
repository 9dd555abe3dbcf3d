"""From a report to a page: the same report gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.report.comparison import compare_reports
from compress.report.html.charts import (
    class_chart,
    error_chart,
    points_per_curve,
    share_bar,
    spectrum_chart,
    trade_chart,
    width_bar,
)
from compress.report.html.glossary import GLOSSARY
from compress.report.html.overview import damage_chart, search_chart, search_rows, strip_chart
from compress.report.model import Check, ClassScore, EvaluationReport, LayerReport, ModuleCost, RunReport
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

MOST_CLASSES = 40
MOST_CHANGES = 12
MOST_PARTS = 12  # of the network, in the table of costs
BUILT_IN = ("compress", "torchvision", "timm", "transformers")
MOST_DRAWN = 60  # layers with curves of their own; a page stays below 1.5 MB


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("compress.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def _style() -> Markup:
    return Markup(resources.files("compress.report.html").joinpath("templates/style.css").read_text("utf-8").strip())


def render_report(report: RunReport) -> str:
    """The page of one run."""
    layers = report.layers
    evaluation = None if report.evaluation is None else evaluation_view(report.evaluation)
    search = search_view(report)
    sections = [("summary", "Before and after"), ("widths", "Widths")]
    sections += [("search", "Search")] if search else []
    sections += [("costs", "Costs")] if report.modules else []
    sections += [("evaluation", "Evaluation")] if evaluation else []
    sections += [("layers", "Layers"), ("certificates", "Certificates"), ("use", "Use")]
    sections += [("recipe", "Recipe"), ("origin", "Versions and hashes"), ("glossary", "Glossary")]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=f"{report.checkpoint.file} compressed",
            style=_style(),
            report=report,
            headline=headline(report),
            further=forecast_text(report),
            verdict=verdict(report.gates),
            sections=sections,
            tiles=tiles(report),
            summary=summary_rows(report),
            gates=[
                (gate.name, gate.wanted, gate.measured, "passed" if gate.passed else "failed") for gate in report.gates
            ],
            exports=export_rows(report.exports),
            strip=strip_chart(report),
            search=search,
            costs=cost_rows(report),
            silent=sum(layer.facts.bound >= layer.units for layer in layers),
            use=usage(report),
            glossary=GLOSSARY,
            bars=bars(layers),
            skipped=report.skipped,
            layers=layer_views(layers),
            certificates=[certificate_row(layer) for layer in layers],
            forms=[(layer.name, layer.certificate.form) for layer in layers if layer.certificate],
            evaluation=evaluation,
            recipe=recipe_text(report),
            origin=origin_rows(report),
            version=report.inputs.versions.get("compress-networks", ""),
        )
    )


def render_comparison(reports: Sequence[tuple[str, RunReport]]) -> str:
    """A page with several runs, each (name, report), side by side."""
    comparison = compare_reports(reports)
    labelled = all(run.top1 is not None for run in comparison.runs)
    trade = [
        (run.name, 100 * run.parameters_kept, 100 * quality)
        for run in comparison.runs
        if (quality := run.top1 if labelled else run.agreement) is not None
    ]
    widest = max((layer.units for layer in comparison.layers), default=1)
    return (
        _environment()
        .get_template("compare.html.j2")
        .render(
            title=f"{len(reports)} runs compared",
            style=_style(),
            names=[name for name, _ in reports],
            rows=comparison.rows,
            trade=trade_chart(trade, "top-1 accuracy" if labelled else "agreement")
            if len(trade) == len(reports)
            else "",
            layers=[
                {
                    "name": layer.name,
                    "runs": [
                        None
                        if kept is None
                        else {
                            "number": run + 1,
                            "kept": kept,
                            "units": layer.units,
                            "bar": width_bar(
                                layer.units, kept, widest, f"{layer.name}, run {run + 1}", place * len(reports) + run
                            ),
                        }
                        for run, kept in enumerate(layer.kept)
                    ],
                }
                for place, layer in enumerate(comparison.layers)
            ],
        )
    )


def verdict(gates: Sequence[Check]) -> dict[str, str]:
    """Whether all gates passed, in words and as a style."""
    if not gates:
        return {"style": "none", "text": "No gate was set"}
    failed = [gate.name for gate in gates if not gate.passed]
    if failed:
        return {"style": "failed", "text": f"✗ Failed: {', '.join(failed)}"}
    return {"style": "passed", "text": f"✓ Passed: {', '.join(gate.name for gate in gates)}"}


def tiles(report: RunReport) -> list[dict[str, str]]:
    """The headline figures."""
    cost, evaluation = report.cost, report.evaluation
    figures = [
        {"name": name, "figure": f"{pair.factor:.2f}×", "detail": f"{pair.before:,} → {pair.after:,}"}
        for name, pair in (
            ("fewer parameters", cost.parameters),
            ("fewer MACs", cost.macs),
            ("fewer bytes on disk", cost.bytes),
        )
    ]
    for latency in cost.latency[-1:]:
        name = f"faster, batch {latency.batch_size}, {latency.device}"
        detail = f"{latency.before_ms:.2f} → {latency.after_ms:.2f} ms"
        figures.append({"name": name, "figure": f"{latency.factor:.2f}×", "detail": detail})
    if evaluation is None:
        return figures
    if evaluation.top1 is not None:
        before, after = (100 * value for value in evaluation.top1)
        figure = f"{after - before:+.2f}".replace("-", "−")
        figures.append({"name": "points of accuracy", "figure": figure, "detail": f"{before:.2f} → {after:.2f} %"})
    detail = f"on {evaluation.samples:,} samples"
    if evaluation.agreement is not None:
        figure = f"{100 * evaluation.agreement:.2f} %"
        figures.append({"name": "same class as before", "figure": figure, "detail": detail})
    else:
        figure = f"{evaluation.relative_output_change:.4f}"
        figures.append({"name": "relative output change", "figure": figure, "detail": detail})
    return figures


def search_view(report: RunReport) -> dict[str, Any] | None:
    """What the search made, as charts and rows; None without one."""
    if report.search is None or not report.search.trials:
        return None
    return {
        "quality": search_chart(report),
        "damage": damage_chart(report),
        "rows": search_rows(report.search.trials),
        "times": time_rows(report.search.times),
        "low_rank": low_rank_rows(report.search.low_rank),
        "low_rank_columns": LOW_RANK,
        "full_rank": report.search.full_rank,
    }


def cost_rows(report: RunReport) -> list[dict[str, Any]]:
    """The parts of the network that cost most, with their shares of the whole before and after."""
    parts = sorted(report.modules, key=lambda module: -max(share_of(module, report, "before")))[:MOST_PARTS]
    rows = []
    for number, module in enumerate(parts):
        cells = []
        for name, pair in (("parameters", module.parameters), ("MACs", module.macs)):
            whole = report.cost.parameters if name == "parameters" else report.cost.macs
            most = max(1, whole.before)
            bar = share_bar(pair.before / most, pair.after / most, f"{name} of {module.name}", f"{name[0]}-{number}")
            cells.append({"bar": bar, "text": f"{pair.before:,} → {pair.after:,}"})
        rows.append({"name": module.name or "(the network itself)", "cells": cells})
    return rows


def share_of(module: ModuleCost, report: RunReport, when: str) -> tuple[float, float]:
    """A part's shares of the network's parameters and multiply-accumulates."""
    pairs = ((module.parameters, report.cost.parameters), (module.macs, report.cost.macs))
    parameters, macs = (getattr(pair, when) / max(1, getattr(whole, when)) for pair, whole in pairs)
    return parameters, macs


def usage(report: RunReport) -> str:
    """How the network in the folder is loaded and used."""
    architecture = report.inputs.architecture
    shape = ", ".join(str(side) for side in architecture.input_shape)
    code = "" if architecture.spec.partition(":")[0] in BUILT_IN else ", trust_code=True"
    lines = [
        "import compress",
        "",
        f'network = compress.load("this-folder"{code})  # a torch.nn.Module in eval mode',
        f"# inputs: (batch, {shape}), {architecture.input_dtype}",
    ]
    if report.inputs.data.preprocessing is not None:
        lines.append(f"# prepared with {report.inputs.data.preprocessing}")
    return "\n".join(lines)


def recipe_text(report: RunReport) -> str:
    """The options that were set, or have a default that says something."""
    options = {name: value for name, value in report.recipe.items() if value not in (None, [], {}, "")}
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True).strip()


def bars(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """Every layer's width, drawn on one scale."""
    widest = max((layer.units for layer in layers), default=1)
    return [
        {
            "name": layer.name,
            "units": layer.units,
            "kept": layer.kept,
            "bar": width_bar(layer.units, layer.kept, widest, f"Width of {layer.name}", number),
        }
        for number, layer in enumerate(layers)
    ]


def layer_views(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """Layers with their charts; in a very deep network those that lost most units."""
    drawn = layers
    if len(layers) > MOST_DRAWN:
        order = sorted(range(len(layers)), key=lambda place: layers[place].kept / max(1, layers[place].units))
        drawn = [layers[place] for place in sorted(order[:MOST_DRAWN])]
    most = points_per_curve(len(drawn))
    return [
        {
            "name": layer.name,
            "units": layer.units,
            "kept": layer.kept,
            "facts": layer.facts,
            "curve_chart": error_chart(layer, number, most),
            "spectrum_chart": spectrum_chart(layer, number, most),
        }
        for number, layer in enumerate(drawn)
    ]


def certificate_row(layer: LayerReport) -> tuple[str, ...]:
    """One layer's errors and certificate."""
    lasso = layer.certificate
    certificate = ("–", "–", "–", "–")
    if lasso is not None:
        certificate = (
            f"{lasso.penalty:.2e}",
            f"{lasso.objective:.4g}",
            f"{lasso.relative_duality_gap:.1e}",
            str(lasso.active_units),
        )
    errors = (decimals(layer.fit.error), decimals(layer.fit.held_back_error))
    return (layer.name, *errors, *certificate, f"{layer.fit.rows:,}")


def evaluation_view(evaluation: EvaluationReport) -> dict[str, Any]:
    """What the page shows of the evaluation."""
    name = evaluation.name_of
    classes = sorted(evaluation.per_class, key=lambda score: (score.compressed - score.original, score.label))
    shown = classes
    if len(classes) > MOST_CLASSES:
        most = sorted(classes, key=lambda score: -abs(score.compressed - score.original))[:MOST_CLASSES]
        shown = [score for score in classes if score in most]
    return {
        "said": evaluation_sentence(evaluation),
        "left_out": len(classes) - len(shown),
        "classes": [
            {
                "name": name(score.label),
                "chart": class_chart(name(score.label), score.original, score.compressed, number),
                "change": class_change(score),
            }
            for number, score in enumerate(shown)
        ],
        "changes": [(name(was), name(now), f"{count:,}") for was, now, count in evaluation.changes[:MOST_CHANGES]],
        "cases": [
            {
                "index": case.index,
                "label": None if case.label is None else name(case.label),
                "original": name(case.original),
                "compressed": name(case.compressed),
                "before": f"{100 * case.probabilities.before:.0f} %",
                "after": f"{100 * case.probabilities.after:.0f} %",
                "thumbnail": case.thumbnail,
            }
            for case in evaluation.disagreements
        ],
    }


def class_change(score: ClassScore) -> str:
    """Points won or lost on a class, with the interval where that is known."""
    change = f"{100 * (score.compressed - score.original):+.1f}"
    if score.interval is None:
        return f"{change} points"
    low, high = (-end for end in reversed(score.interval))  # a loss is counted positive there
    return f"{change} ({low:+.1f} … {high:+.1f})"


def evaluation_sentence(evaluation: EvaluationReport) -> str:
    """How both networks did, in one sentence."""
    parts = [f"{evaluation.samples:,} samples"]
    if evaluation.top1 is not None:
        parts.append(f"top-1 {100 * evaluation.top1.before:.2f} → {100 * evaluation.top1.after:.2f} %")
    if evaluation.losses is not None:
        parts.append(f"loss {evaluation.losses.before:.4f} → {evaluation.losses.after:.4f}")
    if evaluation.squared_error is not None:
        parts.append(f"squared error {evaluation.squared_error.before:.5g} → {evaluation.squared_error.after:.5g}")
    if evaluation.agreement is not None:
        parts.append(f"both predict the same class on {100 * evaluation.agreement:.2f} %")
    parts.append(f"relative output change {evaluation.relative_output_change:.4f}")
    return "; ".join(parts) + "."


def origin_rows(report: RunReport) -> list[tuple[str, str]]:
    """Where everything came from."""
    inputs, data = report.inputs, report.inputs.data
    rows = [
        ("checkpoint", f"{report.checkpoint.file}, SHA-256 {report.checkpoint.sha256}"),
        ("architecture", f"{inputs.architecture.spec} {inputs.architecture.arguments or ''}".strip()),
    ]
    for name, source in (("calibration", data.fitting), ("evaluation", data.evaluation)):
        if source is not None:
            rows.append((f"{name} data", f"{source.source}, {source.samples:,} samples, {source.fingerprint}"))
    rows += [(f"{name}, SHA-256", digest) for name, digest in sorted(report.hashes.items())]
    for name, deviation in (
        ("narrowed network against the masked original", report.verification.narrowed_deviation),
        ("reloaded in a fresh process", report.verification.reload_deviation),
    ):
        if deviation is not None:
            rows.append((name, f"{deviation:.1e} relative"))
    rows.append(("seed", str(inputs.seed)))
    return [*rows, *inputs.versions.items()]

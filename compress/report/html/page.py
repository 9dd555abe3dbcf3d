"""From the content of report.json to a page: the same report gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from compress.report.html.charts import (
    class_chart,
    error_chart,
    points_per_curve,
    spectrum_chart,
    trade_chart,
    width_bar,
)
from compress.report.markdown import comparison, decimals, export_rows, headline, ratio, summary_rows

MOST_CLASSES = 40
MOST_CHANGES = 12
MOST_DRAWN = 120  # layers with curves of their own; a page stays below 1.5 MB


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


def render_report(report: Mapping[str, Any]) -> str:
    """The page of one run. A value that an older report lacks is left out; see `compress report` for rebuilding."""
    layers = [layer for layer in report["layers"] if "skipped" not in layer]
    evaluation = evaluation_view(report["evaluation"])
    sections = [("summary", "Before and after"), ("widths", "Widths"), ("layers", "Layers")]
    sections += [("certificates", "Certificates")]
    sections += [("evaluation", "Evaluation")] if evaluation else []
    sections += [("recipe", "Recipe"), ("origin", "Versions and hashes")]
    gates = report.get("gates") or []
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=f"{report['checkpoint']['file']} compressed",
            style=_style(),
            report=report,
            headline=headline(report),
            verdict=verdict(gates),
            sections=sections,
            tiles=tiles(report),
            summary=summary_rows(report),
            gates=[
                (one["name"], one["wanted"], one["measured"], "passed" if one["passed"] else "failed") for one in gates
            ],
            exports=export_rows(report),
            bars=bars(layers),
            skipped=[layer for layer in report["layers"] if "skipped" in layer],
            layers=layer_views(layers),
            certificates=[certificate_row(layer) for layer in layers],
            forms=[(layer["name"], layer["lasso"]["form"]) for layer in layers if layer["lasso"]],
            evaluation=evaluation,
            recipe=yaml.safe_dump(report.get("recipe") or {}, sort_keys=False, allow_unicode=True).strip(),
            origin=origin_rows(report),
        )
    )


def render_comparison(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A page with several runs, each (name, report), side by side."""
    found = comparison(reports)
    labelled = all(run["top1"] is not None for run in found["runs"])
    quality = "top1" if labelled else "agreement"
    trade = [
        (run["name"], 100 * run["parameters_kept"], 100 * run[quality])
        for run in found["runs"]
        if run[quality] is not None
    ]
    widest = max((layer["units"] for layer in found["layers"]), default=1)
    return (
        _environment()
        .get_template("compare.html.j2")
        .render(
            title=f"{len(reports)} runs compared",
            style=_style(),
            names=[name for name, _ in reports],
            rows=found["rows"],
            trade=trade_chart(trade, "top-1 accuracy" if labelled else "agreement")
            if len(trade) == len(reports)
            else "",
            layers=[
                {
                    "name": layer["name"],
                    "runs": [
                        None
                        if kept is None
                        else {
                            "number": run + 1,
                            "kept": kept,
                            "units": layer["units"],
                            "bar": width_bar(
                                layer["units"],
                                kept,
                                widest,
                                f"{layer['name']}, run {run + 1}",
                                place * len(reports) + run,
                            ),
                        }
                        for run, kept in enumerate(layer["kept"])
                    ],
                }
                for place, layer in enumerate(found["layers"])
            ],
        )
    )


def verdict(gates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Whether all gates passed, in words and as a style."""
    if not gates:
        return {"style": "none", "text": "No gate was set"}
    failed = [one["name"] for one in gates if not one["passed"]]
    if failed:
        return {"style": "failed", "text": f"✗ Failed: {', '.join(failed)}"}
    return {"style": "passed", "text": f"✓ Passed: {', '.join(one['name'] for one in gates)}"}


def tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The headline figures."""
    cost, evaluation = report["cost"], report["evaluation"]
    found = [
        {"name": name, "figure": f"{ratio(cost[key]):.2f}×", "detail": f"{cost[key][0]:,} → {cost[key][1]:,}"}
        for key, name in (("parameters", "fewer parameters"), ("macs", "fewer MACs"), ("bytes", "fewer bytes on disk"))
    ]
    for latency in cost["latency"][-1:]:
        before, after = latency["before_ms"], latency["after_ms"]
        name = f"faster, batch {latency['batch_size']}, {latency['device']}"
        found.append({"name": name, "figure": f"{before / after:.2f}×", "detail": f"{before:.2f} → {after:.2f} ms"})
    if evaluation is None:
        return found
    if evaluation["original"] is not None:
        before, after = 100 * evaluation["original"]["top1"], 100 * evaluation["compressed"]["top1"]
        detail = f"{before:.2f} → {after:.2f} %"
        found.append(
            {"name": "points of accuracy", "figure": f"{after - before:+.2f}".replace("-", "−"), "detail": detail}
        )
    if evaluation["agreement"] is not None:
        share = f"{100 * evaluation['agreement']:.2f} %"
        detail = f"on {evaluation['samples']:,} samples"
        found.append({"name": "same class as before", "figure": share, "detail": detail})
    else:
        change, detail = f"{evaluation['relative_output_change']:.4f}", f"on {evaluation['samples']:,} samples"
        found.append({"name": "relative output change", "figure": change, "detail": detail})
    return found


def bars(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every layer's width, drawn on one scale."""
    widest = max((layer["units"] for layer in layers), default=1)
    return [
        {
            "name": layer["name"],
            "units": layer["units"],
            "kept": layer["kept"],
            "bar": width_bar(layer["units"], layer["kept"], widest, f"Width of {layer['name']}", number),
        }
        for number, layer in enumerate(layers)
    ]


def layer_views(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers with their charts; in a very deep network those that lost most units."""
    drawn = layers
    if len(layers) > MOST_DRAWN:
        order = sorted(range(len(layers)), key=lambda place: layers[place]["kept"] / max(1, layers[place]["units"]))
        drawn = [layers[place] for place in sorted(order[:MOST_DRAWN])]
    most = points_per_curve(len(drawn))
    return [
        {
            **layer,
            "curve_chart": error_chart(layer, number, most),
            "spectrum_chart": spectrum_chart(layer, number, most),
        }
        for number, layer in enumerate(drawn)
    ]


def certificate_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """One layer's errors and certificate."""
    lasso = layer["lasso"]
    certificate = ("–", "–", "–", "–")
    if lasso:
        certificate = (
            f"{lasso['penalty']:.2e}",
            f"{lasso['objective']:.4g}",
            f"{lasso['relative_duality_gap']:.1e}",
            str(lasso["active_units"]),
        )
    return (
        layer["name"],
        decimals(layer["error"]),
        decimals(layer["held_back_error"]),
        *certificate,
        f"{layer['rows']:,}",
    )


def evaluation_view(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of the evaluation."""
    if evaluation is None:
        return None
    names = evaluation.get("class_names")

    def name(label: int) -> str:
        return names[label] if names and 0 <= label < len(names) else str(label)

    classes = sorted(
        ((int(label), one) for label, one in evaluation["per_class"].items()),
        key=lambda pair: (pair[1]["compressed"] - pair[1]["original"], pair[0]),
    )
    shown = classes
    if len(classes) > MOST_CLASSES:
        most = sorted(classes, key=lambda pair: -abs(pair[1]["compressed"] - pair[1]["original"]))[:MOST_CLASSES]
        shown = [pair for pair in classes if pair in most]
    return {
        "said": evaluation_sentence(evaluation),
        "left_out": len(classes) - len(shown),
        "classes": [
            {
                "name": name(label),
                "chart": class_chart(name(label), one["original"], one["compressed"], number),
                "change": f"{100 * (one['compressed'] - one['original']):+.1f} points",
            }
            for number, (label, one) in enumerate(shown)
        ],
        "changes": [
            (name(was), name(now), f"{count:,}") for was, now, count in (evaluation.get("changes") or [])[:MOST_CHANGES]
        ],
        "cases": [
            {
                "index": case["index"],
                "label": None if case["label"] is None else name(case["label"]),
                "original": name(case["original"]),
                "compressed": name(case["compressed"]),
                "before": f"{100 * case['probabilities'][0]:.0f} %",
                "after": f"{100 * case['probabilities'][1]:.0f} %",
                "thumbnail": case["thumbnail"],
            }
            for case in evaluation.get("disagreements") or []
        ],
    }


def evaluation_sentence(evaluation: Mapping[str, Any]) -> str:
    """How both networks did, in one sentence."""
    parts = [f"{evaluation['samples']:,} samples"]
    if evaluation["original"] is not None:
        before, after = evaluation["original"], evaluation["compressed"]
        parts.append(f"top-1 {100 * before['top1']:.2f} → {100 * after['top1']:.2f} %")
        parts.append(f"loss {before['loss']:.4f} → {after['loss']:.4f}")
    if evaluation["agreement"] is not None:
        parts.append(f"both predict the same class on {100 * evaluation['agreement']:.2f} %")
    parts.append(f"relative output change {evaluation['relative_output_change']:.4f}")
    return "; ".join(parts) + "."


def origin_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where everything came from."""
    data = report["data"]
    rows = [
        ("checkpoint", f"{report['checkpoint']['file']}, SHA-256 {report['checkpoint']['sha256']}"),
        ("architecture", f"{report['architecture']['spec']} {report['architecture']['arguments'] or ''}".strip()),
    ]
    for name in ("calibration", "evaluation"):
        if data[name] is not None:
            source = data[name]
            rows.append((f"{name} data", f"{source['source']}, {source['samples']:,} samples, {source['fingerprint']}"))
    rows += [(f"{name}, SHA-256", digest) for name, digest in sorted((report.get("hashes") or {}).items())]
    deviations = report["verification"]
    rows.append(("narrowed network against the masked original", f"{deviations['narrowed_deviation']:.1e} relative"))
    if deviations.get("reload_deviation") is not None:
        rows.append(("reloaded in a fresh process", f"{deviations['reload_deviation']:.1e} relative"))
    rows.append(("seed", str(report["seed"])))
    return rows + [(name, version) for name, version in report["versions"].items()]

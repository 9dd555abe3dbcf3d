"""The whole network and its search drawn: widths to scale, quality against cost, damage foretold and measured."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from compress.report.html.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes, dot, drawing, rule, text
from compress.report.html.scales import Axis
from compress.report.model import LayerReport, RunReport, SkippedLayer, Trial

STRIP = 1000, 150  # of the network's strip
GAP = 0.16  # of a column, between two layers
COSTS = {"macs": "MACs", "params": "parameters", "latency": "latency", "bytes": "bytes"}


def in_order(report: RunReport) -> list[LayerReport | SkippedLayer]:
    """All layers in the order of the network; where that is not known, the skipped ones last."""
    unordered: list[LayerReport | SkippedLayer] = [*report.layers, *report.skipped]
    layers = {layer.name: layer for layer in unordered}
    return list({name: layers[name] for name in (*report.order, *layers) if name in layers}.values())


def strip_chart(report: RunReport) -> Markup:
    """The network from input (left) to output (right), a column a layer: its units, the kept ones filled."""
    layers = in_order(report)
    widest = max((layer.units for layer in layers), default=1) or 1
    step, height = STRIP[0] / max(1, len(layers)), STRIP[1]
    parts = []
    for number, layer in enumerate(layers):
        left, width = (number + GAP / 2) * step, (1 - GAP) * step
        kept = layer.kept if isinstance(layer, LayerReport) else layer.units
        outline = "all" if kept else "gone"
        whole, full = (max(1.0, height * min(1.0, count / widest)) if count else 0.0 for count in (layer.units, kept))
        if isinstance(layer, LayerReport):
            said = f"{layer.name}: {layer.said}"
        else:
            said = f"{layer.name}: {layer.units} units, not cut: {layer.reason}"
        style = "kept" if isinstance(layer, LayerReport) else "left"
        parts.append(
            Markup(
                '<g><title>{}</title><rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/></g>'
            ).format(said, outline, left, height - whole, width, whole, style, left, height - full, width, full)
        )
    cut = sum(layer.kept < layer.units for layer in report.layers)
    said = f"{cut} of {len(layers)} layers lost units; the widest has {widest}"
    return drawing("strip", "The network, layer by layer", said, parts, STRIP, "network")


def search_chart(report: RunReport) -> Markup:
    """Quality of every network that the search made against what it costs; empty where there is nothing to show."""
    if report.search is None:
        return Markup("")
    points = [
        (number, 100 * cost, quality)
        for number, trial in enumerate(report.search.trials, 1)
        if (quality := quality_of(trial)) is not None
        for cost in [trial.costs.get(cost_name(report))]
        if cost is not None
    ]
    if not points:
        return Markup("")
    first = next(trial for trial in report.search.trials if quality_of(trial) is not None).held_back
    whole = 100.0 if first is None or first.top1 is None else 100 * first.top1.before
    values = [whole, *(quality for _, _, quality in points)]
    margin = max(0.5, 0.15 * (max(values) - min(values)))
    x = Axis(0, max(105.0, *(cost for _, cost, _ in points)), LEFT, WIDTH - RIGHT)
    y = Axis(min(values) - margin, max(values) + margin, HEIGHT - BOTTOM, TOP)
    name = "accuracy" if first is not None and first.top1 is not None else "agreement"
    parts = [axes(x, y, f"{COSTS.get(cost_name(report), 'cost')} kept, %", f"held-back {name}, %")]
    parts.append(rule(LEFT, y(whole), WIDTH - RIGHT, y(whole), "bound"))
    parts += [dot(x(100), y(whole), 4, "before"), text(x(100) - 6, y(whole) - 7, "original", "note end")]
    for number, cost, quality in points:
        last = number == len(report.search.trials)
        parts.append(dot(x(cost), y(quality), 5 if last else 3.5, "chosen" if last else "held"))
        parts.append(text(x(cost) + 7, y(quality) + 4, str(number), "mark" if last else "note"))
    said = "; ".join(f"network {number}: {cost:.1f} % kept, {quality:.2f} %" for number, cost, quality in points)
    return drawing("search-quality", f"Held-back {name} against cost", said, parts)


def cost_name(report: RunReport) -> str:
    """The cost that the search was held to, or else the first that it knows."""
    costs = list(report.search.predicted_costs) if report.search is not None else []
    asked = [name for name in costs if report.recipe.get(name) is not None]
    return next(iter([*asked, *costs]), "macs")


def quality_of(trial: Trial) -> float | None:
    """Held-back accuracy in per cent, or agreement without labels; None where the outputs have neither."""
    score = trial.held_back
    if score is None:
        return None
    if score.top1 is not None:
        return 100 * score.top1.after
    return None if score.agreement is None else 100 * score.agreement


def damage_chart(report: RunReport) -> Markup:
    """Damage that the search foretold (across) and measured on held-back samples (up), for every network it made."""
    if report.search is None:
        return Markup("")
    points = [
        (number, trial.predicted_damage, trial.held_back.distance)
        for number, trial in enumerate(report.search.trials, 1)
        if trial.held_back is not None and trial.held_back.distance is not None and trial.held_back.distance > 0
        if trial.predicted_damage > 0
    ]
    if not points:
        return Markup("")
    values = [value for _, *pair in points for value in pair]
    low, high = 10 ** power_of(min(values)), 10 ** (power_of(max(values)) + 1)
    x, y = Axis(low, high, LEFT, WIDTH - RIGHT, log=True), Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
    parts = [axes(x, y, "foretold damage", "measured, held back"), rule(x(low), y(low), x(high), y(high), "bound")]
    for number, foretold, measured in points:
        last = number == len(report.search.trials)
        parts.append(dot(x(foretold), y(measured), 5 if last else 3.5, "chosen" if last else "held"))
        parts.append(text(x(foretold) + 7, y(measured) + 4, str(number), "mark" if last else "note"))
    said = "; ".join(
        f"network {number}: {foretold:.3g} foretold, {measured:.3g}" for number, foretold, measured in points
    )
    return drawing("search-damage", "Damage foretold and measured", said, parts)


def power_of(value: float) -> int:
    """The power of ten at or below a positive value, from -30 up."""
    return next((power for power in range(30, -30, -1) if value >= 10.0**power), -30)


def search_rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Rows (number, costs, foretold damage, quality, refining sweeps) of what the search made."""
    rows: list[tuple[str, ...]] = []
    for number, trial in enumerate(trials, 1):
        costs = ", ".join(f"{100 * value:.1f} % {COSTS.get(name, name)}" for name, value in trial.costs.items())
        quality = quality_of(trial)
        shown = "–" if quality is None else f"{quality:.2f} %"
        rows.append((str(number), costs, f"{trial.predicted_damage:.3g}", shown, str(trial.refining_sweeps)))
    return rows

"""Charts as inline SVG: colours come from the page's style sheet, words from `title` and `desc`."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from compress.report.html.scales import Axis, tick_label
from compress.report.model import LayerReport, Spectra

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 36
FLOOR = 1e-6  # the smallest value that a logarithmic axis shows
ALL_POINTS = 9000  # of all curves on one page, which bounds its size
FEWEST_POINTS = 24

Points = Sequence[tuple[float, float | None]]


def points_per_curve(layers: int) -> int:
    """How many points each curve may have, so that a page of many layers stays small."""
    return max(FEWEST_POINTS, min(200, ALL_POINTS // max(1, layers)))


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` of the points that have a value, first and last among them."""
    known = [(float(x), float(y)) for x, y in points if y is not None]
    if len(known) <= most:
        return known
    return [known[round(step * (len(known) - 1) / (most - 1))] for step in range(most)]


def error_chart(layer: LayerReport, number: int, most: int = 200) -> Markup:
    """error(width) of one layer: the selection's curve, the widths tried on held-back samples, and the chosen one."""
    curve = thin(layer.widths.curve or (), most)
    tried = [(width, error) for width, error in layer.widths.tried if error is not None]
    values = [y for _, y in (curve or tried) if y > 0]
    low = 10 ** -next((power for power in range(1, 6) if values and min(values) >= 10**-power), 6)
    x = Axis(0, layer.units, LEFT, WIDTH - RIGHT)
    y = Axis(low, max([1.0, *values]), HEIGHT - BOTTOM, TOP, log=True)
    parts = [axes(x, y, "units kept", "relative error")]
    bound = layer.facts.bound
    if bound < layer.units:
        parts.append(rule(x(bound), TOP, x(bound), HEIGHT - BOTTOM, "bound"))
        parts.append(text(x(bound) + 3, TOP + 9, f"bound {bound}", "note"))
    parts.append(polyline([(x(width), y(error)) for width, error in curve], "line first"))
    parts += [dot(x(width), y(error), 2.5, "held") for width, error in tried if error >= low]
    chosen = layer.fit.held_back_error if layer.fit.held_back_error is not None else layer.fit.error
    said = layer.said
    if chosen is not None:
        place = x(layer.kept), y(chosen)
        parts.append(rule(place[0], place[1], place[0], HEIGHT - BOTTOM, "guide"))
        parts.append(rule(LEFT, place[1], place[0], place[1], "guide"))
        parts.append(dot(*place, 5, "chosen"))
        said += f", held-back error {chosen:.4f}"
    return drawing(f"curve-{number}", f"Error by width of {layer.name}", said, parts)


def spectrum_chart(layer: LayerReport, number: int, most: int = 200) -> Markup:
    """Relative singular values of Φ and Ψ, the tolerance, and the two numerical ranks."""
    spectra = layer.facts.spectra or Spectra(FLOOR, (), ())
    features, outputs = (thin(points, most) for points in (spectra.features, spectra.outputs))
    last = max([2.0, *(place for place, _ in (*features, *outputs))])
    x = Axis(1, last, LEFT, WIDTH - RIGHT)
    y = Axis(min(FLOOR, spectra.tolerance), 1, HEIGHT - BOTTOM, TOP, log=True)
    parts = [axes(x, y, "number", "singular value / largest")]
    parts.append(rule(LEFT, y(spectra.tolerance), WIDTH - RIGHT, y(spectra.tolerance), "bound"))
    ranks = (layer.facts.rank_features, layer.facts.rank_outputs)
    for points, rank, style in zip((features, outputs), ranks, ("first", "second"), strict=True):
        parts.append(polyline([(x(place), y(value)) for place, value in points], f"line {style}"))
        if rank:
            parts.append(rule(x(rank), y(spectra.tolerance), x(rank), HEIGHT - BOTTOM, f"rank {style}"))
            parts.append(dot(x(rank), y(spectra.tolerance), 3, style))
    return drawing(f"spectrum-{number}", f"Spectra of {layer.name}", layer.facts.bound_text, parts)


def class_chart(name: str, before: float, after: float, number: int) -> Markup:
    """One class's accuracy before (ring) and after (disc) on a line from 0 to 1."""
    x = Axis(0, 1, 1.5, 98.5)
    worse = "lost" if after < before else "won" if after > before else "same"
    parts = [
        rule(x(0), 5, x(1), 5, "axis"),
        rule(x(before), 5, x(after), 5, f"change {worse}"),
        dot(x(before), 5, 1.5, "before"),
        dot(x(after), 5, 1.5, f"after {worse}"),
    ]
    said = f"{100 * before:.1f} % before, {100 * after:.1f} % after"
    return drawing(f"class-{number}", f"Accuracy on class {name}", said, parts, (100, 10), "strip")


def width_bar(units: int, kept: int, widest: int, label: str, number: int) -> Markup:
    """A layer's units (outline) and the kept ones (filled), on the scale of the widest layer."""
    scale = 1000 / max(1, widest)
    parts = [
        Markup('<rect class="all" x="0" y="0" width="{:.1f}" height="20"/>').format(units * scale),
        Markup('<rect class="kept" x="0" y="0" width="{:.1f}" height="20"/>').format(kept * scale),
    ]
    return drawing(f"bar-{number}", label, f"{kept} of {units} units kept", parts, (1000, 20), "bar")


def share_bar(before: float, after: float, title: str, number: str) -> Markup:
    """Shares of a whole before (pale) and after (full)."""
    parts = [
        Markup('<rect class="all" x="0" y="0" width="{:.1f}" height="20"/>').format(1000 * min(1.0, before)),
        Markup('<rect class="part" x="0" y="0" width="{:.1f}" height="20"/>').format(1000 * min(1.0, after)),
    ]
    said = f"{100 * before:.1f} % of the original before, {100 * after:.1f} % after"
    return drawing(f"share-{number}", title, said, parts, (1000, 20), "bar")


def trade_chart(runs: Sequence[tuple[str, float, float]], quality: str) -> Markup:
    """Runs as points: parameters kept (%, across) against a quality (%, up), numbered from 1 as in the table."""
    across, up = [kept for _, kept, _ in runs], [value for _, _, value in runs]
    margin = max(0.5, 0.15 * (max(up) - min(up)))
    x = Axis(0, max(across) * 1.15, LEFT, WIDTH - RIGHT)
    y = Axis(min(up) - margin, max(up) + margin, HEIGHT - BOTTOM, TOP)
    parts = [axes(x, y, "parameters kept, %", f"{quality}, %")]
    for number, (_, kept, value) in enumerate(runs, 1):
        parts += [dot(x(kept), y(value), 5, "chosen"), text(x(kept) + 7, y(value) + 4, str(number), "mark")]
    said = "; ".join(f"{name}: {kept:.1f} % kept, {value:.2f} %" for name, kept, value in runs)
    return drawing("trade", f"Parameters kept against {quality}", said, parts)


def drawing(
    name: str, title: str, said: str, parts: Sequence[Markup], size: tuple[int, int] = (WIDTH, HEIGHT), style: str = ""
) -> Markup:
    """An SVG with an accessible name and description."""
    stretch = Markup(' preserveAspectRatio="none"') if style in ("bar", "network") else Markup("")
    head = Markup(
        '<svg class="{}" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d"{}>'
        '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>'
    ).format(style or "chart", *size, name, name, stretch, name, title, name, said)
    return head + Markup("").join(parts) + Markup("</svg>")


def axes(x: Axis, y: Axis, across: str, up: str) -> Markup:
    """Both axes with ticks, grid lines and titles."""
    parts = []
    for value in y.ticks():
        parts.append(rule(LEFT, y(value), WIDTH - RIGHT, y(value), "grid"))
        parts.append(text(LEFT - 5, y(value) + 3.5, tick_label(value), "tick end"))
    for value in x.ticks():
        parts.append(rule(x(value), HEIGHT - BOTTOM, x(value), HEIGHT - BOTTOM + 4, "axis"))
        parts.append(text(x(value), HEIGHT - BOTTOM + 15, tick_label(value), "tick middle"))
    parts.append(rule(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, across, "name middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        Markup('<text class="name middle" transform="translate(9 {:.1f}) rotate(-90)">{}</text>').format(middle, up)
    )
    return Markup("").join(parts)


def rule(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return Markup(f'<line class="{escape(style)}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def polyline(points: Sequence[tuple[float, float]], style: str) -> Markup:
    """A line through points."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup(f'<polyline class="{escape(style)}" points="{places}"/>')


def dot(x: float, y: float, radius: float, style: str) -> Markup:
    """A mark."""
    return Markup(f'<circle class="{escape(style)}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>')


def text(x: float, y: float, content: str, style: str) -> Markup:
    """A label."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, content)

"""Writes the pictures of README.md and the site: `python docs/pictures/make.py`. A test holds them fresh."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks/results/quality-resnet20.json"  # `benchmarks.quality --json`
DRAWN = {  # what the picture calls a method of the benchmark
    "ours": "compress",
    "ThiNet greedy + LS": "greedy, same refit",
    "TP magnitude + LS": "magnitude, same refit",
    "TP magnitude": "magnitude",
}
COLOURS = ("#3f51b5", "#00897b", "#ef6c00", "#9e9e9e")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 52, 170, 34, 44
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.axis{stroke:#999}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#777}.grid{stroke:#444}}"
)


def read_results(path: Path) -> tuple[list[float], dict[str, list[float]]]:
    """Shares of the MACs from 1 down, and test top-1 % at each by method, the original's in front."""
    (table,) = json.loads(path.read_text(encoding="utf-8"))["tables"]
    original = float(re.search(r"original ([\d.]+)", table["title"])[1])
    shares = [float(title.split()[0]) for title in table["header"][1:]]
    found = {name: values for name, *values in table["rows"]}
    return [1.0, *shares], {title: [original, *found[name]] for name, title in DRAWN.items()}


def draw(shares: Sequence[float], series: Mapping[str, Sequence[float]]) -> str:
    """The picture, as SVG: accuracy against the share of the work that is kept."""

    def at(share: float, accuracy: float) -> tuple[float, float]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        return LEFT + (1 - share) / 0.75 * (right - LEFT), bottom - accuracy / 100 * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Accuracy of a ResNet-20 by share of its multiply-accumulates kept">',
        f"<style>{STYLE}</style>",
        f'<text x="{LEFT}" y="18">ResNet-20, CIFAR-10: test accuracy % without fine-tuning</text>',
    ]
    for accuracy in range(0, 101, 20):
        x, y = at(1, accuracy)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{accuracy}</text>')
    for share in shares:
        x, y = at(share, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{share:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">share of the multiply-accumulates kept</text>')
    for (name, values), colour in zip(series.items(), COLOURS, strict=True):
        points = [at(share, value) for share, value in zip(shares, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        width = 3 if name == "compress" else 1.5
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 0.5}" fill="{colour}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<text x="{x + 10:.1f}" y="{y + 4:.1f}" style="fill:{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


PICTURES = {"resnet20.svg": draw(*read_results(RESULTS))}

if __name__ == "__main__":
    for file, content in PICTURES.items():
        (Path(__file__).parent / file).write_text(content, encoding="utf-8")

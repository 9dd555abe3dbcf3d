"""Writes the pictures of README.md and the site: `python docs/pictures/make.py`. A test holds them fresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

ORIGINAL = 92.92
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)
# A stranger's ResNet-20 on CIFAR-10, test top-1 % by share of the MACs kept, nothing fine-tuned: `benchmarks.quality`.
RESNET20 = {
    "compress": (91.47, 86.99, 81.39, 73.42),
    "greedy, same refit": (89.78, 82.05, 73.60, 67.31),
    "magnitude, same refit": (90.29, 81.74, 69.91, 61.05),
    "magnitude": (52.67, 16.09, 8.31, 9.97),
}
COLOURS = ("#3f51b5", "#00897b", "#ef6c00", "#9e9e9e")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 52, 170, 34, 44
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.axis{stroke:#999}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#777}.grid{stroke:#444}}"
)


def draw(series: Mapping[str, Sequence[float]]) -> str:
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
    for share in SHARES:
        x, y = at(share, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{share:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">share of the multiply-accumulates kept</text>')
    for (name, values), colour in zip(series.items(), COLOURS, strict=True):
        points = [at(share, value) for share, value in zip(SHARES, (ORIGINAL, *values), strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        width = 3 if name == "compress" else 1.5
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 0.5}" fill="{colour}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(f'<text x="{x + 10:.1f}" y="{y + 4:.1f}" style="fill:{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


PICTURES = {"resnet20.svg": draw(RESNET20)}

if __name__ == "__main__":
    for file, content in PICTURES.items():
        (Path(__file__).parent / file).write_text(content, encoding="utf-8")

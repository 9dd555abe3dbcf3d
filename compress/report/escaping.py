"""Names from outside inside Markdown: they stay text, whatever they hold."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*_\[\]~|$])")
FENCES = re.compile("`+")


def escaped(text: str) -> str:
    """Text in one line in which Markdown and HTML see nothing of their own."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", flat)


def code(text: str, *, cell: bool = False) -> str:
    """Text as a code span, fenced by more backticks than it holds; in the cell of a table bars are escaped too."""
    flat = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in FENCES.findall(flat)), default=0))
    if len(fence) > 1 or not flat:
        flat = f" {flat} "
    if cell:
        flat = flat.replace("|", "\\|")
    return f"{fence}{flat}{fence}"

"""Text for terminals that lack some of its characters."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable
from typing import Any

SPELLED = str.maketrans({
    "→": "->", "–": "-", "—": "-", "·": ".", "×": "x", "‖": "|", "Φ": "Phi", "Ψ": "Psi", "λ": "lambda", "Σ": "sum",
    "≤": "<=", "≥": ">=", "±": "+-", "²": "^2", "…": "...", "σ": "sigma", "ℓ": "l", "∞": "inf", "½": "1/2",
    "“": '"', "”": '"', "’": "'",
})  # fmt: skip


def spell(text: str, encoding: str) -> str:
    """The text in characters that the encoding has."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(SPELLED).encode(encoding, "backslashreplace").decode(encoding)
    return text


def spell_all(streams: Iterable[Any]) -> None:
    """Have every stream spell out what its encoding cannot show, whoever writes to it."""
    codecs.register_error("spelled", _spelled)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return spell(error.object[error.start : error.end], "ascii"), error.end

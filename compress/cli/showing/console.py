"""Consoles: text as it is given, plain ASCII where the terminal has no Unicode, no colours where nobody sees them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from compress.cli.spelling import spell


class PlainConsole(Console):
    """A console that reads no markup in what it prints, and spells out what the terminal's encoding cannot show.

    rich leaves colours out where the output is no terminal, or `NO_COLOR` is set.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, spelled for this terminal; brackets in it are no markup."""
        return super().render_str(spell(text, self.encoding), **{**options, "markup": False})

"""What a GitHub Actions step says: annotations, the step summary, outputs (docs.github.com, workflow commands)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from compress.errors import OutputError

LEVELS = ("error", "warning", "notice")


def annotation(level: str, message: str, title: str | None = None) -> str:
    """One workflow command that annotates the run: `::error title=…::message`, escaped. Raises ValueError."""
    if level not in LEVELS:
        raise ValueError(f"`level` must be one of {', '.join(LEVELS)}, got {level!r}.")
    properties = "" if title is None else f" title={escape_property(title)}"
    return f"::{level}{properties}::{escape_data(message)}"


def escape_data(text: str) -> str:
    """The text of a workflow command: percent signs and line breaks as hexadecimal codes."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """A property of a workflow command: colons and commas too."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def write_outputs(outputs: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> None:
    """Append the step's outputs to `$GITHUB_OUTPUT`; nothing outside of GitHub Actions. Raises OutputError."""
    append(environment.get("GITHUB_OUTPUT"), "".join(format_output(*pair) for pair in outputs.items()))


def format_output(name: str, value: str) -> str:
    """One output in the form with a delimiter, which no line of the value equals."""
    delimiter = f"end-{hashlib.sha256(value.encode()).hexdigest()[:16]}"
    return f"{name}<<{delimiter}\n{value}\n{delimiter}\n"


def write_summary(markdown: str, environment: Mapping[str, str] = os.environ) -> None:
    """Append to the step summary, `$GITHUB_STEP_SUMMARY`; nothing outside of GitHub Actions. Raises OutputError."""
    append(environment.get("GITHUB_STEP_SUMMARY"), markdown)


def append(path: str | None, text: str) -> None:
    """Append to a file that the runner named, where it named one. Raises OutputError."""
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"Cannot write {path!r}: {error.strerror or error}.") from None

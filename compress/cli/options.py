"""Options that are no part of a recipe, and what several commands need to declare and to print."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from typer import Argument, Option

OUTPUT = "Output"

Folder = Annotated[str, Argument(metavar="FOLDER", help="Folder written by a run.", show_default=False)]
Json = Annotated[bool, Option("--json", help="Print the report as JSON.")]
RecipeFile = Annotated[str | None, Option("--recipe", metavar="FILE", help="YAML with any of these options.")]
DryRun = Annotated[bool, Option("--dry-run", help="Do everything but write.")]
Resume = Annotated[
    bool, Option("--resume", help="Go on where a killed run of the same command stopped (state in OUT.state).")
]


Profile = Annotated[
    str | None,
    Option("--profile", metavar="FILE", help="Write where the time went, by stage (.json: as JSON)."),
]


def declare(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The command with these parameters as its signature, which is what the command line is made from."""
    command.__dict__.pop("__wrapped__", None)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Pure JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))

"""The page with every command and option, from the definitions that the command line itself is made from.

`python -m compress.cli.reference docs/reference.md` writes it; a test holds the two equal.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from compress.cli.app import load_command
from compress.cli.catalogue import COMMANDS
from compress.recipe import Recipe, TrainingOptions
from compress.recipe.option import options_of

EVERYDAY = "Everyday"


def reference_page() -> str:
    """The page, as Markdown."""
    parts = [
        "# Commands and options",
        "Written from the definitions of the options; `compress COMMAND --help` says the same. Options that are fields "
        "of a recipe may stand in the YAML of `--recipe` under the key given; those of a training stand in its section "
        "`training`. Every command also takes `--quiet`, `--verbose` and `--help`.",
        "| command | from Python | what it does |\n|---|---|---|",
    ]
    parts[-1] += "".join(
        f"\n| [`{name}`](#{name}) | `compress.{command.function}` | {cell(command.about)} |"
        for name, command in COMMANDS.items()
    )
    return "\n\n".join([*parts, *(section(name) for name in COMMANDS)]) + "\n"


def section(name: str) -> str:
    """One command: its usage, what it does, its options by panel."""
    module = import_module(f"compress.cli.commands.{name}")
    function, from_recipe = getattr(module, f"{name}_command"), hasattr(module, "takes")
    command = load_command(name)
    words = " ".join(
        each.metavar if each.required else f"[{each.metavar}]" for each in command.params if is_argument(each)
    )
    parts = [f"## {name}", f"`compress {name} {words} [OPTIONS]`".replace("  ", " "), inspect.getdoc(function) or ""]
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not is_argument(parameter) and parameter.name not in ("quiet", "verbose"):
            panels.setdefault(parameter.rich_help_panel or EVERYDAY, []).append(parameter)
    for panel, options in panels.items():
        rows = "".join(f"\n{row(option, from_recipe)}" for option in options)
        parts.append(f"**{panel}**\n\n| option | recipe key | what it is |\n|---|---|---|{rows}")
    return "\n\n".join(parts)


def row(parameter: Any, from_recipe: bool) -> str:
    """One option; `from_recipe` where the command's options are a recipe's."""
    flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
    shown = f" `{parameter.metavar.strip()}`" if (parameter.metavar or "").strip() else ""
    key = recipe_key(parameter.name) if from_recipe else ""
    default = own_default(parameter) if not key else ""
    return f"| {cell(flags + shown)} | {f'`{key}`' if key else ''} | {cell(parameter.help or '')}{default} |"


def recipe_key(name: str) -> str:
    """The key of an option in a recipe; empty for one that is the command's own."""
    section_name, _, inner = name.partition("_")
    if section_name == "training" and inner in options_of(TrainingOptions):
        return f"training.{inner}"
    return name if name in options_of(Recipe) else ""


def own_default(parameter: Any) -> str:
    """The default of an option that is the command's own, as part of its row."""
    default = parameter.default
    return "" if default is None or isinstance(default, bool) or callable(default) else f" Default: {default}."


def is_argument(parameter: Any) -> bool:
    """Whether a parameter is an argument of the command and not an option."""
    return bool(parameter.param_type_name == "argument")


def cell(text: str) -> str:
    """The text inside a table."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference_page(), encoding="utf-8")

"""The typer application that every command of this package registers with."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

DEFAULT_COMMAND = "run"


class DefaultToRun(TyperGroup):
    """`compress FILE …` is `compress run FILE …`: a first word that names no command is the checkpoint."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of anything that is neither a command nor a group option."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version", "-h"):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultToRun,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network smaller without retraining it: `compress FILE --data DATA` is the main job.\n\n"
    "Exit codes: 0 done, 1 a fault in input or run, 2 usage, 3 the accuracy or budget gate failed, "
    "4 nothing could be compressed, 5 architecture or file not supported, 130 interrupted.",
)


@app.callback(invoke_without_command=True)
def version_option(
    ctx: typer.Context, version: Annotated[bool, Option("--version", help="Print the version.")] = False
) -> None:
    """Make a trained network smaller without retraining it."""
    if version:
        from importlib.metadata import version as installed_version

        print(f"compress {installed_version('compress-networks')}")
        raise typer.Exit

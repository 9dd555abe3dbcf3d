"""The typer application: commands are found by name, and what names no command is a checkpoint to compress."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand, TyperGroup

from compress.cli.catalogue import COMMANDS
from compress.cli.options import say
from compress.cli.spelling import spell
from compress.errors import RecipeError, nearest

DEFAULT_COMMAND = "run"
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class WordedCommand(TyperCommand):
    """A command whose help names no Python type."""

    def get_params(self, ctx: Any) -> Any:
        """The arguments and options."""
        return in_words(super().get_params(ctx))


def in_words(parameters: Any) -> Any:
    """The parameters as this terminal can show them, without names of types: their own names say what they are."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for parameter in parameters:
        parameter.help = parameter.help and spell(parameter.help, encoding)
        parameter.metavar = parameter.metavar and spell(parameter.metavar, encoding)
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
        elif getattr(parameter, "is_flag", False):
            parameter.metavar = " "
    return parameters


class Commands(TyperGroup):
    """`compress FILE …` is `compress run FILE …`: a first word that names no command is the checkpoint."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of anything that is neither a command nor a group option."""
        if args and args[0] == "help":
            args = [*args[1:2], "--help"]
        flags = [name for parameter in self.get_params(ctx) for name in parameter.opts]
        if args and args[0] not in COMMANDS and args[0] not in flags and not ctx.resilient_parsing:
            refuse_misspelt_command(args[0])
        if args and args[0] not in COMMANDS and args[0] not in flags:
            args = [DEFAULT_COMMAND, *args]
        if args and args[0] == DEFAULT_COMMAND and not ctx.resilient_parsing:
            args = resume_as_flag(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> Any:
        """The options of `compress` itself."""
        return in_words(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command as the help lists it; its module is not imported for that."""
        entry = COMMANDS.get(cmd_name)
        return entry and TyperCommand(cmd_name, help=entry.about, rich_help_panel=entry.panel, rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(str(command.name)), rest


def load_command(name: str) -> Any:
    """The command of that name, from its module."""
    from compress.cli.loudness import heard

    function = getattr(import_module(f"compress.cli.commands.{name}"), f"{name}_command")
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, cls=WordedCommand, context_settings=SETTINGS)(heard(function))
    return typer.main.get_command(app)


def refuse_misspelt_command(word: str) -> None:
    """Refuse a first word that is no file and nearly a command. Raises RecipeError."""
    if word.startswith("-") or Path(word).exists() or any(sign in word for sign in "./\\:"):
        return
    if hint := nearest(word, list(COMMANDS)):
        raise RecipeError(f"There is no command and no file {word!r}{hint}.")


def resume_as_flag(args: list[str]) -> list[str]:
    """`--resume FOLDER`, as it was spelt until 0.1, as `--resume --output FOLDER`."""
    for place, word in enumerate(args):
        name, equals, folder = word.partition("=")
        if name != "--resume":
            continue
        follows = args[place + 1 : place + 2]
        if not equals and (not follows or follows[0].startswith("-") or Path(follows[0]).is_file()):
            return args
        folder = folder if equals else follows[0]
        rest = args[place + 1 :] if equals else args[place + 2 :]
        say(f"note: --resume {folder} is spelled --resume --output {folder} now.")
        return [*args[:place], "--resume", "--output", folder, *rest]
    return args


app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings=SETTINGS,
    help="Make a trained network smaller without retraining it: compress FILE --data DATA is the main job.",
    epilog="Exit codes: 0 done, 1 a fault in input or run, 2 usage, 3 the accuracy or budget gate failed, 4 nothing "
    "could be compressed, 5 architecture or file not supported, 130 interrupted.",
)


@app.callback(invoke_without_command=True)
def version_option(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    """Make a trained network smaller without retraining it."""
    if version:
        from importlib.metadata import version as installed_version

        print(f"compress {installed_version('compress-networks')}")
        raise typer.Exit

"""Commands that take a recipe: their options are the recipe's fields, and what is typed becomes one `Recipe`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from compress.cli.options import Folder, RecipeFile, declare, say
from compress.errors import RecipeError
from compress.recipe import Recipe, TrainingOptions, make_recipe, read_recipe
from compress.recipe.option import OptionInfo, Section, options_of

OPTIONS, TRAINING = options_of(Recipe), options_of(TrainingOptions)
SHORT = {"output": "-o"}
Taken = Literal["file", "optional", "folder", "recipe", "nothing"]


def takes(
    *wanted: str,
    without: Sequence[str] = (),
    argument: Taken = "file",
    required: Sequence[str] = (),
    training_of: str | None = None,
    help_texts: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command gets options for the wanted part of a recipe, and the resolved `Recipe` as its first argument.

    Its own further parameters stay options of the command line.

    Args:
        wanted: sections by their name in lower case (`network`, `how wide`), single options, or options of the
            section `training` as `training.epochs`.
        without: options of those sections that the command does not take.
        argument: what the command line's own argument is: a checkpoint (optional where a recipe names one), a folder
            that a run wrote, a recipe, or nothing.
        required: options that must be given.
        training_of: an option that options of a training are of no use without.
        help_texts, defaults: option -> what it means and is by default for this command, where that differs from a run.
    """
    chosen = choose(wanted, without)
    if training_of is not None:
        later = {key: replace(info, everyday=False) for key, info in chosen.items() if key.startswith("training.")}
        chosen.update(later)
    for key, text in (help_texts or {}).items():
        chosen[key] = replace(chosen[key], help=text)
    for key, text in (defaults or {}).items():
        chosen[key] = replace(chosen[key], default=text)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def with_recipe(**given: Any) -> None:
            rest = {parameter.name: given[parameter.name] for parameter in parameters}
            typed = {key: value for key in chosen if (value := given[slot(key)]) is not None}
            if training_of is not None:
                check_training(typed, training_of)
            recipe = resolve_recipe(typed, given.get("recipe_file"), given.get("file", given.get("folder")), argument)
            command(recipe, **rest)

        options = [(info.everyday, parameter_of(key, info, key in required)) for key, info in chosen.items()]
        return declare(
            with_recipe,
            [
                *ARGUMENTS[argument],
                *(parameter for everyday, parameter in options if everyday),
                *([keyword("recipe_file", RecipeFile, None)] if argument in ("file", "optional") else []),
                *parameters,
                *(parameter for everyday, parameter in options if not everyday),
            ],
        )

    return decorate


def choose(wanted: Sequence[str], without: Sequence[str] = ()) -> dict[str, OptionInfo]:
    """The options by their key in a recipe (`training.epochs` for a section's), in the order of sections and fields.

    Raises:
        ValueError: no section and no option has that name.
    """
    everything = {**OPTIONS, **{f"training.{name}": info for name, info in TRAINING.items()}}
    del everything["checkpoint"]
    sections = {section.value.lower() for section in Section}
    for name in (*wanted, *without):
        if name not in everything and name not in sections:
            raise ValueError(f"a section of a recipe or one of its options was expected, got {name!r}")
    chosen = {
        key: info
        for key, info in everything.items()
        if key not in without and (key in wanted or info.section.value.lower() in wanted)
    }
    order = list(Section)
    return dict(sorted(chosen.items(), key=lambda pair: order.index(pair[1].section)))


def slot(key: str) -> str:
    """The name of the option's parameter."""
    return key.replace(".", "_")


def parameter_of(key: str, info: OptionInfo, required: bool) -> inspect.Parameter:
    """The option as a parameter of a command. Texts stay texts: the recipe reads them."""
    off = f"/--no-{info.flag[2:]}" if info.switch and info.default else ""
    declared = Option(
        f"{info.flag}{off}",
        *([SHORT[key]] if key in SHORT else []),
        help=f"{info.help} Default: {info.default}." if info.default else info.help,
        rich_help_panel=None if info.everyday else info.section.value,
        metavar=None if info.switch else info.shown,
        show_default=False,
        autocompletion=(lambda: list(info.choices)) if info.choices else None,
    )
    kind: Any = bool if info.switch else list[str] if info.repeated else str
    if required:
        return keyword(slot(key), Annotated[kind, declared], inspect.Parameter.empty)
    return keyword(slot(key), Annotated[kind | None, declared], None)


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter given by name."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


RECIPE = Argument(metavar="RECIPE", help="YAML with arch, data and a training section (recipes/).", show_default=False)
FILE = Argument(metavar="FILE", help=OPTIONS["checkpoint"].help, show_default=False)
ARGUMENTS = {
    "file": [keyword("file", Annotated[str, FILE], inspect.Parameter.empty)],
    "optional": [keyword("file", Annotated[str | None, FILE], None)],
    "folder": [keyword("folder", Folder, inspect.Parameter.empty)],
    "recipe": [keyword("recipe_file", Annotated[str, RECIPE], inspect.Parameter.empty)],
    "nothing": [],
}


def resolve_recipe(typed: Mapping[str, Any], recipe_file: str | None, file: str | None, argument: str) -> Recipe:
    """The recipe of what was typed, over that of the recipe file.

    Args:
        typed: key in a recipe (`training.epochs` for a section's) -> text as typed.
        file: the command's argument, where it is a file or a folder.

    Raises:
        RecipeError: one line with all faults, each behind the flag that was typed.
    """
    trusted = bool(typed.get("trust_code"))
    options = read_recipe(recipe_file, trust_code=trusted, replaced=list(typed)) if recipe_file else {}
    section = options.get("training")
    for key, value in typed.items():
        name, dot, inner = key.partition(".")
        if not dot:
            options[name] = value
        elif section is None or isinstance(section, dict):
            section = {**(section or {}), inner: value}
    if section is not None:
        options["training"] = section
    if file is not None:
        options["checkpoint"] = file
    elif argument == "recipe" and recipe_file:
        options = {"output": f"{Path(recipe_file).stem}-trained", **options, "checkpoint": ""}
    elif argument == "nothing":
        options["checkpoint"] = ""
    if "checkpoint" not in options:
        raise RecipeError("No checkpoint: give a file, or a --recipe that names one.")
    if str(typed.get("finetune", "")).strip().isdecimal():
        say(f"note: --finetune {typed['finetune']} is spelled --recover {typed['finetune']} now.")
    return make_recipe(options, recipe_file or "options", {key: flag_of(key) for key in typed})


def flag_of(key: str) -> str:
    """How an option is spelled on the command line."""
    return TRAINING[key[len("training.") :]].flag if key.startswith("training.") else OPTIONS[key].flag


def check_training(typed: Mapping[str, Any], method: str) -> None:
    """Refuse options of a training where nothing is trained. Raises RecipeError."""
    useless = [flag_of(key) for key in typed if key.startswith("training.")]
    if useless and method not in typed:
        raise RecipeError(f"{useless[0]}: only a training has that; give {flag_of(method)} pathprox, say.")

"""What one option is: its default and limits (pydantic's), and how the command line and the documentation show it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo


class Section(StrEnum):
    """What an option is about: a panel of the help and a heading of the option reference, in this order."""

    DATA = "Data"
    NETWORK = "Network"
    LAYERS = "Which layers"
    WIDTHS = "How wide"
    RECOVERY = "After the cut"
    TRAINING = "Training"
    OUTPUT = "Output"
    MACHINE = "Machine"
    SOLVING = "Solving"


@dataclass(frozen=True)
class OptionInfo:
    """One option as the command line and the documentation show it.

    Attributes:
        name: the field, which is the key in a recipe file.
        flag: its spelling on the command line, `--max-drop`.
        shown: what is to be typed behind the flag, as a word; empty for a switch.
        choices: the texts it takes, where there are few.
        default: as text; empty where there is none to tell.
        everyday: whether it stands among the first ones in the help.
        repeated: whether the flag may be given more than once.
    """

    name: str
    flag: str
    help: str
    section: Section
    shown: str
    choices: tuple[str, ...]
    default: str
    everyday: bool
    switch: bool
    repeated: bool


def option(
    default: Any,
    help_text: str,
    section: Section,
    shown: str = "",
    *,
    flag: str | None = None,
    everyday: bool = False,
    default_text: str | None = None,
    **limits: Any,
) -> Any:
    """A field of a recipe that is an option of the command line.

    Args:
        shown: what is typed behind the flag, as a word that a user knows (NUMBER, DATA); switches and choices need
            none.
        flag: its long spelling without dashes; by default the field's name.
        default_text: what the help says the default is, where the field's own is None or says little.
        limits: pydantic's (`ge`, `lt`, …).
    """
    extra: dict[str, Any] = {"section": section.value, "everyday": everyday}
    for name, value in (("shown", shown), ("flag", flag), ("default_text", default_text)):
        if value is not None:
            extra[name] = value
    if callable(default):
        return Field(default_factory=default, description=help_text, json_schema_extra=extra, **limits)
    return Field(default, description=help_text, json_schema_extra=extra, **limits)


def options_of(model: type[BaseModel]) -> dict[str, OptionInfo]:
    """The options among a model's fields, by name, in the fields' order."""
    return {
        name: _describe(name, field, field.json_schema_extra)
        for name, field in model.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and "section" in field.json_schema_extra
    }


def _describe(name: str, field: FieldInfo, extra: dict[str, Any]) -> OptionInfo:
    kinds = _alternatives(field.annotation)
    lists = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    choices = next((get_args(kind) for kind in [*kinds, *lists] if get_origin(kind) is Literal), ())
    repeated = any(get_origin(kind) is dict for kind in kinds) or str in lists or (bool(lists) and bool(choices))
    switch = kinds == [bool]
    default = extra.get("default_text")
    if default is None:
        known = not field.is_required() and field.default_factory is None
        default = str(field.default) if known and field.default not in (None, (), False) else ""
    return OptionInfo(
        name=name,
        flag=f"--{extra.get('flag') or name.replace('_', '-')}",
        help=field.description or "",
        section=Section(extra["section"]),
        shown="" if switch else extra.get("shown") or "|".join(choices) or "TEXT",
        choices=choices,
        default="on" if default == "True" else default,
        everyday=bool(extra["everyday"]),
        switch=switch,
        repeated=repeated,
    )


def _alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, None left out."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for kind in get_args(annotation) if kind is not NoneType]
    return [annotation]

"""What is wrong with given options, in the words of somebody who typed them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from compress.errors import nearest

EXPECTED = {
    "int_parsing": "a whole number was expected",
    "int_type": "a whole number was expected",
    "int_from_float": "a whole number was expected",
    "float_parsing": "a number was expected",
    "float_type": "a number was expected",
    "bool_parsing": "true or false was expected",
    "bool_type": "true or false was expected",
    "string_type": "a text was expected",
    "tuple_type": "a list was expected",
    "dict_type": "names with values were expected",
    "model_type": "names with values were expected",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "a finite number was expected",
}


def explain_faults(error: ValidationError, source: str, flags: Mapping[str, str], model: type[BaseModel]) -> str:
    """One line with every fault, each behind the flag that was typed, or the option's name in `source`."""
    typed, other = [], []
    for place, message in explain(error, model):
        name = ".".join(place)
        message = as_typed(message, flags, place)
        if name in flags:
            typed.append(f"{flags[name]}: {message}")
        else:
            other.append(f"{name}: {message}" if name else message)
    if typed and not other:
        return f"{'; '.join(typed)}."
    return f"{'; '.join([*typed, f'{source}: {other[0]}', *other[1:]])}."


def as_typed(message: str, flags: Mapping[str, str], place: tuple[str, ...] = ()) -> str:
    """The message with the options that it names in backticks as flags, where anything was typed as one."""

    def spelled(match: re.Match[str]) -> str:
        return flags.get(".".join((*place[:1], match[1])), f"--{match[1].replace('_', '-')}")

    return re.sub(r"`([a-z_]+)`", spelled, message) if flags else message


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The option, and what is wrong with it, fault by fault; one a value, whatever types it might have had."""
    seen = set()
    for fault in error.errors():
        names = known_path(fault["loc"], model)
        if names in seen and names:
            continue
        seen.add(names)
        yield names, message_of(fault, names, model)


def known_path(place: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, ...]:
    """The part of pydantic's location that names options: `export.0` is `export`."""
    first = str(place[0]) if place else ""
    return tuple(str(part) for part in place[: 2 if first == "training" else 1])


def message_of(fault: Any, names: tuple[str, ...], model: type[BaseModel]) -> str:
    """What is wrong, what was expected and what was given."""
    given, context = fault["input"], fault.get("ctx", {})
    if fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "missing":
        return "is missing"
    if fault["type"] == "extra_forbidden":
        return f"unknown option{nearest(names[-1], known_options(names, model))}"
    if fault["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"one of {', '.join(choices)} was expected, got {given!r}{nearest(str(given), choices)}"
    expected = EXPECTED.get(fault["type"])
    if expected is None:
        return f"{fault['msg'][:1].lower()}{fault['msg'][1:]}, got {given!r}"
    bounds = {name: f"{value:g}" for name, value in context.items() if isinstance(value, (int, float))}
    return f"{expected.format(**bounds)}, got {given!r}"


def known_options(names: tuple[str, ...], model: type[BaseModel]) -> list[str]:
    """What could have been meant where an unknown option was given."""
    if len(names) == 1:
        return list(model.model_fields)
    from compress.recipe.training import TrainingOptions

    return list(TrainingOptions.model_fields)

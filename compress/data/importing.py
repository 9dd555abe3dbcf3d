"""Objects that a user names as `package.module:name`, and options written as `?key=value`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any
from urllib.parse import parse_qsl

import yaml

from compress.errors import CompressError, first_line


def import_object(spec: str, fault: type[CompressError]) -> Any:
    """The object at `package.module:name`. Executes that module, so that only what the user named may come here.

    A module that is not installed is looked for in the current folder, which stays on the module path from then on.

    Raises:
        fault: the module or the name does not exist, or importing it fails.
    """
    module_name, _, path = spec.partition(":")
    try:
        if importlib.util.find_spec(module_name.partition(".")[0]) is None and "" not in sys.path:
            sys.path.append("")
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise fault(f"{spec!r}: importing {module_name!r} fails: {type(error).__name__}: {error}.") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise fault(f"{spec!r}: {module_name!r} has no {part!r}.")
        found = getattr(found, part)
    return found


def describe_fault(error: Exception) -> str:
    """The type of an exception from a user's code and the first line of its message."""
    kind, said = type(error).__name__, first_line(error).rstrip(".")
    return kind if said == kind else f"{kind}: {said}"


def parse_value(text: str) -> Any:
    """A value as YAML reads it: a number, true, null, [1, 2], or else the text itself."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def split_query(spec: str) -> tuple[str, dict[str, Any]]:
    """`NAME?key=value&…` as the name and its options, values read as YAML."""
    name, _, query = spec.partition("?")
    return name, {key: parse_value(value) for key, value in parse_qsl(query, keep_blank_values=True)}

"""Objects that a user names as `package.module:name`, and options written as `?key=value`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

from compress.errors import CompressError, first_line


def import_object(spec: str, fault: type[CompressError]) -> Any:
    """The object at `package.module:name`, or at `path/to/file.py:name`.

    Executes that module, so that only what the user named may come here. A module that is not installed is looked for
    in the current folder, and what a file imports also beside it; both stay on the module path from then on.

    Raises:
        fault: the module or the name does not exist, or importing it fails.
    """
    module_name, _, path = spec.rpartition(":") if is_file_spec(spec) else spec.partition(":")
    try:
        if is_file_spec(spec):
            module_name = import_file(Path(module_name))
        elif importlib.util.find_spec(module_name.partition(".")[0]) is None and "" not in sys.path:
            sys.path.append("")
        imported: Any = importlib.import_module(module_name)
    except Exception as error:
        raise fault(f"{spec!r}: importing {module_name!r} fails: {type(error).__name__}: {error}.") from error
    if not path:
        raise fault(f"{spec!r}: a name was expected behind the colon, as in {module_name}:build.")
    for part in path.split("."):
        if not hasattr(imported, part):
            raise fault(f"{spec!r}: {module_name!r} has no {part!r}.")
        imported = getattr(imported, part)
    return imported


def is_file_spec(spec: str) -> bool:
    """Whether a spec names a Python file, `path/to/file.py:name`, and not a module."""
    return spec.rpartition(":")[0].endswith(".py")


def file_name_of(spec: str) -> str:
    """The spec without the folders of its file, as it may be written down; other specs as they are."""
    if not is_file_spec(spec):
        return spec
    path, _, name = spec.rpartition(":")
    return f"{Path(path).name}:{name}"


def absolute_spec(spec: str) -> str:
    """The spec with its file's whole path, for another process; other specs as they are."""
    if not is_file_spec(spec):
        return spec
    path, _, name = spec.rpartition(":")
    return f"{Path(path).resolve()}:{name}"


def import_file(path: Path) -> str:
    """Import a Python file, once; gives the name that its module has from then on.

    Raises:
        ImportError: no such file, or none that can be imported.
    """
    place = path.resolve()
    if not place.is_file():
        raise ImportError(f"there is no file {str(path)!r}")
    name = f"{place.stem}_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return name
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{str(path)!r} is no Python file")
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return name


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

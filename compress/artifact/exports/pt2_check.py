"""What a `.pt2` archive may hold before torch reads it: raw tensors and a graph of torch's own operators.

torch.export.load unpickles what the archive marks as pickled, evaluates symbolic expressions and looks up any name
below `torch` as the function of a node. An archive of this tool needs none of that, so all of it is refused here.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from compress.errors import OutputError, UnsupportedError

TARGET = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|getitem|eq|ge|le)"
)
EXPRESSION = re.compile(
    r"(?:Symbol\('[a-z]+\d+'(?:, (?:positive|integer|nonnegative)=True)*\)|Integer|Rational|Add|Mul|Pow|Mod|PythonMod"
    r"|FloorDiv|Max|Min|Eq|Ne|Ge|Gt|Le|Lt|GreaterThan|LessThan|StrictGreaterThan|StrictLessThan|Equality|Unequality"
    r"|true|false|[su](?=\d)|\d|[-+*/(), ])*"
)  # arithmetic on sizes, in sympy's notation: no dot, no other name
TREE_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
MAX_GROWTH = 64 * 2**20  # bytes that unpacking may add
FAULTS = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


def check_pt2(path: Path) -> None:
    """Refuse an archive that could do more than compute.

    Raises:
        OutputError: not such an archive, or a damaged one.
        UnsupportedError: pickles, compiled code, or calls outside of torch's operators; the message names the first.
    """
    name = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size + MAX_GROWTH:
                raise OutputError(f"{name!r} unpacks to far more than its size; it was not written by torch.export.")
            parts = {part: json.loads(archive.read(info)) for part, info in members.items() if part.endswith(".json")}
    except OSError as error:
        raise OutputError(f"{name!r} cannot be read: {error.strerror or error}.") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, *FAULTS) as error:
        raise OutputError(f"{name!r} is not an exported program: {error}.") from None
    if sorted(part for part in members if part.startswith("models/")) != ["models/model.json"]:
        raise OutputError(f"{name!r} is not an exported program with one model in it.")
    try:
        forbidden = next(chain(forbidden_members(members), forbidden_payloads(parts), forbidden_calls(parts)), None)
    except FAULTS as error:
        raise OutputError(f"{name!r} is a damaged exported program: {error}.") from None
    if forbidden is not None:
        raise UnsupportedError(
            f"{name!r} holds {forbidden}, which reading could execute. compress writes raw tensors and a graph only; "
            "if you trust the file, read it with torch.export.load yourself."
        )


def forbidden_members(members: dict[str, zipfile.ZipInfo]) -> Iterator[str]:
    """Members that are pickles or compiled code."""
    for part, info in members.items():
        if part.startswith(("data/aotinductor/", "extra/", "executorch/", "mtia/")):
            yield f"{part!r}"
        if part.endswith((".pt", ".pkl", ".so")) and info.file_size:
            yield f"the pickle {part!r}"


def forbidden_payloads(parts: dict[str, Any]) -> Iterator[str]:
    """Weights and constants that are marked as pickled, or are no tensors."""
    for part, value in parts.items():
        if part.endswith(("_weights_config.json", "_constants_config.json")):
            for key, entry in value["config"].items():
                if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                    yield f"the pickled value {key!r}"


def forbidden_calls(parts: dict[str, Any]) -> Iterator[str]:
    """Functions outside of torch's operators, expressions that are no arithmetic, code, foreign containers."""
    model = parts["models/model.json"]
    if model.get("guards_code"):
        yield "code of guards"
    for key, value in walk(model):
        if key == "target" and isinstance(value, str) and not TARGET.fullmatch(value):
            yield f"a call of {value[:80]!r}"
        elif key == "expr_str" and not (isinstance(value, str) and EXPRESSION.fullmatch(value)):
            yield f"the expression {str(value)[:80]!r}"
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            for inner, kind in walk(json.loads(value)):
                if inner == "type" and kind not in TREE_TYPES:
                    yield f"the container {str(kind)[:80]!r}"


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)

"""JSON that a stranger may have written: an object of bounded size and depth, each key once, every number finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from compress.errors import CompressError

MOST_BYTES = 64 << 20
MOST_DEPTH = 64
MOST_DIGITS = 19  # of a whole number
FAULTS = (OSError, ValueError, RecursionError)


def read_object(path: str | Path, fault: type[CompressError], what: str) -> dict[str, Any]:
    """The JSON object in a regular file of at most `MOST_BYTES`.

    Args:
        what: what the file should be, in words, such as "a report written by compress".

    Raises:
        fault: no such file, not a regular one, too large, or not such an object.
    """
    path = Path(path)
    try:
        content = parse_object(read_regular(path))
    except FAULTS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise fault(f"{str(path)!r} is not {what}: {reason[:200].rstrip('.')}.") from None
    return content


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file, or of one that a link leads to. Raises OSError, ValueError where there are more."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def check_regular(path: str | Path) -> None:
    """Refuse a folder, a pipe (reading it would wait) and a device (it never ends). Raises ValueError."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is not a regular file")


def parse_object(content: bytes) -> dict[str, Any]:
    """The object in UTF-8 bytes. Raises ValueError, RecursionError."""
    text = content.decode("utf-8")
    entries = json.loads(
        text, object_pairs_hook=unique_keys, parse_int=whole, parse_float=finite, parse_constant=no_constant
    )
    if not isinstance(entries, dict):
        raise ValueError(f"an object was expected, got {type(entries).__name__}")
    check_depth(entries)
    if "\\u" in text:
        json.dumps(entries, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be written anywhere
    return entries


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's entries; two readers of a repeated key may disagree. Raises ValueError."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return entries


def whole(text: str) -> int:
    """A whole number that fits 64 bits. Raises ValueError."""
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number has {len(text.lstrip('-'))} digits")
    return int(text)


def finite(text: str) -> float:
    """A finite number. Raises ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def no_constant(text: str) -> float:
    """NaN and Infinity, which are no JSON. Raises ValueError."""
    raise ValueError(f"it holds {text}")


def check_depth(value: Any) -> None:
    """Refuse values nested deeper than `MOST_DEPTH`. Raises ValueError."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for container in level
            for inner in (container.values() if isinstance(container, dict) else container)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")

"""Values as they are typed: sizes, reductions, lists with commas, key=value. All raise ValueError in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

REDUCIBLE = ("params", "macs", "bytes", "latency")
MEMORY_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_percentage(value: Any) -> Any:
    """The fraction that a text such as `50%` names; anything else as it is. Raises ValueError."""
    if not isinstance(value, str) or not value.strip().endswith("%"):
        return value
    try:
        return float(value.strip().removesuffix("%")) / 100
    except ValueError:
        raise ValueError(f"a fraction such as 0.5, or 50%, was expected, got {value!r}") from None


def parse_keep(value: Any) -> Any:
    """A count of units (int from 1 up) or a fraction (float below 1) of a number, or of a text such as 64, 0.5 or 50%.

    What is no number is left to the field's type. Raises ValueError.
    """
    expected = "a whole number of units, a fraction below 1 or a percentage below 100% was expected"
    percentage = isinstance(value, str) and value.strip().endswith("%")
    text = str(value).strip()
    value = parse_percentage(value)
    if isinstance(value, str):
        try:
            value = int(text)
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                raise ValueError(f"{expected}, got {text!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{expected}, got {value!r}")
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{expected}, got {text}")
    if isinstance(value, int) or value < 1:
        return value
    if value == 1 and not percentage:
        raise ValueError(
            f"{text} is ambiguous: 1 keeps one unit of every layer, a fraction or a percentage below 100% that share"
        )
    if percentage or value != int(value):
        raise ValueError(f"{expected}, got {text}")
    return int(value)


def parse_steps(value: Any) -> int | str:
    """auto, off, or a number of steps from 1 up, as a number or a text. Raises ValueError."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, bool):  # what YAML makes of an unquoted off
        text = "auto" if text else "off"
    steps = int(text) if isinstance(text, str) and text.isdecimal() else text
    if steps in ("auto", "off") or (type(steps) is int and steps >= 1):
        return steps
    raise ValueError(f"auto, off or a number of steps was expected, got {value!r}")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `512M` or `4G`. Raises ValueError."""
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I")
    suffix = cleaned[-1:] if cleaned[-1:].isalpha() else ""
    number = cleaned.removesuffix(suffix)
    try:
        size = int(float(number) * MEMORY_UNITS[suffix])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"a size such as 512M or 4G was expected, got {text!r}") from None
    if size <= 0:
        raise ValueError(f"a positive size was expected, got {text!r}")
    return size


def parse_reduction(text: str) -> tuple[str, float]:
    """What must shrink and by which factor: `2x` and `params:2x` are parameters, `macs:1.5` MACs. Raises ValueError."""
    quantity, colon, number = text.strip().lower().rpartition(":")
    quantity = quantity.strip() if colon else "params"
    try:
        factor = float(number.strip().removesuffix("x").removesuffix("×"))
    except ValueError:
        factor = math.nan
    if quantity not in REDUCIBLE or not 1 <= factor < math.inf:
        raise ValueError(f"a factor such as 2x, or one of {', '.join(REDUCIBLE)} with it (macs:2x), got {text!r}")
    return quantity, factor


def parse_numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers. Raises ValueError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"numbers with commas between them were expected, got {text!r}") from None


def parse_counts(text: str) -> tuple[int, ...]:
    """Comma-separated positive whole numbers. Raises ValueError."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ValueError(f"positive whole numbers with commas between them were expected, got {text!r}")
    return counts


def parse_extent(text: str) -> int | tuple[int, ...]:
    """One side, or height and width. Raises ValueError."""
    counts = parse_counts(text)
    if len(counts) > 2:
        raise ValueError(f"one side, or height,width was expected, got {text!r}")
    return counts[0] if len(counts) == 1 else counts


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """key=value texts with YAML values. Raises ValueError."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"key=value was expected, got {text!r}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[name] = value
    return values


def drops(value: Any) -> Any:
    """Points by name, typed as name=points, or points alone for all names, whose name is empty."""
    texts = [value] if isinstance(value, (str, int, float)) else value
    if isinstance(texts, Mapping) or not isinstance(texts, Sequence):
        return texts
    points: dict[str, Any] = {}
    for text in map(str, texts):
        points.update(parse_assignments([text]) if "=" in text else {"": yaml.safe_load(text)})
    return points


def strings(value: Any) -> Any:
    """Texts, one or several."""
    return (value,) if isinstance(value, str) else value


def numbers(value: Any) -> Any:
    """Numbers, typed or as they are."""
    return parse_numbers(value) if isinstance(value, str) else value


def counts(value: Any) -> Any:
    """Whole numbers, typed or as they are."""
    return parse_counts(value) if isinstance(value, str) else value


def extent(value: Any) -> Any:
    """A side or two, typed or as they are."""
    return parse_extent(value) if isinstance(value, str) else value


def assignments(value: Any) -> Any:
    """Named values, typed as key=value or as they are."""
    if isinstance(value, str):
        return parse_assignments((value,))
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        return value
    return parse_assignments([str(text) for text in value])

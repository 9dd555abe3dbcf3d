"""Arguments of a network of the closed list: plain numbers, and words where a library takes words; nothing else."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from compress.errors import UnsupportedError

LARGEST = 1 << 24  # of a whole number
MOST_VALUES = 4096  # in all lists and tables together
MOST_DEPTH = 4
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")  # of an argument: none begins with an underscore
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # no path, address, module or sentence
DENIED = re.compile(
    r"(use_)?pretrained.*|weights(_.*)?|checkpoint.*|features_only|feature_(cfg|cls)|scriptable|exportable|no_jit|"
    r"model_cfg|kwargs_filter|kernel_config|use_kernels?|(.*_)?implementation|quantization_config|auto_map|"
    r"trust_remote_code|(.*_)?name_or_path|use_timm_backbone|use_pretrained_backbone|backbone(_kwargs)?|"
    r"(?!drop_path)(.*_)?(url|uri|file|filename|folder|dir|path|hub|device|dtype|hook|callback)s?"
)  # load, fetch, compile or name places: what is taken are sizes and rates


def check_arguments(
    spec: str, arguments: Mapping[str, Any], known: Collection[str] | None, words: Collection[str] | None = ()
) -> None:
    """Refuse an argument that a network of the closed list does not take, or that is no plain value.

    Args:
        known: names that its constructor takes; None: any that is not denied.
        words: those of them that may be words; None: any.

    Raises:
        UnsupportedError: names the first such argument.
    """
    if not isinstance(arguments, Mapping):
        raise UnsupportedError(f"{spec!r}: arguments must be a table of names and values, got {arguments!r:.60}.")
    values = 0
    for name, value in arguments.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or is_denied(name):
            raise UnsupportedError(
                f"{spec!r} is not built with the argument {str(name)[:60]!r}: a library's network takes plain sizes "
                "and rates here; to pass it, name a function of your own: --arch package.module:factory."
            )
        if known is not None and name not in known:
            raise UnsupportedError(f"{spec!r} cannot be built with {name}={value!r:.40}: it has no such argument.")
        values += check_value(f"{spec!r}: {name}", value, 0, words is None or name in words)
    if values > MOST_VALUES:
        raise UnsupportedError(f"{spec!r}: its arguments hold {values} values; at most {MOST_VALUES} are taken.")


def is_denied(name: str) -> bool:
    """Whether an argument of that name may load, fetch, compile or change more than sizes."""
    return DENIED.fullmatch(name) is not None


def check_value(place: str, value: Any, depth: int, words: bool) -> int:
    """Refuse what is no plain value, or too large; gives how many there are. Raises UnsupportedError."""
    if value is None or isinstance(value, bool):
        return 1
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or (isinstance(value, int) and abs(value) > LARGEST):
            raise UnsupportedError(f"{place}: a number of at most {LARGEST} was expected, got {value!r:.40}.")
        return 1
    if isinstance(value, str) and words and WORD.fullmatch(value):
        return 1
    if isinstance(value, (list, tuple, dict)) and depth < MOST_DEPTH and len(value) <= MOST_VALUES:
        if isinstance(value, dict):
            check_keys(place, value)
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        return 1 + sum(check_value(place, element, depth + 1, words) for element in inner)
    expected = "a number, a word, a list or a table of them" if words else "a number or a list of numbers"
    raise UnsupportedError(f"{place}: {expected} was expected, got {value!r:.60}.")


def check_keys(place: str, table: Mapping[Any, Any]) -> None:
    """Refuse keys of a table that are neither numbers nor such names as arguments have. Raises UnsupportedError."""
    for key in table:
        plain = (isinstance(key, int) and abs(key) <= LARGEST) or (isinstance(key, str) and WORD.fullmatch(key))
        if not plain or is_denied(str(key)):
            raise UnsupportedError(f"{place}: the key {key!r:.60} is not taken.")


def constructor_names(module_name: str) -> frozenset[str]:
    """Names that the constructors and functions of a library's module take, without those that may do more."""
    module = sys.modules[module_name]
    defined = [value for value in vars(module).values() if getattr(value, "__module__", None) == module_name]
    takers: list[Any] = [value for value in defined if inspect.isfunction(value)]
    takers += [value.__init__ for value in defined if isinstance(value, type) and issubclass(value, nn.Module)]
    names = {name for taker in takers for name in inspect.signature(taker).parameters}
    return frozenset(name for name in names if NAME.fullmatch(name) and not is_denied(name))

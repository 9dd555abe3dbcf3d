"""Every fault that a user can meet, in one tree; the command line prints one as a single line.

    CompressError                exit 1   a fault in the input or in the run
    ├── CheckpointError          exit 1   the file cannot be read, or its contents do not fit the architecture
    ├── UnsupportedError         exit 5   the kind of file or architecture is not supported
    │   ├── UntrustedPickleError exit 5   reading the file would execute code; `--trust-pickle` was not given
    │   ├── UntrustedCodeError   exit 5   a file names code that the user neither named nor trusted (`--trust-code`)
    │   └── UnknownArchitectureError  exit 5   no architecture was named and none was recognised
    ├── DataError                exit 1   calibration or evaluation data cannot be used as given
    ├── TraceError               exit 5   the network cannot be exported to a graph
    ├── NonFiniteError           exit 1   NaN or Inf in weights, activations or moments; names the layer
    ├── SolverError              exit 1   a convex problem could not be solved
    │   └── MomentsError         exit 1   second moments that no problem can be solved on
    ├── SurgeryError             exit 1   the narrowed network does not equal the masked original
    ├── OutputError              exit 1   the output folder cannot be written, or a written folder cannot be read
    ├── RecipeError              exit 2   options that are invalid or contradict each other
    ├── GateError                exit 3   the accuracy or budget gate failed
    ├── NothingToCompressError   exit 4   no layer could be compressed
    └── InterruptionError        exit 130 ended by Ctrl-C or a polite kill, with something to go on from

Misuse of the library from Python (a wrong shape, a wrong type) raises `ValueError` instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


class CompressError(Exception):
    """A fault with a message that says what was expected, what came and what to do.

    Messages quote others, which may end in a full stop of their own; one is enough.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(re.sub(r"(?<![.?!])([.?!])\.$", r"\1", message))


class CheckpointError(CompressError):
    """A checkpoint that cannot be read or does not fit its architecture."""


class UnsupportedError(CompressError):
    """A kind of file or network that this tool does not handle."""

    exit_code = 5


class UntrustedPickleError(UnsupportedError):
    """A file whose reading would execute code that was not allowed."""


class UntrustedCodeError(UnsupportedError):
    """A folder or file that names code to import, without the user's word for it."""


class UnknownArchitectureError(UnsupportedError):
    """A state dict whose network was neither named nor recognised."""


class DataError(CompressError):
    """Calibration or evaluation data that cannot be used as given."""


class TraceError(UnsupportedError):
    """A network that `torch.export` cannot turn into a graph."""


class NonFiniteError(CompressError):
    """NaN or Inf where a finite number is needed."""


class SolverError(CompressError):
    """A convex problem that could not be solved."""


class MomentsError(SolverError):
    """Second moments on which no problem can be solved: of no samples, or indefinite beyond rounding."""


class SurgeryError(CompressError):
    """A narrowed network that does not equal the masked original."""


class OutputError(CompressError):
    """An output folder that cannot be written, or a written one that cannot be read."""


class RecipeError(CompressError):
    """Options that are invalid or contradict each other."""

    exit_code = 2


class GateError(CompressError):
    """An accuracy or budget gate that failed; `report` is the `RunReport` of what was found, where it came that far."""

    exit_code = 3

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class NothingToCompressError(CompressError):
    """No layer could be compressed."""

    exit_code = 4


class InterruptionError(CompressError):
    """A run that was ended from outside and left something to go on from."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'macs'?)`, for a message, where something of `known` is like `word`; else nothing."""
    from difflib import get_close_matches

    folded = {name.lower(): name for name in known}
    matches = get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    return f" (did you mean {folded[matches[0]]!r}?)" if matches else ""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

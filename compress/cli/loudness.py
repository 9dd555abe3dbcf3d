"""`--quiet` and `--verbose`, which every command takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from typer import Option

from compress.cli.options import OUTPUT, declare
from compress.cli.showing.progress import LOUDNESS

Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel=OUTPUT)]
Verbose = Annotated[
    bool,
    Option("--verbose", "-v", help="Every stage with its seconds; a fault with its origin.", rich_help_panel=OUTPUT),
]


def heard(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `--quiet` and `--verbose`."""

    @functools.wraps(command)
    def with_loudness(*, quiet: bool, verbose: bool, **given: Any) -> None:
        token = LOUDNESS.set(-1 if quiet else int(verbose))
        try:
            command(**given)
        except Exception:
            if verbose:
                show_origin()
            raise
        finally:
            LOUDNESS.reset(token)

    parameters = inspect.signature(command, eval_str=True).parameters.values()
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=False)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    return declare(with_loudness, [*(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters), *added])


def show_origin() -> None:
    """Where the fault that is being handled came from."""
    import traceback

    traceback.print_exc()

"""The command line: parse, call one function of the api, render. Results go to stdout, progress to stderr.

Exit codes: 0 done, 1 a fault in input or run, 2 usage, 3 the gate failed, 4 nothing could be compressed,
5 architecture or file not supported, 130 interrupted. One module per command, named in the catalogue.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer

from compress.allocator import keep_freed_memory
from compress.cli.app import app
from compress.errors import CompressError

__all__ = ["app", "entry", "main"]

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every expected fault is one line on stderr and its exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="compress", standalone_mode=False)
    except CompressError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written.", INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return fail("interrupted; nothing was written.", INTERRUPTED)
    except MemoryError:
        return fail("not enough memory; give a smaller --batch-size or --memory.", 1)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            return fail(explain_usage(error), 2) if error.format_message() else 0
        raise
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        return fail("interrupted; nothing was written.", INTERRUPTED)
    return code if isinstance(code, int) else 0


def explain_usage(error: Any) -> str:
    """What is wrong with the words of a command, the nearest right one, and where its options are listed."""
    context = getattr(error, "ctx", None)
    command = "compress" if context is None else context.command_path
    if hasattr(error, "option_name") and hasattr(error, "possibilities") and context is not None:
        from compress.recipe.option import nearest

        known = [name for each in context.command.get_params(context) for name in each.opts if name.startswith("--")]
        return f"{command} has no option {error.option_name}{nearest(error.option_name, known)}. See {command} --help."
    return f"{str(error.format_message()).rstrip('.')}. See {command} --help."


def fail(message: str, code: int) -> int:
    """Print one line on stderr and hand the exit code on."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def entry() -> None:
    """The console script. A polite kill is an interruption like Ctrl-C, so that temporary files go.

    Freed memory stays with the process, which saves the kernel's time; in a library that choice is its caller's.
    """
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())

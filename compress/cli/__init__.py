"""The command line: parse, call one function of the api, render. Results go to stdout, progress to stderr.

Exit codes: 0 done, 1 a fault in input or run, 2 usage, 3 the gate failed, 4 nothing could be compressed,
5 architecture or file not supported, 130 interrupted. One module per command, named in the catalogue.

A Ctrl-C or a polite kill may arrive inside compiled code that turns it into another fault, or drops it. What counts is
therefore that it came, not which exception is seen of it. Nothing heavy is imported here before all is ready for one.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from compress.allocator import keep_freed_memory
from compress.cli.spelling import spell_all
from compress.errors import CompressError, nearest
from compress.waiting import wait_asleep

__all__ = ["entry", "main"]

INTERRUPTED = 130
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)  # as torch says it


def main(arguments: Sequence[str] | None = None, *, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Run the command line; every expected fault is one line on stderr and its exit code.

    Args:
        interrupted: whether Ctrl-C came; compiled code may turn it into another fault.
    """
    import typer

    from compress.cli.app import app

    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="compress", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted; nothing was written.", INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return describe_fault(error, interrupted())
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        return fail("interrupted; nothing was written.", INTERRUPTED)
    return code if isinstance(code, int) else 0


def describe_fault(error: Exception, interrupted: bool) -> int:
    """Say an expected fault in one line and give its exit code; any other goes on."""
    code = getattr(error, "exit_code", None)
    if interrupted and code != INTERRUPTED:
        return fail("interrupted; nothing was written.", INTERRUPTED)
    if isinstance(error, CompressError):
        return fail(str(error), error.exit_code)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return fail("not enough memory; give a smaller --batch-size or --memory.", 1)
    if hasattr(error, "format_message") and code is not None:  # click's usage errors
        return fail(explain_usage(error), 2) if error.format_message() else 0
    raise error


def explain_usage(error: Any) -> str:
    """What is wrong with the words of a command, the nearest right one, and where its options are listed."""
    context = getattr(error, "ctx", None)
    command = "compress" if context is None else context.command_path
    if hasattr(error, "option_name") and hasattr(error, "possibilities") and context is not None:
        known = [name for each in context.command.get_params(context) for name in each.opts if name.startswith("--")]
        return f"{command} has no option {error.option_name}{nearest(error.option_name, known)}. See {command} --help."
    return f"{str(error.format_message()).rstrip('.')}. See {command} --help."


def fail(message: str, code: int) -> int:
    """Print one line on stderr and hand the exit code on; what is no printable character is written out."""
    line = " ".join(message.split())
    print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), file=sys.stderr)
    return code


@dataclass
class Interruptions:
    """Whether the process was asked to end."""

    came: bool = False

    def __call__(self, *_: Any) -> None:
        """The signal handler: remember it and raise KeyboardInterrupt, so that temporary files go."""
        self.came = True
        raise KeyboardInterrupt


def entry() -> NoReturn:
    """The console script.

    Freed memory stays with the process, which saves the kernel's time, and waiting threads sleep, which serves machines
    that do other work too; in a library both choices are its caller's.
    """
    interruptions = Interruptions()
    try:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, interruptions)
        spell_all((sys.stdout, sys.stderr))
        keep_freed_memory()
        wait_asleep()
        code = main(interrupted=lambda: interruptions.came)
    except KeyboardInterrupt:
        code = fail("interrupted; nothing was written.", INTERRUPTED)
    for kind in (signal.SIGINT, signal.SIGTERM):  # all is done: what comes now ends the process without a word
        signal.signal(kind, lambda *_: os._exit(code))
    sys.exit(code)

"""`compress …` and `python -m compress …`: the process around the command line, ready for Ctrl-C before anything heavy.

A Ctrl-C or a polite kill may arrive inside compiled code that turns it into another fault, or drops it. What counts is
therefore that it came, not which exception is seen of it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

INTERRUPTED = 130
MESSAGE = "error: interrupted; nothing was written."


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

    Freed memory stays with the process, which saves the kernel's time; in a library that choice is its caller's.
    """
    interruptions = Interruptions()
    try:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, interruptions)
        for stream in (sys.stdout, sys.stderr):  # names that the terminal's encoding lacks are written out
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        from compress.allocator import keep_freed_memory
        from compress.cli import main

        keep_freed_memory()
        code = main(interrupted=lambda: interruptions.came)
    except KeyboardInterrupt:
        print(MESSAGE, file=sys.stderr)
        code = INTERRUPTED
    for kind in (signal.SIGINT, signal.SIGTERM):  # all is done: what comes now ends the process without a word
        signal.signal(kind, lambda *_: os._exit(code))
    sys.exit(code)


if __name__ == "__main__":
    entry()

"""confined(): while a network that a file names is built, nothing is fetched, started, written or unpickled."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from compress.errors import UnsupportedError

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = (
    "socket.", "urllib.Request", "http.client.", "ftplib.", "smtplib.", "subprocess.Popen", "os.system", "os.exec",
    "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv", "os.kill",
    "shutil.", "pickle.find_class", "webbrowser.open",
)  # fmt: skip
_local = threading.local()


class ConfinementError(RuntimeError):
    """Raised where the forbidden thing was tried; the library in between may swallow it."""


@contextmanager
def confined(what: str) -> Iterator[None]:
    """Within it this thread opens no connection, starts no process, writes no file and unpickles nothing.

    A second line behind the closed list of builders: what their arguments are not known to do is refused when they try.
    Reading is allowed, as a library imports its own modules late. Garbage waits: what earlier work left behind may
    delete its files when it is collected, and that is no doing of what is built.

    Args:
        what: what is built, in words, for the message.

    Raises:
        UnsupportedError: it was tried, whether or not the attempt's own exception came through.
    """
    install_hook()
    tempfile.gettempdir()  # found by writing into it once; libraries ask for it while they are imported
    before, bytecode, collecting = getattr(_local, "tried", None), sys.dont_write_bytecode, gc.isenabled()
    tried: list[str] = []
    gc.disable()
    _local.tried, sys.dont_write_bytecode = tried, True
    try:
        yield
    except Exception:
        if not tried:
            raise
    finally:
        _local.tried, sys.dont_write_bytecode = before, bytecode
        if collecting:
            gc.enable()
    if tried:
        raise UnsupportedError(
            f"{what} is refused: building it tried {tried[0]}; a network named by a file may only compute."
        )


@cache
def install_hook() -> None:
    """Put the one audit hook of this process in place; it looks at nothing outside of `confined`."""
    sys.addaudithook(watch)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a forbidden event in a confined thread."""
    tried = getattr(_local, "tried", None)
    if tried is None:
        return
    if event == "open":
        flags = arguments[2] if len(arguments) > 2 else 0
        if not (isinstance(flags, int) and flags & WRITING):
            return
    elif not event.startswith(FORBIDDEN):
        return
    shown = ", ".join(str(argument)[:60] for argument in arguments[:2])
    tried.append(f"{event}({shown})")
    raise ConfinementError(tried[-1])

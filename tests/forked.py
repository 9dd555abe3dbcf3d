"""Written folders are loaded in processes forked from one that has imported torch and computed nothing.

A fresh one imports torch first, two seconds each time; tests that ask for the fixture `fresh_process` pay for that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

from compress.artifact.folder import RELOAD
from compress.zoo.backends.local import PRELOADED, no_main_module

CONTEXT = get_context("forkserver")


def reload_forked(arguments: Sequence[str]) -> str:
    """What `compress.artifact.folder.reload_alone` does, in a forked process."""
    CONTEXT.set_forkserver_preload([*PRELOADED, "compress.artifact.loading", "compress.measures.outputs"])
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=reload_and_tell, args=(list(arguments), sender))
    with no_main_module():
        process.start()
    sender.close()
    try:
        reason: str = receiver.recv()
    except EOFError:
        reason = "the process ended"
    process.join()
    return reason


def reload_and_tell(arguments: Sequence[str], sender: Connection) -> None:
    """Run RELOAD here; tell why it failed, empty where it did not."""
    sys.argv = ["-c", *arguments]
    try:
        exec(RELOAD, {})
    except Exception as error:
        sender.send(str(error) or type(error).__name__)
    else:
        sender.send("")

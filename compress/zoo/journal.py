"""The journal of a zoo: one JSON object a line, each on the disk before the next step; and the lock on a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.atomic import explain
from compress.errors import OutputError

JOURNAL = "journal"
LOCK = ".lock"


class Journal:
    """Appends entries to a file so that a kill or a power cut loses at most the entry being written.

    Every entry is one write of a whole line followed by fsync. A torn last line is ignored when reading, and cut off
    before the next entry is appended. A write that fails (full disk) is taken back.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = -1

    def __enter__(self) -> Journal:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            end = os.lseek(self._file, 0, os.SEEK_END)
            os.ftruncate(self._file, whole_lines(self._file, end))
            sync_folder(self.path.parent)
        except OSError as error:
            self.__exit__()
            raise OutputError(f"The journal {str(self.path)!r} cannot be written: {explain(error)}.") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def append(self, entry: Mapping[str, Any]) -> None:
        """Put one entry on the disk. Raises OutputError; the file is then as before."""
        line = (json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n").encode()
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            raise OutputError(f"The journal {str(self.path)!r} cannot be written: {explain(error)}.") from None


def whole_lines(file: int, end: int) -> int:
    """Bytes up to and with the last line break of an open file of `end` bytes."""
    block = 1 << 16
    while end > 0:
        start = max(0, end - block)
        line_break = os.pread(file, end - start, start).rfind(b"\n")
        if line_break >= 0:
            return start + line_break + 1
        end = start
    return 0


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a journal; a line that is torn or damaged is left out. Empty where there is none.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"The journal {str(path)!r} cannot be read: {explain(error)}.") from None
    entries = []
    for line in content.split(b"\n")[:-1]:  # what follows the last line break is torn
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            entries.append(entry)
    return entries


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, suffix: str) -> Iterator[None]:
    """Hold a zoo's folder: the whole of it, or one shard (`suffix`) beside others. The end of the process lets go.

    Raises:
        OutputError: another run holds it, or it cannot be written.
    """
    handles: list[int] = []
    try:
        try:
            for name, kind in lock_files(suffix):
                handles.append(os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
                fcntl.flock(handles[-1], kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"Another run is working in {str(folder)!r}; wait for it, or choose another --output."
            ) from None
        except OSError as error:
            raise OutputError(f"Cannot write to {str(folder)!r}: {explain(error)}. Choose another --output.") from None
        yield
    finally:
        for handle in handles:
            os.close(handle)


def lock_files(suffix: str) -> list[tuple[str, int]]:
    """Files to lock and how: the whole folder for oneself, or shared with other shards and the own shard."""
    if not suffix:
        return [(LOCK, fcntl.LOCK_EX)]
    return [(LOCK, fcntl.LOCK_SH), (f"{LOCK}{suffix}", fcntl.LOCK_EX)]

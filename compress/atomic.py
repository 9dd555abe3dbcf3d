"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from compress.errors import OutputError

try:
    import fcntl
except ImportError:  # where there is no such lock, two runs into one place are told apart at the end
    fcntl = None  # type: ignore[assignment]

MARKER = "config.json"  # a folder that holds it was written by this tool, and may be replaced with `force`


@contextmanager
def new_folder(target: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A private folder beside `target` that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        force: replace a folder that this tool wrote before; any other existing folder is refused.

    Raises:
        OutputError: the target exists, or the place cannot be written.
    """
    target = Path(target)
    check_target(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(
            f"Cannot write to {str(target.parent)!r}: {explain(error)}. Choose another --output."
        ) from None
    try:
        yield draft
        try:
            os.chmod(draft, 0o777 & ~current_umask())
            if target.exists():
                check_target(target, force=force)
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
                os.rename(target, old / "was")
                os.rename(draft, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(draft, target)
        except OSError as error:
            raise OutputError(
                f"Cannot put {str(target)!r} in place: {explain(error)}. Choose another --output."
            ) from None
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Writing {str(target)!r} failed: {explain(error)}. Nothing was left behind.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A private path beside `target` that replaces it when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: the place cannot be written.
    """
    target = Path(target)
    draft = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        os.replace(draft, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Cannot write {str(target)!r}: {explain(error)}.") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def reserved(target: str | Path, *, force: bool = False) -> Iterator[None]:
    """Hold an output place while the work is done, so that a second run into it ends before it begins.

    A lock file stands beside the place; it goes with the block, and a killed process lets go of it.

    Raises:
        OutputError: what `check_target` refuses, or another run holds the place.
    """
    target = Path(target)
    check_target(target, force=force)
    if fcntl is None:
        yield
        return
    lock = lock_file(target)
    handle = take_lock(lock, target)
    try:
        check_target(target, force=force)  # another run may have finished in between
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                lock.unlink(missing_ok=True)
            os.close(handle)


def lock_file(target: Path) -> Path:
    """Where the lock of an output place stands: beside it, or in the nearest folder above that exists."""
    place = nearest_folder(target)
    if place == target.parent:
        return place / f".{target.name}-lock"
    return place / f".{target.name[:64]}-lock-{hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:8]}"


def take_lock(lock: Path, target: Path) -> int | None:
    """The handle of a lock file that this process holds; None where the file system knows no locks."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"Cannot write to {str(lock.parent)!r}: {explain(error)}.") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.fstat(handle).st_ino == lock.stat().st_ino:
                return handle
            os.close(handle)  # its holder has just removed it: this is no longer the file of that name
        except BlockingIOError:
            os.close(handle)
            raise OutputError(
                f"Another run is working on {str(target)!r}; wait for it, or choose another --output."
            ) from None
        except OSError:
            os.close(handle)
            with suppress(OSError):
                lock.unlink(missing_ok=True)
            return None


def nearest_folder(target: Path) -> Path:
    """The folder that holds the target, or the nearest one above that exists."""
    place = target.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def check_target(target: str | Path, *, force: bool = False) -> None:
    """Refuse an output place that would overwrite something, or cannot be written, before any work is done."""
    target = Path(target)
    try:
        check_content(target, force=force)
        place = nearest_folder(target)
    except OSError as error:
        raise OutputError(f"Cannot write to {str(target)!r}: {explain(error)}. Choose another --output.") from None
    if not place.is_dir():
        raise OutputError(f"Cannot write to {str(place)!r}: it is not a writable folder. Choose another --output.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}-", dir=place))
    except OSError as error:
        raise OutputError(f"Cannot write to {str(place)!r}: {explain(error)}. Choose another --output.") from None


def check_content(target: Path, *, force: bool) -> None:
    """Refuse what stands at an output place, unless it is a folder that may be replaced. Raises OutputError."""
    if target.is_symlink():
        raise OutputError(
            f"The output {str(target)!r} is a symbolic link; a folder that does not exist yet was expected. Give the "
            "folder that it leads to, or choose another --output."
        )
    if target.exists() and not target.is_dir():
        raise OutputError(f"The output {str(target)!r} is a file; a folder that does not exist yet was expected.")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MARKER).is_file():
            raise OutputError(f"The output {str(target)!r} exists and was not written by compress; choose another one.")
        if not force:
            raise OutputError(f"The output {str(target)!r} exists; give --force to replace it, or choose another one.")


def explain(error: OSError | SafetensorError) -> str:
    """What went wrong, in words."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    return (getattr(error, "strerror", None) or str(error)).lower()


def current_umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

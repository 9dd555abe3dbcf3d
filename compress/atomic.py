"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from compress.errors import OutputError

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


def check_target(target: str | Path, *, force: bool = False) -> None:
    """Refuse an output place that would overwrite something, or cannot be written, before any work is done."""
    target = Path(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"The output {str(target)!r} is a file; a folder that does not exist yet was expected.")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MARKER).is_file():
            raise OutputError(f"The output {str(target)!r} exists and was not written by compress; choose another one.")
        if not force:
            raise OutputError(f"The output {str(target)!r} exists; give --force to replace it, or choose another one.")
    place = target.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"Cannot write to {str(place)!r}: it is not a writable folder. Choose another --output.")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}-", dir=place))
    except OSError as error:
        raise OutputError(f"Cannot write to {str(place)!r}: {explain(error)}. Choose another --output.") from None


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

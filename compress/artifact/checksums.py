"""SHA256SUMS: the hashes of everything in an artifact folder, in the form that `sha256sum --check` reads."""

from __future__ import annotations

from pathlib import Path

from compress.atomic import new_file
from compress.checkpoint.manifest import CHECKSUMS, file_sha256
from compress.errors import OutputError
from compress.strict_json import read_regular


def write_checksums(folder: Path) -> None:
    """Write the hash of every file in `folder` and below, sorted by name."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in file_names(folder)]
    with new_file(folder / CHECKSUMS) as draft:
        draft.write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path) -> dict[str, str]:
    """File name -> "same", "changed", "missing" or "unlisted", of every file in `folder` or on its list.

    That protects from damage only: whoever forges a file forges its line too.

    Raises:
        OutputError: there is no list, or it cannot be read.
    """
    try:
        lines = read_regular(folder / CHECKSUMS).decode("utf-8").splitlines()
        listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        names = file_names(folder)
        statuses = dict.fromkeys((*listed, *names), "same")
        for name in statuses:
            if name not in listed:
                statuses[name] = "unlisted"
            elif name not in names:
                statuses[name] = "missing"
            elif file_sha256(folder / name) != listed[name]:
                statuses[name] = "changed"
    except (OSError, ValueError) as error:
        raise OutputError(f"{str(folder / CHECKSUMS)!r} cannot be read: {error}.") from None
    return dict(sorted(statuses.items()))


def file_names(folder: Path) -> list[str]:
    """Files in `folder` and below, the list itself left out, with forward slashes, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS and not Path(name).name.startswith("."))

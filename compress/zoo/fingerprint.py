"""What determines a result: the bytes of the checkpoint and of the data, the options and the versions."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from compress.errors import DataError
from compress.recipe import Recipe

FORMAT = 1
ARITHMETIC = ("compress-networks", "torch", "torchvision", "numpy", "scs", "clarabel", "cvxpy", "timm", "transformers")
NOT_RESULTS = {"output", "force", "checkpoint", "trust_code"}


class Fingerprints:
    """Fingerprints of recipes; each file is read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, recipe: Recipe) -> str:
        """Equal for two recipes exactly when their results must be: 64 hexadecimal digits.

        Files count by their bytes. A folder of samples counts by the names, sizes and times of its files, since
        reading it would take as long as a run; copied elsewhere it is therefore new. A user's own function counts by
        the source of its top-level module.

        Raises:
            DataError: a file cannot be read.
        """
        parts = {
            "format": FORMAT,
            "checkpoint": self._path(recipe.checkpoint),
            "code": self._code(recipe.arch),
            "data": [self._data(recipe.data), self._data(recipe.eval)],
            "recipe": recipe.model_dump(mode="json", exclude=NOT_RESULTS),
            "versions": package_versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _data(self, spec: str | None) -> str | None:
        if spec is None:
            return None
        scheme, colon, rest = spec.partition(":")
        if colon and scheme in ("folder", "npz", "safetensors"):
            return self._path(rest)
        if scheme == "torchvision":
            options = dict(part.partition("=")[::2] for part in rest.partition("?")[2].split("&"))
            return self._path(options.get("root", "."))
        return self._path(spec) if Path(spec).exists() else self._code(spec)

    def _path(self, path: str) -> str:
        if path not in self._known:
            try:
                self._known[path] = folder_digest(Path(path)) if Path(path).is_dir() else file_digest(Path(path))
            except FileNotFoundError:
                return "absent"  # the model's own run says so, with its reasons
            except (OSError, ValueError) as error:
                raise DataError(f"{path!r} cannot be read: {error}.") from None
        return self._known[path]

    def _code(self, spec: str | None) -> str | None:
        """Digest of the top-level module that `package.module:factory` names, found without importing it."""
        if spec is None or ":" not in spec:
            return None
        top = spec.partition(":")[0].partition(".")[0]
        for place in (Path.cwd(), *(Path(entry) for entry in sys.path if entry)):
            if (place / f"{top}.py").is_file():
                return self._path(str(place / f"{top}.py"))
            if (place / top / "__init__.py").is_file():
                digest = hashlib.sha256()
                for file in sorted((place / top).rglob("*.py")):
                    digest.update(self._path(str(file)).encode())
                return digest.hexdigest()
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names, sizes and modification times of all files below a folder."""
    digest = hashlib.sha256()
    for line in sorted(folder_entries(folder)):
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def folder_entries(folder: Path) -> Iterator[str]:
    """A line for every file below a folder."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            try:
                status = path.stat()
            except FileNotFoundError:  # a link to nothing
                continue
            yield f"{path.relative_to(folder).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\n"


@cache
def package_versions() -> dict[str, str]:
    """Versions of what computes."""
    version_of = {"python": ".".join(str(part) for part in sys.version_info[:2])}
    for name in ARITHMETIC:
        try:
            version_of[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return version_of

"""WebDataset shards: pictures and their classes in tar files, read in place; nothing is unpacked."""

from __future__ import annotations

import glob
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from compress.data.items import SUFFIXES, FolderSource, decode_image
from compress.data.preprocessing import Preprocessing
from compress.errors import DataError

MOST_BYTES = 1 << 28  # of one picture in its file


@dataclass(frozen=True)
class Place:
    """Where a file's bytes lie in a tar; `name` is for messages."""

    tar: Path
    start: int
    size: int
    name: str

    def read(self) -> bytes:
        """The bytes. Raises OSError."""
        with self.tar.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class TarSource(FolderSource):
    """Pictures in tar files, with the class in a `.cls` beside each, where there is one."""

    def __init__(
        self, name: str, preprocessing: Preprocessing | None, places: Sequence[Place], labels: np.ndarray | None
    ) -> None:
        super().__init__(name, preprocessing, [], labels, None)
        self.places = places

    @property
    def sample_count(self) -> int:
        """Number of pictures."""
        return len(self.places)

    def read_image(self, number: int) -> Image.Image:
        """One decoded picture. Raises DataError naming the file."""
        place = self.places[number]
        return decode_image(lambda: io.BytesIO(place.read()), f"{place.name} of {str(place.tar)!r}", self.mode)


def open_tars(spec: str, pattern: str, preprocessing: Preprocessing | None) -> TarSource:
    """The samples of one tar, or of all that a pattern with `*` names, in order. Raises DataError."""
    paths = [Path(path) for path in sorted(glob.glob(pattern))] if not Path(pattern).is_file() else [Path(pattern)]
    if not paths:
        raise DataError(f"{spec}: there is no file {pattern!r}.")
    places: list[Place] = []
    classes: list[int | None] = []
    for path in paths:
        pictures, words = read_index(spec, path)
        for key, place in pictures.items():
            places.append(place)
            classes.append(None if key not in words else read_class(spec, words[key]))
    if not places:
        raise DataError(f"{spec}: no pictures in it; files such as 0001.jpg and 0001.cls are expected.")
    unlabelled = [place.name for place, number in zip(places, classes, strict=True) if number is None]
    if unlabelled and len(unlabelled) < len(places):
        raise DataError(f"{spec}: {unlabelled[0]} has no .cls beside it, others have.")
    labels = None if unlabelled else np.array(classes, np.int64)
    return TarSource(spec, preprocessing, places, labels)


def read_index(spec: str, path: Path) -> tuple[dict[str, Place], dict[str, Place]]:
    """Pictures and `.cls` files of a tar by what stands in front of their suffix. Raises DataError."""
    pictures: dict[str, Place] = {}
    words: dict[str, Place] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.size > MOST_BYTES or member.issparse():
                    continue
                stem, _, suffix = member.name.rpartition(".")
                if Path(member.name).name.startswith("._"):  # macOS's note on a file
                    continue
                place = Place(path, member.offset_data, member.size, member.name)
                if f".{suffix.lower()}" in SUFFIXES:
                    pictures.setdefault(stem, place)
                elif suffix.lower() == "cls":
                    words[stem] = place
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{spec}: {str(path)!r} is no uncompressed tar file: {error}.") from None
    return pictures, words


def read_class(spec: str, place: Place) -> int:
    """The class number in a `.cls` file. Raises DataError."""
    try:
        number = int(place.read()[:32])
    except (OSError, ValueError):
        raise DataError(f"{spec}: {place.name} holds no class number.") from None
    if number < 0:
        raise DataError(f"{spec}: {place.name}: classes are numbered from 0, got {number}.")
    return number

"""Samples in arrays: `.npz` and `.safetensors` files, memory-mapped, and arrays that are already there."""

from __future__ import annotations

import json
import math
import mmap
import shutil
import struct
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.data.preprocessing import Preprocessing
from compress.data.source import DataSource
from compress.errors import DataError

CHUNK = 1 << 20
HASHED_BYTES = 1 << 24  # of samples, at once
VERIFIED_BYTES = 1 << 34  # members above that are not read as a whole before the first batch
BOMB_BYTES = 1 << 30
BOMB_RATIO = 200
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
HEADER_FAULTS = (
    ValueError, SyntaxError, TypeError, EOFError, OverflowError, MemoryError, RecursionError, KeyError, AttributeError,
    tokenize.TokenError, struct.error,
)  # fmt: skip
ARRAYS = ("images", "inputs", "labels", "targets")
WANTED = "`images` (N, H, W, C) uint8 or `inputs` (N, …) of real numbers"
NUMPY_NAMES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip


class ArraySource(DataSource):
    """Samples that are rows of an array, in memory or memory-mapped.

    Attributes:
        rows: images (N, H, W, C) uint8, or inputs (N, …) of a real type.
        images: which of the two.
        further: inputs after the first, of a network that takes several.
        names: of all inputs, where they were given by name.
    """

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing | None,
        rows: np.ndarray,
        labels: np.ndarray | None,
        *,
        images: bool,
        class_names: Sequence[str] | None = None,
        targets: np.ndarray | None = None,
        further: Sequence[np.ndarray] = (),
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name, preprocessing, labels, class_names, targets)
        self.rows = rows
        self.images = images
        self.further = tuple(further)
        self.names = None if names is None else tuple(names)

    @property
    def sample_count(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def reads_images(self) -> bool:
        """Whether the rows are images."""
        return self.images

    def read_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Rows with these numbers."""
        return rows_of(self.rows, numbers)

    def read_further(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """Rows of the other inputs: int64, bool or float32. Raises DataError on NaN, Inf."""
        further = tuple(read_numbers(self.name, rows_of(part, numbers), numbers) for part in self.further)
        self.let_go()
        return further

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Images through the preprocessing; inputs as they are, int64 or float32. Raises DataError on NaN, Inf."""
        rows = self.read_rows(numbers)
        if self.images:
            inputs = (self.preprocessing or Preprocessing()).apply(rows)
        else:
            inputs = read_numbers(self.name, rows, numbers)
        self.let_go()
        return inputs

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """The rows' bytes as stored, of one input after another."""
        parts = [np.ascontiguousarray(rows_of(part, numbers)) for part in (self.rows, *self.further)]
        widths = [part.nbytes // max(len(part), 1) for part in parts]
        flat = [memoryview(part.tobytes()) for part in parts]
        contents: list[bytes | memoryview] = []
        for row in range(len(numbers)):
            pieces = [whole[row * width : (row + 1) * width] for whole, width in zip(flat, widths, strict=True)]
            contents.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        self.let_go()
        return contents

    @property
    def hashed_at_once(self) -> int:
        """Fewer samples where each is large."""
        size = sum(part.nbytes for part in (self.rows, *self.further)) // max(1, self.sample_count)
        return max(1, min(super().hashed_at_once, HASHED_BYTES // max(1, size)))

    def let_go(self) -> None:
        """Give back the pages of mapped files: what was read of these would count as this process's memory for good."""
        for part in (self.rows, *self.further):
            let_go(part)

    def in_order(self, names: Sequence[str]) -> ArraySource:
        """The same samples with the named inputs in this order. Raises ValueError where these are not their names."""
        if self.names is None or sorted(names) != sorted(self.names):
            raise ValueError(f"the inputs are named {self.names}, not {tuple(names)}")
        known = dict(zip(self.names, (self.rows, *self.further), strict=True))
        first, *further = (known[name] for name in names)
        return ArraySource(
            self.name, self.preprocessing, first, self.labels, images=False, class_names=self.class_names,
            targets=self.targets, further=further, names=names,
        )  # fmt: skip


def let_go(rows: np.ndarray) -> None:
    """Give the pages of a mapped file back, where the system knows how; whoever reads them again gets them again."""
    base: object = rows
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def rows_of(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Rows with these numbers: one contiguous read where they follow each other."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and bool((np.diff(numbers) == 1).all()):
        return np.asarray(rows[int(numbers[0]) : int(numbers[-1]) + 1])
    return np.asarray(rows[numbers])


def read_numbers(name: str, rows: np.ndarray, numbers: np.ndarray) -> Tensor:
    """Rows (B, …) as int64, bool or float32. Raises DataError on NaN, Inf."""
    if rows.dtype.kind == "b":
        return torch.from_numpy(np.array(rows))
    if rows.dtype.kind in "iu":
        return torch.from_numpy(rows.astype(np.int64))
    return finite_inputs(name, rows, numbers)


def make_array_source(
    name: str,
    preprocessing: Preprocessing | None,
    arrays: Mapping[str, np.ndarray],
    class_names: Any = None,
    names: Sequence[str] | None = None,
) -> ArraySource:
    """The source in named arrays: `images` or `inputs`, and `labels` or else `targets` if there are some.

    Args:
        names: of arrays that are the inputs in place of those; images where there is one of bytes (N, H, W, C). Without
            them `inputs_1`, `inputs_2`, … are the inputs after `inputs`.

    Raises:
        DataError: an array is missing, or has the wrong type or shape.
    """
    present = [key for key in ("images", "inputs") if key in arrays]
    if names is not None:
        present = [names[0]]
    if len(present) != 1:
        raise DataError(f"{name}: expected {WANTED}, and optionally `labels` (N,); found {describe_names(arrays)}.")
    rows = arrays[present[0]]
    images = present[0] == "images"
    if names is not None:
        images = len(names) == 1 and rows.dtype == np.uint8 and rows.ndim in (3, 4)
    if images:
        if rows.ndim == 3:
            rows = rows[..., None]
        if rows.dtype != np.uint8 or rows.ndim != 4 or rows.shape[-1] not in (1, 3, 4):
            raise DataError(
                f"{name}: `images` must be uint8 of shape (N, H, W, C) with 1, 3 or 4 channels, "
                f"got {rows.dtype} {rows.shape}; numbers that are ready for the network go under `inputs`."
            )
    elif rows.dtype.kind not in "fiu" or not rows.ndim:
        raise DataError(f"{name}: `inputs` must be real numbers of shape (N, …), got {rows.dtype} {rows.shape}.")
    if len(rows) == 0 or rows.size == 0:
        raise DataError(f"{name}: `{present[0]}` has shape {rows.shape}: there are no samples.")
    labels = None if "labels" not in arrays else check_label_array(name, arrays["labels"], len(rows))
    targets = None
    if labels is None and "targets" in arrays:
        targets = check_target_array(name, arrays["targets"], len(rows))
    further = [arrays[key] for key in (further_names(arrays) if names is None else names[1:])]
    for part, key in zip(further, further_names(arrays) if names is None else names[1:], strict=True):
        if part.dtype.kind not in "fiub" or not part.ndim or len(part) != len(rows):
            raise DataError(
                f"{name}: `{key}` must be numbers of shape (N, …) with N = {len(rows)}, got {part.dtype} {part.shape}."
            )
    return ArraySource(
        name, preprocessing, rows, labels, images=images, class_names=class_names, targets=targets, further=further,
        names=names if names is not None and len(names) > 1 else None,
    )  # fmt: skip


def further_names(arrays: Collection[str]) -> list[str]:
    """`inputs_1`, `inputs_2`, … as far as they are there."""
    names: list[str] = []
    while f"inputs_{len(names) + 1}" in arrays:
        names.append(f"inputs_{len(names) + 1}")
    return names


@dataclass(frozen=True)
class Naming:
    """Which arrays of a file are what; said behind its path: `mine.npz?inputs=image,features&labels=y`.

    Attributes:
        inputs: their names; empty for the usual ones.
        labels, targets: None for the usual ones where they are there; empty for none.
    """

    inputs: tuple[str, ...] = ()
    labels: str | None = None
    targets: str | None = None

    @classmethod
    def of(cls, spec: str, options: Mapping[str, Any]) -> Naming:
        """What the options of a spec say. Raises DataError on others."""
        unknown = [key for key in options if key not in ("inputs", "labels", "targets")]
        if unknown:
            raise DataError(
                f"{spec}: {unknown[0]!r} is no option; expected inputs=NAME,…, labels=NAME or targets=NAME."
            )
        inputs = tuple(part.strip() for part in str(options.get("inputs", "")).split(",") if part.strip())
        answers = ((key in options, options.get(key)) for key in ("labels", "targets"))
        return cls(inputs, *((str(name or "") if given else None) for given, name in answers))

    def wanted(self, present: Collection[str]) -> list[str]:
        """Names of the arrays to read, of those that there are."""
        if self == Naming():
            return [key for key in (*ARRAYS, *further_names(present)) if key in present]
        return [*self.all_inputs, *self.answers(present).values()]

    def answers(self, present: Collection[str]) -> dict[str, str]:
        """`labels` and `targets` -> the names that they have, of arrays that there are."""
        named = {kind: name for kind in ("labels", "targets") if (name := getattr(self, kind)) is not None}
        if named:
            return {kind: name for kind, name in named.items() if name}
        return {kind: kind for kind in ("labels", "targets") if kind in present and kind not in self.all_inputs}

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return self.inputs or ("inputs",)

    def source(self, name: str, preprocessing: Preprocessing | None, arrays: Mapping[str, np.ndarray]) -> ArraySource:
        """The source in arrays that were read as `wanted`. Raises DataError."""
        if self == Naming():
            return make_array_source(name, preprocessing, arrays)
        renamed = {key: value for key, value in arrays.items() if key in self.all_inputs}
        renamed |= {kind: arrays[key] for kind, key in self.answers(arrays).items()}
        return make_array_source(name, preprocessing, renamed, names=self.all_inputs)


def describe_names(arrays: Collection[object]) -> str:
    """The names that were found instead of the wanted ones, and how to give them the wanted ones."""
    names = sorted(str(name) for name in arrays)
    if not names:
        return "no array"
    shown = ", ".join(f"`{name}`" for name in names[:8]) + (" and more" if len(names) > 8 else "")
    if set(names) & {"images", "inputs"}:
        return f"{shown}; give one of `images` and `inputs`"
    answers = [name for name in names if name in ("labels", "targets")]
    inputs = [name for name in names if name not in answers]
    if answers and inputs:
        return f"{shown}; say which are the inputs, such as PATH?inputs={','.join(inputs)}&{answers[0]}={answers[0]}"
    if answers:
        return f"{shown} alone"
    pairs = ", ".join(f"{new}=old[{old!r}]" for new, old in zip(("inputs", "labels"), names, strict=False))
    option = "&".join(f"{new}={old}" for new, old in zip(("inputs", "labels"), names, strict=False))
    several = f" (PATH?inputs={','.join(names[:8])} where all are inputs)" if len(names) > 1 else ""
    return (
        f"{shown}; say which is which, such as PATH?{option}{several}, or save under these names: "
        f"numpy.savez(NEW, {pairs}) after old = numpy.load(OLD)"
    )


def finite_inputs(name: str, rows: np.ndarray, numbers: np.ndarray) -> Tensor:
    """Real rows (B, …), which are the samples with these numbers, as float32. Raises DataError on NaN, Inf."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is caught below
        inputs = torch.from_numpy(rows.astype(np.float32))
    finite = torch.isfinite(inputs).reshape(len(inputs), -1).all(1)
    if not bool(finite.all()):
        first = int(numbers[int((~finite).nonzero()[0])])
        raise DataError(f"{name}: sample {first} holds NaN or Inf (of float32).")
    return inputs


def check_label_array(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Labels (N,) int64, or (N, …) of masks, tokens or several yes and no, where negative ones say nothing.

    Rows of zeros with a single one each are class numbers.

    Raises:
        DataError: not one a sample, no whole numbers, or a negative label of a whole sample.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if is_one_hot(labels):
        labels = labels.argmax(1)
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and is_whole(labels))
    if not whole or labels.ndim < 1 or len(labels) != count:
        raise DataError(
            f"{name}: `labels` must be whole numbers of shape (N,) = ({count},), or (N, …) for masks and tokens, got "
            f"{labels.dtype} {labels.shape}; real numbers to fit go under `targets`."
        )
    labels = np.asarray(labels).astype(np.int64)
    if labels.ndim == 1 and labels.size and labels.min() < 0:
        first = int(np.flatnonzero(labels < 0)[0])
        raise DataError(f"{name}: labels must be 0 or larger; sample {first} has label {int(labels[first])}.")
    return labels


def is_one_hot(labels: np.ndarray) -> bool:
    """Whether each of several rows (N, K), K ≥ 2, holds a single one and zeros."""
    if labels.ndim != 2 or labels.shape[1] < 2 or len(labels) < 2 or labels.dtype.kind not in "iubf":
        return False
    return bool(((labels == 0) | (labels == 1)).all()) and bool(((labels == 1).sum(1) == 1).all())


def is_whole(values: np.ndarray) -> bool:
    """Whether real numbers are all whole, and small enough to be told apart from their neighbours."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = values.astype(np.float64)
        return bool(((np.abs(wide) < 2**24) & (wide == np.round(wide))).all())


def check_target_array(name: str, targets: np.ndarray, count: int) -> np.ndarray:
    """Real targets (N, D) float32 of numbers (N,) or (N, …). Raises DataError."""
    if targets.dtype.kind not in "fiu" or targets.ndim < 1 or len(targets) != count or targets.size == 0:
        raise DataError(
            f"{name}: `targets` must be real numbers of shape (N, …) with N = {count}, got {targets.dtype} "
            f"{targets.shape}."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is caught below
        rows = np.asarray(targets).reshape(count, -1).astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise DataError(f"{name}: the target of sample {int(wrong[0])} is NaN, Inf or too large for float32.")
    return rows


def open_npz(name: str, path: Path, preprocessing: Preprocessing | None, naming: Naming = Naming()) -> ArraySource:
    """An uncompressed `.npz` is memory-mapped; a compressed one is unpacked into an unnamed temporary file.

    Nothing is unpickled. Raises DataError.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            for key in naming.wanted(members):
                if key not in members:
                    raise DataError(f"{name}: there is no array `{key}`; found {', '.join(sorted(members)[:8])}.")
                arrays[key] = map_member(name, path, archive, members[key])
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
        struct.error,
        UnicodeDecodeError,
    ) as error:
        raise DataError(f"{name}: not a readable .npz file: {str(error).rstrip('.')}.") from None
    if naming == Naming() and not {"images", "inputs"} & set(arrays):
        named = [member for member in members if members[member].filename.endswith(".npy")]
        if members and not named:
            raise DataError(f"{name}: a zip archive without arrays, no .npz file; expected {WANTED} in an .npz.")
        raise DataError(f"{name}: expected {WANTED}, and optionally `labels` (N,); found {describe_names(named)}.")
    return naming.source(name, preprocessing, arrays)


def map_member(name: str, path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array in one member of an `.npz`, memory-mapped, its checksum verified up to 16 GiB. Raises DataError."""
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(member.header_offset)
            local = file.read(30)
            if len(local) < 30 or local[:4] != b"PK\x03\x04":
                raise DataError(f"{name}: the archive is damaged at {member.filename!r}.")
            name_length, extra_length = struct.unpack("<HH", local[26:30])
            start = member.header_offset + 30 + name_length + extra_length
            if member.file_size <= VERIFIED_BYTES and checksum(file, start, member.file_size) != member.CRC:
                raise DataError(f"{name}: {member.filename!r} is damaged: its checksum is not the recorded one.")
            file.seek(start)
            return map_npy(f"{name}: {member.filename}", file, start + member.file_size)
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > BOMB_BYTES and ratio > BOMB_RATIO:
        raise DataError(
            f"{name}: {member.filename!r} would unpack to {member.file_size} bytes, {ratio:.0f} times its size in the "
            "file; save it uncompressed with numpy.savez if it is meant to."
        )
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if member.file_size > 0.9 * free:
        raise DataError(
            f"{name}: {member.filename!r} unpacks to {member.file_size} bytes, the temporary folder has {free} free; "
            "save it uncompressed with numpy.savez, or set TMPDIR."
        )
    with tempfile.TemporaryFile() as unpacked:  # it has no name to remove; the mapping keeps its content alive
        size = 0
        with archive.open(member) as packed:
            while chunk := packed.read(CHUNK):
                size += len(chunk)
                if size > member.file_size:
                    raise DataError(f"{name}: {member.filename!r} unpacks to more than it declares.")
                unpacked.write(chunk)
        unpacked.flush()
        unpacked.seek(0)
        return map_npy(f"{name}: {member.filename}", unpacked, size)


def checksum(file: IO[bytes], start: int, size: int) -> int:
    """CRC-32 of `size` bytes from `start` on, or of those that there are."""
    file.seek(start)
    crc = 0
    while size > 0 and (chunk := file.read(min(CHUNK, size))):
        crc = zlib.crc32(chunk, crc)
        size -= len(chunk)
    return crc


def map_npy(name: str, file: IO[bytes], end: int) -> np.ndarray:
    """The `.npy` array that starts where `file` stands and must end by byte `end`, memory-mapped. Raises DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(file)
            if version not in NPY_HEADERS:
                raise DataError(f"{name}: .npy version {version} is not supported.")
            shape, fortran, dtype = NPY_HEADERS[version](file)
    except HEADER_FAULTS as error:
        raise DataError(f"{name}: not a readable array: {' '.join(str(error).split())[:120]}.") from None
    if dtype.kind in "US":
        raise DataError(f"{name}: arrays of words are not read; save the classes' numbers, 0, 1, …, in their place.")
    if dtype.hasobject or dtype.kind not in "fiub":
        why = " (they could execute code)" if dtype.hasobject else ""
        raise DataError(f"{name}: arrays of {dtype} are not read{why}; save plain numbers.")
    return map_bytes(name, file, file.tell(), end, shape, dtype, fortran=fortran)


def map_bytes(
    name: str, file: IO[bytes], start: int, end: int, shape: tuple[int, ...], dtype: np.dtype, *, fortran: bool = False
) -> np.ndarray:
    """An array over bytes of a file, after a check that they exist. Raises DataError."""
    needed = math.prod(shape) * dtype.itemsize
    file.seek(0, 2)
    if min(shape, default=1) < 0 or start + needed > min(end, file.tell()):
        raise DataError(f"{name}: shape {shape} of {dtype} needs {needed} bytes, the file holds fewer: truncated?")
    if needed == 0:
        return np.zeros(shape, dtype)
    try:
        return np.memmap(file, dtype=dtype, mode="r", offset=start, shape=shape, order="F" if fortran else "C")
    except (OSError, MemoryError, OverflowError, ValueError) as error:
        raise DataError(f"{name}: {needed} bytes cannot be mapped: {error or 'no address space is left'}.") from None


def open_npy(name: str, path: Path, preprocessing: Preprocessing | None, options: Mapping[str, Any]) -> ArraySource:
    """One array in a `.npy`, memory-mapped: images where it is uint8 (N, H, W, C), else inputs (N, …).

    Args:
        options: `labels`, `targets`: paths of such files with the answers; `inputs`: further inputs.

    Raises:
        DataError: no such file, no plain numbers, or not as many.
    """
    unknown = [key for key in options if key not in ("inputs", "labels", "targets")]
    if unknown:
        raise DataError(f"{name}: {unknown[0]!r} is no option; expected labels=FILE, targets=FILE or inputs=FILE,….")
    further = [part for part in str(options.get("inputs") or "").split(",") if part]
    rows, *others = (read_npy(name, place) for place in (path, *map(Path, further)))
    kind = "images" if rows.dtype == np.uint8 and rows.ndim == 4 and rows.shape[-1] in (1, 3, 4) else "inputs"
    arrays = {kind: rows, **{f"inputs_{number}": part for number, part in enumerate(others, 1)}}
    for key in ("labels", "targets"):
        if key in options:
            arrays[key] = read_npy(name, Path(str(options[key])))
    return make_array_source(name, preprocessing, arrays)


def read_npy(name: str, path: Path) -> np.ndarray:
    """The array in a `.npy` file, memory-mapped. Raises DataError."""
    try:
        with path.open("rb") as file:
            return map_npy(f"{name}: {path.name}", file, path.stat().st_size)
    except OSError as error:
        raise DataError(f"{name}: {str(path)!r} cannot be read: {error.strerror or error}.") from None


def open_safetensors(
    name: str, path: Path, preprocessing: Preprocessing | None, naming: Naming = Naming()
) -> ArraySource:
    """A `.safetensors` file with `images` or `inputs`, and `labels` or `targets`; memory-mapped. Raises DataError."""
    arrays = {}
    try:
        with safe_open(path, framework="np"):  # checks every offset against the file
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            wanted = naming.wanted(header)
            if naming == Naming() and not {"images", "inputs"} & set(wanted):
                raise DataError(f"{name}: expected {WANTED}; found {describe_names(header)}.")
            for key in wanted:
                if key not in header:
                    raise DataError(f"{name}: there is no array `{key}`; found {', '.join(sorted(header)[:8])}.")
                entry = header[key]
                if entry["dtype"] not in NUMPY_NAMES:
                    raise DataError(f"{name}: `{key}` has type {entry['dtype']}, which is not read as data.")
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                dtype = np.dtype(NUMPY_NAMES[entry["dtype"]])
                arrays[key] = map_bytes(f"{name}: {key}", file, start, end, tuple(entry["shape"]), dtype)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, MemoryError, struct.error) as error:
        raise DataError(f"{name}: not a readable .safetensors file: {str(error).rstrip('.')}.") from None
    return naming.source(name, preprocessing, arrays)

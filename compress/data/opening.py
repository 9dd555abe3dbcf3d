"""Which source a data spec names: the catalogue of schemes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from compress.data.arrays import (
    ARRAYS,
    Naming,
    describe_names,
    further_names,
    make_array_source,
    open_npy,
    open_npz,
    open_safetensors,
)
from compress.data.hub import open_hub
from compress.data.importing import describe_fault, import_object, is_file_spec, split_query
from compress.data.items import DatasetSource, open_folder
from compress.data.preprocessing import Preprocessing
from compress.data.source import DataSource, Subset, draw_indices
from compress.data.tables import open_csv, open_parquet
from compress.data.tars import open_tars
from compress.data.texts import open_text
from compress.errors import CompressError, DataError, nearest

KINDS = ("folder", "npz", "npy", "safetensors", "csv", "parquet", "text", "tar", "hf", "torchvision", "digits")
FILES = ("npz", "npy", "safetensors", "csv", "parquet", "text")
SUFFIXES = {
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text", ".tar": "tar", ".npy": "npy", ".npz": "npz",
    ".safetensors": "safetensors",
}  # fmt: skip
EXPECTED = (
    "expected folder:PATH, npz:PATH, npy:PATH, safetensors:PATH, csv:PATH?label=COLUMN, parquet:PATH, "
    "text:PATH?tokenizer=FOLDER, tar:PATH, hf:PATH, torchvision:NAME?root=PATH&train=true, package.module:function, "
    "digits, or the path of such a folder or file"
)


def open_data(
    spec: str, preprocessing: Preprocessing | None = None, *, limit: int | None = None, seed: int = 0
) -> DataSource:
    """The samples that `spec` names; files are memory-mapped or read sample by sample, never as a whole.

    Args:
        spec: `folder:PATH` (one class a subfolder), `npz:PATH` or `safetensors:PATH` (`images` (N, H, W, C) uint8 or
            `inputs` (N, …) float; `labels` (N,), or else real `targets` (N, …), optional; `?inputs=a,b&labels=c` for
            other names), `npy:PATH?labels=PATH`, `csv:PATH?label=COLUMN` or `target=`, `parquet:PATH` likewise,
            `text:PATH?tokenizer=FOLDER&length=128`, `tar:PATH` (WebDataset), `hf:PATH` (saved `datasets`),
            `torchvision:NAME?root=PATH&train=true`, `package.module:function?key=value`, `digits` or
            `digits?train=false` (packaged), or a bare path.
        preprocessing: applied to images; float inputs are fed as they are.
        limit: at most so many samples, a seeded draw.

    Raises:
        DataError: the spec, the file or its content cannot be used.
    """
    source = open_spec(spec, preprocessing)
    if limit is None or limit >= source.sample_count:
        return source
    return Subset(source, draw_indices(source.sample_count, limit, seed).numpy())


def open_spec(spec: str, preprocessing: Preprocessing | None) -> DataSource:
    """All samples of a spec. Raises DataError."""
    if not spec or "\0" in spec:
        raise DataError(f"The data spec is {spec!r}; {EXPECTED}.")
    scheme, _, rest = spec.partition(":")
    path = Path(rest)
    if scheme == "folder":
        return open_folder(spec, path, preprocessing)
    if scheme in (*FILES, "tar", "hf"):
        place, query = split_path(rest)
        return open_kind(scheme, spec, place, query, preprocessing)
    if scheme == "torchvision":
        return open_torchvision(spec, rest, preprocessing)
    name, options = split_query(spec)
    if name == "digits":
        return open_digits(spec, options, preprocessing)
    place, query = split_path(spec)
    if Path(place).exists():
        return open_path(spec, Path(place), query, preprocessing)
    meant = nearest(scheme if rest else name, KINDS)
    module = scheme.replace(".", "").replace("_", "").isalnum() and rest.partition("?")[0].isidentifier()
    if (rest and module) or is_file_spec(name):
        try:
            return open_function(spec, name, options, preprocessing)
        except DataError as error:
            raise (DataError(f"{str(error).rstrip('.')}{meant}.") if meant else error) from None
    if rest and not Path(spec).suffix:
        raise DataError(f"The data spec {spec!r} is not understood{meant}; {EXPECTED}.")
    raise DataError(f"There is no data at {spec!r}{meant}; {EXPECTED}.")


def split_path(text: str) -> tuple[str, dict[str, Any]]:
    """A path and the options behind it; a `?` in the name of a file that is there stays."""
    return (text, {}) if Path(text).exists() else split_query(text)


def open_kind(
    kind: str, spec: str, place: str, options: Mapping[str, Any], preprocessing: Preprocessing | None
) -> DataSource:
    """A file or folder of a kind that takes options. Raises DataError."""
    path = Path(place)
    if kind == "tar":
        refuse_options(spec, options)
        return open_tars(spec, place, preprocessing)
    if kind == "hf":
        return open_hub(spec, path, options, preprocessing)
    check_file(spec, path)
    if kind == "npy":
        return open_npy(spec, path, preprocessing, options)
    if kind in ("npz", "safetensors"):
        return (open_npz if kind == "npz" else open_safetensors)(spec, path, preprocessing, Naming.of(spec, options))
    return {"csv": open_csv, "parquet": open_parquet, "text": open_text}[kind](spec, path, options)


def refuse_options(spec: str, options: Mapping[str, Any]) -> None:
    """Raises DataError where there are some."""
    if options:
        raise DataError(f"{spec}: {next(iter(options))!r} is no option; it takes none.")


def check_file(spec: str, path: Path) -> None:
    """Refuse what is not a regular, readable, non-empty file. Raises DataError."""
    try:
        if not path.is_file():
            raise DataError(f"{spec}: there is no file {str(path)!r}.")
        if path.stat().st_size == 0:
            raise DataError(f"{spec}: {str(path)!r} is empty.")
    except OSError as error:
        raise DataError(f"{spec}: {error}.") from None


def open_path(spec: str, path: Path, options: Mapping[str, Any], preprocessing: Preprocessing | None) -> DataSource:
    """A bare path, recognised by what it is. Raises DataError."""
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return open_hub(spec, path, options, preprocessing)
        refuse_options(spec, options)
        return open_folder(spec, path, preprocessing)
    check_file(spec, path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise DataError(f"{spec}: {error}.") from None
    known = {b"PK": "npz", b"\x93NUMPY": "npy", b"PAR1": "parquet"}
    kind = next((known_kind for begin, known_kind in known.items() if start.startswith(begin)), None)
    kind = kind or ("safetensors" if start[8:9] == b"{" else SUFFIXES.get(path.suffix.lower()))
    if kind is None:
        raise DataError(f"{spec}: not recognised by its content nor by its name; {EXPECTED}.")
    return open_kind(kind, spec, str(path), options, preprocessing)


def open_digits(spec: str, options: Mapping[str, Any], preprocessing: Preprocessing | None) -> DataSource:
    """The packaged handwritten digits, 8×8 grey: 1 297 to train on, or with `train=false` the other 500 to test on."""
    if not set(options) <= {"train"} or options.get("train", True) not in (True, False):
        raise DataError(f"The data spec {spec!r} is not understood; expected digits, digits?train=true or =false.")
    split = "train" if options.get("train", True) else "test"
    with resources.as_file(resources.files("compress.data") / f"digits_{split}.safetensors") as path:
        source = open_safetensors(spec, path, preprocessing)
    source.class_names = tuple("0123456789")
    return source


def open_torchvision(spec: str, rest: str, preprocessing: Preprocessing | None) -> DataSource:
    """`torchvision.datasets.NAME(**options)`; downloads nothing unless `download=true` is given. Raises DataError."""
    from torchvision import datasets

    name, options = split_query(rest)
    factory = getattr(datasets, name, None)
    if not isinstance(factory, type):
        raise DataError(f"{spec}: torchvision.datasets has no {name!r}.")
    try:
        dataset = factory(**options)
    except (TypeError, ValueError, RuntimeError, OSError, ImportError, EOFError) as error:
        raise DataError(f"{spec}: {' '.join(str(error).split()).rstrip('.')}.") from None
    return wrap_object(spec, dataset, preprocessing)


def open_function(spec: str, name: str, options: Mapping[str, Any], preprocessing: Preprocessing | None) -> DataSource:
    """What the user's function returns. Its module is executed. Raises DataError."""
    function = import_object(name, DataError)
    if not callable(function):
        raise DataError(f"{spec}: {name!r} is not a function.")
    try:
        returned = function(**options)
    except CompressError:
        raise
    except Exception as error:  # whatever the user's function raises is a fault of the data
        raise DataError(f"{spec}: the function fails: {describe_fault(error)}.") from error
    return wrap_object(spec, returned, preprocessing)


def wrap_object(spec: str, value: Any, preprocessing: Preprocessing | None) -> DataSource:
    """The source in a DataSource, a mapping of arrays, a pair (samples, labels), a map-style data set or its loader.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, DataSource):
        return value
    if isinstance(value, DataLoader):  # batches and their order are the run's own matter
        value = value.dataset
    data, targets = getattr(value, "data", None), getattr(value, "targets", None)
    if isinstance(data, (np.ndarray, torch.Tensor)) and targets is not None and str(data.dtype).endswith("uint8"):
        arrays = {"images": as_array(spec, data), "labels": as_array(spec, targets)}
        return make_array_source(spec, preprocessing, arrays, getattr(value, "classes", None))
    if isinstance(value, (tuple, list)) and len(value) == 2:
        rows, answers = (as_array(spec, part) for part in value)
        kind = "targets" if answers.dtype.kind == "f" else "labels"
        value = {"images" if rows.dtype == np.uint8 else "inputs": rows, kind: answers}
    if isinstance(value, Mapping):
        wanted = (*ARRAYS, *further_names([str(key) for key in value]))
        arrays = {key: as_array(spec, value[key]) for key in wanted if value.get(key) is not None}
        if not arrays:
            raise DataError(
                f"{spec}: expected a mapping with `images` or `inputs`; found {describe_names(value.keys())}."
            )
        return make_array_source(spec, preprocessing, arrays)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return DatasetSource(spec, preprocessing, value)
    raise DataError(
        f"{spec}: got {type(value).__name__}; expected a mapping with `images` or `inputs`, a pair (samples, labels) "
        "or a data set with a length."
    )


def as_array(spec: str, values: Any) -> np.ndarray:
    """A numpy array of a tensor, an array or a list. Raises DataError where that is no array of numbers."""
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        rows = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{spec}: samples and labels must be arrays of numbers: {describe_fault(error)}.") from None
    if rows.dtype.kind not in "fiub":
        raise DataError(
            f"{spec}: samples and labels must be arrays of numbers, got {type(values).__name__} of {rows.dtype}."
        )
    return rows

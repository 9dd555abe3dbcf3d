"""Folders that Hugging Face `datasets` saved with `save_to_disk`: `hf:PATH`. Nothing is downloaded or run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.items import DatasetSource
from compress.data.preprocessing import Preprocessing
from compress.data.source import DataSource
from compress.data.tables import Columns
from compress.errors import DataError
from compress.strict_json import read_object

PICTURES, ANSWERS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


class Rows:
    """A split as a map-style data set of (picture, label) pairs, or of pictures."""

    def __init__(self, split: Any, picture: str, label: str | None) -> None:
        self.split, self.picture, self.label = split, picture, label
        names = getattr(split.features.get(label), "names", None) if label is not None else None
        if label is not None:
            self.targets = list(split[label])
        if names:
            self.classes = tuple(names)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> Any:
        row = self.split[int(number)]
        return row[self.picture] if self.label is None else (row[self.picture], row[self.label])


def open_hub(spec: str, path: Path, options: Mapping[str, Any], preprocessing: Preprocessing | None) -> DataSource:
    """The samples of a saved data set.

    Args:
        options: `split` where the folder holds several; `image` and `label` name columns; other options are a table's.

    Raises:
        DataError: no such folder, or columns that are no samples.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{spec}: it needs datasets: pip install 'compress-networks[data]'.") from None
    if not path.is_dir():
        raise DataError(f"{spec}: there is no folder {str(path)!r}.")
    check_saved(spec, path)
    try:
        saved: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever pyarrow and the library raise on a damaged folder
        raise DataError(f"{spec}: not a folder of save_to_disk: {' '.join(str(error).split())[:160]}.") from None
    given = dict(options)
    split = given.pop("split", None)
    if isinstance(saved, Mapping):
        if split not in saved:
            raise DataError(f"{spec}: say which split: {', '.join(f'split={name}' for name in saved)}.")
        saved = saved[split]
    elif split is not None:
        raise DataError(f"{spec}: the folder holds one split; leave split={split} out.")
    columns = saved.column_names
    picture = given.pop("image", next((name for name in PICTURES if name in columns), None))
    if picture is None:
        if "label" not in given and "target" not in given and "label" in columns:
            given["label"] = "label"
        table = Columns.of(spec, given)
        return table.source(spec, {name: plain_column(saved[name]) for name in columns})
    label = given.pop("label", next((name for name in ANSWERS if name in columns), None))
    unknown = [*given, *(name for name in (picture, label) if name is not None and name not in columns)]
    if unknown:
        raise DataError(f"{spec}: there is no option or column {unknown[0]!r}; columns are {', '.join(columns)}.")
    return DatasetSource(spec, preprocessing, Rows(saved, str(picture), None if label is None else str(label)))


def check_saved(spec: str, path: Path) -> None:
    """Refuse a folder whose lists of files lead out of it. Raises DataError."""
    lists = [path / "dataset_dict.json", *path.glob("state.json"), *path.glob("*/state.json")]
    names: list[Any] = []
    for file in lists:
        if file.is_file():
            content = read_object(file, DataError, "a list of a saved data set")
            names += list(content.get("splits") or [])
            names += [entry.get("filename") for entry in content.get("_data_files") or [] if isinstance(entry, dict)]
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]
    if wrong:
        raise DataError(f"{spec}: the folder names {str(wrong[0])!r:.80}, which is no file in it.")


def plain_column(values: Any) -> Any:
    """A column as a list of what it holds."""
    return values.tolist() if isinstance(values, np.ndarray) else list(values)

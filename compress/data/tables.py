"""Tables: CSV by the standard library, Parquet by pyarrow; a row is a sample."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.arrays import ArraySource, check_label_array, check_target_array
from compress.data.source import DataSource
from compress.data.texts import encode_lines
from compress.errors import DataError

DELIMITERS = ",;\t|"
OPTIONS = ("inputs", "label", "target", "delimiter", "header", "text", "tokenizer", "length")
MOST_FIELD = 1 << 20  # characters of one cell


@dataclass(frozen=True)
class Columns:
    """Which columns are what.

    Attributes:
        inputs: names; empty: all that are nothing else. target: of real numbers to fit.
        text: one that a tokenizer makes the inputs of, to a `length`.
    """

    inputs: tuple[str, ...] = ()
    label: str | None = None
    target: tuple[str, ...] = ()
    text: str | None = None
    tokenizer: str | None = None
    length: int = 128

    @classmethod
    def of(cls, spec: str, options: Mapping[str, Any]) -> Columns:
        """What the options of a spec say. Raises DataError on others."""
        unknown = [key for key in options if key not in OPTIONS]
        if unknown:
            raise DataError(f"{spec}: {unknown[0]!r} is no option; expected {', '.join(OPTIONS)}.")
        if "label" in options and "target" in options:
            raise DataError(f"{spec}: give `label`, of classes, or `target`, of real numbers, not both.")
        if ("text" in options) != ("tokenizer" in options):
            raise DataError(f"{spec}: `text`, the column to read, and `tokenizer`, a folder, go together.")
        length = options.get("length", 128)
        if type(length) is not int or not 1 <= length <= 1 << 16:
            raise DataError(f"{spec}: `length` must be a number of tokens, got {length!r}.")
        label, text, tokenizer = (
            None if key not in options else str(options[key]) for key in ("label", "text", "tokenizer")
        )
        return cls(names_in(options.get("inputs")), label, names_in(options.get("target")), text, tokenizer, length)

    def source(self, spec: str, table: Mapping[str, Sequence[Any] | np.ndarray]) -> DataSource:
        """The samples in a table of columns (N,). Raises DataError."""
        asked = [*self.inputs, *self.target, *(name for name in (self.label, self.text) if name is not None)]
        missing = [name for name in asked if name not in table]
        if missing:
            raise DataError(f"{spec}: there is no column {missing[0]!r}; there are {', '.join(list(table)[:12])}.")
        count = len(next(iter(table.values()), ()))
        if not count:
            raise DataError(f"{spec}: the table has no rows.")
        labels, classes = (None, None) if self.label is None else read_labels(spec, self.label, table[self.label])
        targets = None
        if self.target:
            targets = np.stack([read_column(spec, name, table[name]) for name in self.target], 1)
            targets = check_target_array(spec, targets, count)
        if self.text is not None and self.tokenizer is not None:
            ids, mask = encode_lines(spec, [str(text) for text in table[self.text]], self.tokenizer, self.length)
            return ArraySource(
                spec, None, ids, labels, images=False, class_names=classes, targets=targets, further=(mask,),
                names=("input_ids", "attention_mask"),
            )  # fmt: skip
        names = self.inputs or tuple(name for name in table if name not in asked)
        if not names:
            raise DataError(f"{spec}: no column is left for the inputs.")
        rows = np.stack([read_column(spec, name, table[name]) for name in names], 1).astype(np.float32)
        return ArraySource(spec, None, rows, labels, images=False, class_names=classes, targets=targets)


def names_in(value: Any) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(part.strip() for part in str(value or "").split(",") if part.strip())


def read_column(spec: str, name: str, values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """A column of finite numbers (N,) float64. Raises DataError, which names the first that is none."""
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        column = np.array([as_number(value) for value in values])
    wrong = np.flatnonzero(~np.isfinite(column))
    if len(wrong):
        cell = str(values[int(wrong[0])])[:40]
        raise DataError(
            f"{spec}: column {name!r}, row {int(wrong[0]) + 1}: a finite number was expected, got {cell!r}; leave the "
            "column out with inputs=NAME,… or fill it in."
        )
    return column


def as_number(value: Any) -> float:
    """A number, or NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def read_labels(spec: str, name: str, values: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Class numbers (N,); of words their places in alphabetical order, and the words. Raises DataError."""
    numbers = np.array([as_number(value) for value in values])
    if np.isfinite(numbers).all():
        return check_label_array(spec, numbers, len(numbers)), None
    words = [str(value).strip() for value in values]
    empty = [number for number, word in enumerate(words) if not word]
    if empty:
        raise DataError(f"{spec}: column {name!r}, row {empty[0] + 1}: the label is missing.")
    classes, places = np.unique(words, return_inverse=True)
    return places.astype(np.int64), tuple(str(name) for name in classes)


def open_csv(spec: str, path: Path, options: Mapping[str, Any]) -> DataSource:
    """A CSV file: a header, then a row for each sample. Raises DataError."""
    columns = Columns.of(spec, options)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline(MOST_FIELD)
            delimiter = str(options.get("delimiter") or max(DELIMITERS, key=first.count)).replace("\\t", "\t")
            if len(delimiter) != 1:
                raise DataError(f"{spec}: `delimiter` must be one character, got {delimiter!r}.")
            file.seek(0)
            csv.field_size_limit(MOST_FIELD)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{spec}: not a readable CSV file: {error}.") from None
    if not rows:
        raise DataError(f"{spec}: the table has no rows.")
    header = options.get("header", any(np.isnan(as_number(cell)) for cell in rows[0]))
    names = [cell.strip() for cell in rows[0]] if header else [str(number) for number in range(len(rows[0]))]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise DataError(f"{spec}: two columns are called {repeated[0]!r}.")
    body = rows[1:] if header else rows
    for number, row in enumerate(body):
        if len(row) != len(names):
            raise DataError(f"{spec}: row {number + 1} has {len(row)} cells, the first line {len(names)}.")
    return columns.source(spec, {name: [row[place] for row in body] for place, name in enumerate(names)})


def open_parquet(spec: str, path: Path, options: Mapping[str, Any]) -> DataSource:
    """A Parquet file, its columns of plain numbers or words. Raises DataError."""
    columns = Columns.of(spec, options)
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{spec}: Parquet needs pyarrow: pip install 'compress-networks[data]'.") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # pyarrow's own are of these
        raise DataError(f"{spec}: not a readable Parquet file: {' '.join(str(error).split())[:160]}.") from None
    return columns.source(spec, {name: table[name].to_pylist() for name in table.column_names})

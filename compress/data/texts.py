"""Texts through a tokenizer on disk: windows of a running text, or lines padded to a length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.arrays import ArraySource
from compress.errors import DataError

CHUNK = 1 << 20  # characters that are tokenized at once
IGNORED = -1  # label of a position that says nothing
OPTIONS = ("tokenizer", "length", "labels")


def open_text(spec: str, path: Path, options: Mapping[str, Any]) -> ArraySource:
    """A text file as windows of tokens (N, T), each token's label the one that follows it. Raises DataError.

    Args:
        options: `tokenizer`, a folder or file; `length` T, by default 128; `labels`: `next` or `none`.
    """
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        raise DataError(f"{spec}: {unknown[0]!r} is no option; expected {', '.join(OPTIONS)}.")
    length, labelled = options.get("length", 128), options.get("labels", "next")
    if type(length) is not int or not 2 <= length <= 1 << 16:
        raise DataError(f"{spec}: `length` must be a number of tokens from 2 on, got {length!r}.")
    if labelled not in ("next", "none", None):
        raise DataError(f"{spec}: `labels` must be next or none, got {labelled!r}.")
    if "tokenizer" not in options:
        raise DataError(f"{spec}: a text needs its network's tokenizer: {spec}?tokenizer=FOLDER&length=128.")
    tokenizer = open_tokenizer(spec, str(options["tokenizer"]))
    parts = [
        np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64) for text in read_text(spec, path)
    ]
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
    count = len(tokens) // length
    if not count:
        raise DataError(f"{spec}: the text has {len(tokens)} tokens, not one window of {length}.")
    rows = tokens[: count * length].reshape(count, length)
    labels = None
    if labelled == "next":
        following = np.append(tokens[1:], IGNORED)[: count * length]
        labels = following.reshape(count, length)
    return ArraySource(spec, None, rows, labels, images=False)


def read_text(spec: str, path: Path) -> Iterator[str]:
    """The text, in pieces that end where a line does. Raises DataError."""
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(CHUNK):
                yield piece + file.readline(CHUNK)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{spec}: not a readable UTF-8 text: {error}.") from None


def open_tokenizer(spec: str, place: str) -> Any:
    """The tokenizer of a folder or a `tokenizer.json`; nothing is downloaded or run. Raises DataError."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"{spec}: a text needs tokenizers: pip install 'compress-networks[data]'.") from None
    path = Path(place)
    files = [path / name for name in ("tokenizer.json", "vocab.json", "merges.txt")] if path.is_dir() else [path]
    try:
        if files[0].is_file():
            return tokenizers.Tokenizer.from_file(str(files[0]))
        if len(files) == 3 and files[1].is_file() and files[2].is_file():
            return tokenizers.ByteLevelBPETokenizer(str(files[1]), str(files[2]))
    except Exception as error:  # the library raises its own, made in another language
        raise DataError(f"{spec}: {place!r} is no readable tokenizer: {' '.join(str(error).split())[:160]}.") from None
    raise DataError(
        f"{spec}: {place!r} holds no tokenizer.json (nor vocab.json and merges.txt); save_pretrained of a fast "
        "tokenizer writes one."
    )


def encode_lines(spec: str, lines: Sequence[str], place: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (N, T) of lines, cut and padded, and where they are (N, T): 1, or 0 of padding. Raises DataError."""
    tokenizer = open_tokenizer(spec, place)
    tokens = [encoding.ids[:length] for encoding in tokenizer.encode_batch(list(lines))]
    padding = next((number for word in PADDINGS if (number := tokenizer.token_to_id(word)) is not None), 0)
    ids = np.full((len(lines), length), padding, np.int64)
    mask = np.zeros((len(lines), length), np.int64)
    for row, line_tokens in enumerate(tokens):
        ids[row, : len(line_tokens)], mask[row, : len(line_tokens)] = line_tokens, 1
    return ids, mask


PADDINGS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")

"""Samples that are read one by one: images in class folders, and map-style torch data sets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.arrays import check_label_array, check_target_array, finite_inputs
from compress.data.importing import describe_fault
from compress.data.preprocessing import Preprocessing
from compress.data.source import DataSource
from compress.errors import CompressError, DataError

WIDE = ("I;16", "I;16L", "I;16B", "I;16N")  # PIL's modes of 16 bits
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}


class FolderSource(DataSource):
    """Image files, one class a subfolder, classes and files in alphabetical order.

    An image becomes grey when the preprocessing has one channel, and RGB otherwise.
    """

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing | None,
        files: Sequence[Path],
        labels: np.ndarray | None,
        class_names: Sequence[str] | None,
    ) -> None:
        super().__init__(name, preprocessing, labels, class_names)
        self.files = files
        mean = preprocessing.mean if preprocessing is not None else None
        self.mode = "L" if mean is not None and len(mean) == 1 else "RGB"

    @property
    def sample_count(self) -> int:
        """Number of image files."""
        return len(self.files)

    @property
    def reads_images(self) -> bool:
        """Yes."""
        return True

    def read_image(self, number: int) -> Image.Image:
        """One decoded image. Raises DataError naming the file."""
        path = self.files[number]
        return decode_image(lambda: path, repr(str(path)), self.mode)

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Preprocessed images. Raises DataError: unreadable, or of different sizes without `resize` and `crop`."""
        preprocessing = self.preprocessing or Preprocessing()
        images = [np.asarray(preprocessing.shape(self.read_image(int(number)))) for number in numbers]
        return preprocessing.normalise(stack_images(images, self.name))

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """The decoded pixels, so that equal images in different formats are equal."""
        return [self.read_image(int(number)).tobytes() for number in numbers]


def decode_image(opened: Callable[[], Any], name: str, mode: str) -> Image.Image:
    """One picture of a path or a file. Raises DataError with its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(opened()) as image:
                return in_mode(image, mode)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, MemoryError) as error:
        raise DataError(f"The image {name} cannot be read: {error}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"The image {name} is refused: {error}.") from None


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The picture in a mode of 8 bits; where it has 16, scaled to 8 (PIL alone cuts off what is above 255).

    Raises:
        ValueError: its numbers have no range that is known.
    """
    if image.mode in WIDE or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"nothing says what range its numbers have (mode {image.mode}); save it with 8 or 16 bits")
    return image.convert(mode)


def stack_images(images: Sequence[np.ndarray], name: str) -> Tensor:
    """Images (B, C, H, W) uint8 of arrays (H, W) or (H, W, C). Raises DataError where the sizes differ."""
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise DataError(f"{name}: images of sizes {shapes[0]} and {shapes[-1]}; give --resize and --crop.")
    rows = np.stack(images)
    rows = rows[..., None] if rows.ndim == 3 else rows
    return torch.from_numpy(np.ascontiguousarray(rows.transpose(0, 3, 1, 2)))


def open_folder(name: str, path: Path, preprocessing: Preprocessing | None) -> FolderSource:
    """Class subfolders with images, or one folder of images without labels. Raises DataError."""
    if not path.is_dir():
        raise DataError(f"{name}: there is no folder {str(path)!r}.")
    try:
        classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not is_hidden(Path(entry.name)))
        groups = [list_images(folder) for folder in classes]
        if not any(groups):
            files = list_images(path)
            if not files:
                raise DataError(f"{name}: no images in {str(path)!r}; class subfolders with .png or .jpg are expected.")
            return FolderSource(name, preprocessing, files, None, None)
    except OSError as error:
        raise DataError(f"{name}: {error}.") from None
    empty = [folder.name for folder, files in zip(classes, groups, strict=True) if not files]
    if empty:
        raise DataError(f"{name}: class folders without an image: {', '.join(empty[:5])}.")
    if len(classes) > 1 and PARTS.issuperset(folder.name.lower() for folder in classes):
        parts = ", ".join(folder.name for folder in classes)
        raise DataError(f"{name}: {parts} are parts of a data set and no classes; give one, such as {classes[0]}.")
    labels = np.repeat(np.arange(len(groups)), [len(files) for files in groups])
    names = [folder.name for folder in classes]
    return FolderSource(name, preprocessing, [file for files in groups for file in files], labels, names)


def list_images(folder: Path) -> list[Path]:
    """Image files below a folder, sorted, without hidden ones and what lies in hidden folders.

    Links that leave the folder are followed no further than the file.
    """
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return sorted(file for file in files if not is_hidden(file.relative_to(folder)))


def is_hidden(path: Path) -> bool:
    """Whether a name in the path is one of a notebook's copies or of macOS's notes on files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


class DatasetSource(DataSource):
    """A map-style torch data set: `len`, and items that are a sample, (sample, label) or (sample, real target).

    A sample is a PIL image or uint8 array (H, W, C), which is preprocessed, or other numbers, fed as they are.
    """

    def __init__(self, name: str, preprocessing: Preprocessing | None, dataset: Any) -> None:
        self.name, self.dataset = name, dataset
        self.count = len(dataset)
        if self.count < 1:
            raise DataError(f"{name}: the data set is empty.")
        answers = self._answers()
        real = answers is not None and answers.dtype.kind == "f"
        labels = None if answers is None or real else check_label_array(name, answers, self.count)
        targets = check_target_array(name, answers, self.count) if answers is not None and real else None
        classes = getattr(dataset, "classes", None) if labels is not None else None
        super().__init__(name, preprocessing, labels, classes, targets)

    def _answers(self) -> np.ndarray | None:
        """Whole numbers, which are labels, or real ones, which are targets. Raises DataError."""
        answers = getattr(self.dataset, "targets", None)
        if answers is None:
            first = self._item(0)
            if not (isinstance(first, (tuple, list)) and len(first) >= 2):
                return None
            answers = [self._answer(number) for number in range(self.count)]
        try:
            rows = np.stack([np.asarray(answer) for answer in answers])
        except (TypeError, ValueError):
            raise DataError(f"{self.name}: the labels or targets of the samples have different shapes.") from None
        if rows.dtype.kind == "f":
            return rows
        if rows.dtype.kind not in "iub":
            kind = f"got {rows.dtype} of shape {rows.shape[1:]} for each"
            raise DataError(
                f"{self.name}: labels must be whole numbers, as many for each sample, {kind}; give samples alone where "
                "there is no such label."
            )
        return rows

    def _item(self, number: int) -> Any:
        """What the user's data set gives. Raises DataError."""
        try:
            item = self.dataset[number]
        except CompressError:
            raise
        except Exception as error:  # whatever the user's code raises is a fault of the data
            raise DataError(f"{self.name}: sample {number} cannot be read: {describe_fault(error)}.") from error
        if isinstance(item, Mapping):
            names = ", ".join(f"`{key}`" for key in list(item)[:8])
            raise DataError(
                f"{self.name}: an item is a {type(item).__name__} of {names}; expected a sample, (sample, label) or "
                "(sample, real target)."
            )
        return item

    def _answer(self, number: int) -> Any:
        """The label or target of one item. Raises DataError."""
        item = self._item(number)
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise DataError(f"{self.name}: sample {number} comes without a label, the first one has one.")
        return item[1]

    @property
    def sample_count(self) -> int:
        """`len` of the data set."""
        return self.count

    @property
    def reads_images(self) -> bool:
        """Whether the first sample is an image."""
        return self.read_sample(0).dtype == np.uint8

    def read_sample(self, number: int) -> np.ndarray:
        """One sample as an array: uint8 (H, W, C) for an image, float otherwise."""
        item = self._item(number)
        sample = item[0] if isinstance(item, (tuple, list)) and len(item) else item
        if isinstance(sample, Image.Image) and sample.mode not in ("L", "RGB"):
            try:
                sample = in_mode(sample, "RGB")
            except ValueError as error:
                raise DataError(f"{self.name}: the image of sample {number} cannot be read: {error}.") from None
        try:
            array = np.asarray(sample)
        except (TypeError, ValueError, RuntimeError):
            array = np.asarray(None)
        if array.dtype.kind not in "fiub" or not array.ndim or not array.size:
            raise DataError(
                f"{self.name}: sample {number} is a {type(sample).__name__}; expected an image or one array of numbers."
            )
        return array

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Preprocessed images, or floats as they are. Raises DataError where shapes differ."""
        samples = [self.read_sample(int(number)) for number in numbers]
        preprocessing = self.preprocessing or Preprocessing()
        if samples and samples[0].dtype == np.uint8:
            shaped = [preprocessing.shape(stack_images([sample], self.name))[0] for sample in samples]
            if len({image.shape for image in shaped}) > 1:
                raise DataError(f"{self.name}: images have different sizes; give --resize and --crop.")
            return preprocessing.normalise(torch.stack(shaped))
        try:
            rows = np.stack(samples)
        except ValueError:
            raise DataError(f"{self.name}: samples have different shapes.") from None
        if rows.dtype.kind in "iu":
            return torch.from_numpy(rows.astype(np.int64))
        return finite_inputs(self.name, rows, numbers)

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """The samples' bytes."""
        return [self.read_sample(int(number)).tobytes() for number in numbers]

"""Specs, formats and faults of data sources."""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from compress.data import DataSource, Preprocessing, open_data
from compress.errors import DataError


def make_images(count: int = 10, side: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


LABELS = np.arange(10) % 3


def read_all(source: DataSource, batch_size: int = 4) -> tuple[torch.Tensor, torch.Tensor | None]:
    batches = list(source.batches(batch_size))
    labels = None if batches[0].labels is None else torch.cat([b.labels for b in batches if b.labels is not None])
    return torch.cat([batch.inputs for batch in batches]), labels


def write_folder(root: Path, images: np.ndarray, labels: np.ndarray, ending: str = "png") -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(pixels).save(folder / f"{number:03d}.{ending}")
    return root


def write(form: str, folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / f"data.{'safetensors' if form == 'safetensors' else 'npz'}"
    if form == "safetensors":
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    else:
        (np.savez_compressed if form == "compressed" else np.savez)(path, **arrays)
    return path


FORMS = ["npz", "compressed", "safetensors"]


@pytest.mark.parametrize("form", FORMS)
def test_images_come_scaled_channels_first_with_their_labels(tmp_path: Path, form: str) -> None:
    images = make_images()
    source = open_data(str(write(form, tmp_path, images=images, labels=LABELS)))
    inputs, labels = read_all(source)
    assert inputs.dtype == torch.float32
    assert np.allclose(inputs.numpy(), images.transpose(0, 3, 1, 2) / 255, atol=1e-7)
    assert labels is not None
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(10,), (10, 2)])
def test_real_targets_come_in_rows_and_are_no_labels(tmp_path: Path, form: str, shape: tuple[int, ...]) -> None:
    targets = np.random.default_rng(0).normal(size=shape)
    source = open_data(str(write(form, tmp_path, inputs=np.ones((10, 3)), targets=targets)))
    (batch,) = source.batches(4, [7, 2])
    assert not source.has_labels
    assert batch.targets is not None
    assert np.allclose(batch.targets.numpy(), targets[[7, 2]].reshape(2, -1))


def test_labels_come_before_targets(tmp_path: Path) -> None:
    source = open_data(str(write("npz", tmp_path, images=make_images(), labels=LABELS, targets=np.ones(len(LABELS)))))
    assert source.has_labels
    assert source.targets is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_inputs_come_as_they_are_whatever_the_preprocessing(tmp_path: Path, form: str, dtype: type) -> None:
    inputs = np.random.default_rng(0).normal(size=(10, 7)).astype(dtype)
    source = open_data(str(write(form, tmp_path, inputs=inputs)), Preprocessing(mean=(0.5,), std=(0.5,)))
    found, labels = read_all(source)
    assert labels is None
    assert not source.has_labels
    assert np.array_equal(found.numpy(), inputs.astype(np.float32))


def test_an_uncompressed_npz_is_mapped_not_read(tmp_path: Path) -> None:
    source: Any = open_data(str(write("npz", tmp_path, images=make_images(), labels=LABELS)))
    base = source.rows
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_data_larger_than_memory_is_read_a_batch_at_a_time(tmp_path: Path, form: str) -> None:
    count, side = 1 << 20, 512  # 768 GiB of images in a sparse file
    path = tmp_path / f"huge.{form}"
    size = count * side * side * 3
    with path.open("wb") as file:
        if form == "safetensors":
            header = json.dumps({"images": {"dtype": "U8", "shape": [count, side, side, 3], "data_offsets": [0, size]}})
            file.write(struct.pack("<Q", len(header)) + header.encode())
        try:
            file.truncate(file.tell() + size)
        except OSError:
            pytest.skip("the file system takes no file of 768 GiB")
    if form == "npz":
        sparse_npz(path, (count, side, side, 3))
    source = open_data(str(path))
    assert source.sample_count == count
    batch = next(iter(source.batches(2, torch.tensor([5, count - 1]))))
    assert batch.inputs.shape == (2, 3, side, side)
    assert not batch.inputs.any()


def sparse_npz(path: Path, shape: tuple[int, ...]) -> None:
    """An `.npz` with one stored member of zeros, which takes no disk: ZIP64, written by hand."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    content, name = header.getvalue(), b"images.npy"
    size = len(content) + int(np.prod(shape, dtype=np.int64))
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(extra))
    start = len(local) + len(name) + len(extra)
    central = struct.pack(
        "<IHHHHHHIIIHHHHHII", 0x02014B50, 45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1,
        len(name), len(extra), 0, 0, 0, 0, 0,
    ) + name + extra  # fmt: skip
    at = start + size
    tail = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, 1, 1, len(central), at)
    tail += struct.pack("<IIQI", 0x07064B50, 0, at + len(central), 1)
    tail += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(central), 2**32 - 1, 0)
    with path.open("r+b") as file:
        file.write(local + name + extra + content)
        file.seek(at)
        file.write(central + tail)


def test_folders_give_classes_in_alphabetical_order(tmp_path: Path) -> None:
    images = make_images()
    source = open_data(str(write_folder(tmp_path / "train", images, LABELS)))
    inputs, labels = read_all(source)
    order = np.argsort(LABELS, kind="stable")
    assert source.class_names == ("class0", "class1", "class2")
    assert labels is not None
    assert labels.tolist() == LABELS[order].tolist()
    assert np.allclose(inputs.numpy(), images[order].transpose(0, 3, 1, 2) / 255, atol=1e-7)


def test_a_folder_of_images_without_classes_has_no_labels(tmp_path: Path) -> None:
    for number, image in enumerate(make_images(3)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    source = open_data(f"folder:{tmp_path}")
    assert source.sample_count == 3
    assert not source.has_labels


def test_a_one_channel_mean_reads_images_as_grey(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "grey", make_images(4, channels=1), LABELS[:4])
    source = open_data(str(folder), Preprocessing(mean=(0.5,), std=(0.25,)))
    assert read_all(source)[0].shape == (4, 1, 6, 6)


@pytest.mark.parametrize("rows", [np.arange(12), np.linspace(-1, 1, 12, dtype=np.float32)])
def test_inputs_may_be_a_single_number_a_sample(tmp_path: Path, rows: np.ndarray) -> None:
    np.savez(tmp_path / "mine.npz", inputs=rows)
    np.save(tmp_path / "mine.npy", rows)
    for path in ("mine.npz", "mine.npy"):
        (batch,) = open_data(str(tmp_path / path), None).batches(12)
        assert torch.equal(batch.inputs, torch.from_numpy(rows))


def test_folder_and_array_give_the_same_inputs_after_resize_and_crop(tmp_path: Path) -> None:
    images, labels = make_images(4, side=20), np.zeros(4, np.int64)
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, resize=12, crop=8)
    folder = open_data(str(write_folder(tmp_path / "train", images, labels)), preprocessing)
    arrays = open_data(str(write("npz", tmp_path, images=images)), preprocessing)
    first, second = read_all(folder)[0], read_all(arrays)[0]
    assert first.shape == (4, 3, 8, 8)
    assert (first - second).abs().max() <= 1.01 / 255 / 0.25  # the two resizers may round a level apart


def test_images_of_different_sizes_ask_for_resize_and_crop(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", make_images(2), np.zeros(2, int))
    Image.fromarray(make_images(1, side=9)[0]).save(folder / "class0" / "other.png")
    with pytest.raises(DataError, match="give --resize and --crop"):
        read_all(open_data(str(folder)))
    assert read_all(open_data(str(folder), Preprocessing(resize=6, crop=6)))[0].shape == (3, 3, 6, 6)


def test_the_packaged_digits_have_two_parts() -> None:
    assert open_data("digits").fingerprint == open_data("digits?train=true").fingerprint
    assert open_data("digits?train=false").sample_count == 500


MODULE = """
import numpy as np, torch
ROWS = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
def mapping(n=3): return {"images": ROWS[:n], "labels": np.arange(3)[:n]}
def pair(): return torch.ones(3, 5), [0, 1, 1]
class Items(torch.utils.data.Dataset):
    def __len__(self): return 3
    def __getitem__(self, number): return torch.full((5,), float(number)), number
def dataset(): return Items()
def unlabelled(): return torch.utils.data.Subset([torch.ones(5)] * 4, [0, 1])
def wrong(): return 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_data_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_data_module", raising=False)
    return "own_data_module"


@pytest.mark.parametrize(
    ("call", "shape", "labels"),
    [
        ("mapping", (3, 1, 2, 2), [0, 1, 2]),
        ("mapping?n=2", (2, 1, 2, 2), [0, 1]),
        ("pair", (3, 5), [0, 1, 1]),
        ("dataset", (3, 5), [0, 1, 2]),
        ("unlabelled", (2, 5), None),
    ],
)
def test_a_users_function_gives_data(own_module: str, call: str, shape: tuple[int, ...], labels: Any) -> None:
    inputs, found = read_all(open_data(f"{own_module}:{call}"))
    assert inputs.shape == shape
    assert (None if found is None else found.tolist()) == labels


def test_a_torchvision_data_set_is_read_from_its_root(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "root", make_images(4), LABELS[:4])
    source = open_data(f"torchvision:ImageFolder?root={folder}")
    inputs, labels = read_all(source)
    assert inputs.shape == (4, 3, 6, 6)
    assert labels is not None
    assert labels.tolist() == [0, 0, 1, 2]
    assert source.class_names == ("class0", "class1", "class2")


def test_an_absent_torchvision_data_set_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        open_data(f"torchvision:CIFAR10?root={tmp_path}&train=false")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "npz:none.npz",
        "folder:none",
        "none.npz",
        "torchvision:NoSuch",
        "no_such_module:f",
        "digits?part=2",
        "ftp://x",
        "none",
    ],
)
def test_specs_that_name_nothing_are_refused_in_one_line(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data(spec)
    assert "\n" not in str(caught.value)


def test_a_function_that_returns_no_data_is_refused(own_module: str) -> None:
    with pytest.raises(DataError, match="got int"):
        open_data(f"{own_module}:wrong")


BAD_ARRAYS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "nothing": ({"pictures": make_images(2)}, "expected `images`"),
    "both": ({"images": make_images(2), "inputs": np.ones((2, 3))}, "expected `images`"),
    "float images": ({"images": np.ones((2, 4, 4, 3))}, "must be uint8"),
    "channels first": ({"images": np.ones((2, 3, 4, 8), np.uint8)}, "1, 3 or 4 channels"),
    "no samples": ({"images": np.ones((0, 4, 4, 3), np.uint8)}, "no samples"),
    "labels short": ({"images": make_images(2), "labels": np.zeros(1, int)}, r"shape \(N,\) = \(2,\)"),
    "labels float": ({"images": make_images(2), "labels": np.array([0, 0.5])}, "whole numbers"),
    "labels negative": ({"images": make_images(2), "labels": np.array([0, -1])}, "sample 1 has label -1"),
    "targets short": ({"inputs": np.ones((3, 2)), "targets": np.ones(2)}, "N = 3"),
    "targets not finite": ({"inputs": np.ones((3, 2)), "targets": np.array([0, np.nan, 1])}, "sample 1 is NaN"),
    "scalar inputs": ({"inputs": np.float64(4)}, r"shape \(N, …\)"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_of_the_wrong_kind_are_refused(tmp_path: Path, name: str) -> None:
    arrays, words = BAD_ARRAYS[name]
    with pytest.raises(DataError, match=words):
        open_data(str(write("npz", tmp_path, **arrays)))


def test_labels_that_a_network_cannot_predict_are_named(tmp_path: Path) -> None:
    source = open_data(str(write("npz", tmp_path, images=make_images(), labels=LABELS)))
    source.check_labels(3)
    with pytest.raises(DataError, match="3 of 10 labels are out of range for 2 classes; sample 2 has label 2"):
        source.check_labels(2)


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    inputs = np.ones((10, 3))
    inputs[7, 1] = np.nan
    source = open_data(str(write("npz", tmp_path, inputs=inputs)))
    with pytest.raises(DataError, match="sample 7 holds NaN or Inf"):
        read_all(source)


def test_a_mean_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    source = open_data(str(write("npz", tmp_path, images=make_images())), Preprocessing(mean=(0.5, 0.5), std=(1, 1)))
    with pytest.raises(DataError, match="--mean has 2 values, the images have 3 channels"):
        read_all(source)


@pytest.mark.parametrize("layout", ["no entry", "no image", "one class empty"])
def test_folders_without_images_are_refused(tmp_path: Path, layout: str) -> None:
    if layout != "no entry":
        (tmp_path / "class0").mkdir()
        (tmp_path / "class0" / "notes.txt").write_text("x")
    if layout == "one class empty":
        write_folder(tmp_path, make_images(1), np.array([1]))
    with pytest.raises(DataError, match=r"no images|without an image: class0"):
        open_data(f"folder:{tmp_path}")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_damaged_image_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_folder(tmp_path / "train", make_images(2), np.zeros(2, int))
    (folder / "class0" / "zz.png").write_bytes(content)
    with pytest.raises(DataError, match=r"zz\.png"):
        read_all(open_data(str(folder)))


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", make_images(1, side=64), np.zeros(1, int), "jpg")
    file = folder / "class0" / "000.jpg"
    file.write_bytes(file.read_bytes()[:800])
    with pytest.raises(DataError, match=r"000\.jpg"):
        read_all(open_data(str(folder)))


def test_an_image_that_declares_a_huge_size_is_refused(tmp_path: Path) -> None:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"bomb\.png"):
        read_all(open_data(str(tmp_path)))


class Execute:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def test_pickled_arrays_are_never_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.array([Execute(tmp_path / "mark")], dtype=object))
    with pytest.raises(DataError, match="could execute code"):
        open_data(str(tmp_path / "data.npz"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_npz_that_declares_more_than_it_holds_is_refused(tmp_path: Path, compression: int) -> None:
    header = io.BytesIO()
    shape = (1 << 30, 32, 32, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "data.npz", "w", compression) as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    with pytest.raises(DataError, match="truncated"):
        open_data(str(tmp_path / "data.npz"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, form: str, fraction: float) -> None:
    path = write(form, tmp_path, images=make_images(100), labels=np.zeros(100, np.int64))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(DataError):
        read_all(open_data(str(path)))


def test_safetensors_with_false_offsets_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"images": {"dtype": "U8", "shape": [1 << 40, 2, 2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "data.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(DataError, match="safetensors"):
        open_data(str(tmp_path / "data.safetensors"))


def read_or_refuse(path: Path) -> str:
    """The message with which a file is refused, if it is; anything else is a fault of the reader."""
    try:
        read_all(open_data(str(path)))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", FORMS)
def test_mutated_files_end_in_one_line_or_are_read(tmp_path: Path, form: str) -> None:
    import random

    path = write(form, tmp_path, images=make_images(3), labels=np.arange(3))
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        mutated = bytearray(content)
        for _ in range(draw.choice([1, 2, 8])):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        path.write_bytes(mutated)
        assert "\n" not in read_or_refuse(path)


def test_an_archive_whose_names_are_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("é.npy", b"")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(DataError, match="not a readable"):
        open_data(str(path), None)


@pytest.mark.parametrize(
    ("spec", "meant"), [("foldr:train", "folder"), ("digts", "digits"), ("torchvison:CIFAR10", "torchvision")]
)
def test_a_misspelt_kind_of_data_is_answered_with_the_nearest_right_one(spec: str, meant: str) -> None:
    with pytest.raises(DataError, match=rf"did you mean '{meant}'\?"):
        open_data(spec)

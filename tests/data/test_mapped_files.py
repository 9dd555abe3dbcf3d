"""Arrays of mapped files: what was read of them does not stay with the process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.data.arrays import ArraySource, let_go
from compress.data.opening import open_data

SAMPLES, MEGABYTE = 48, 1 << 20


def resident_megabytes() -> float:
    """Of this process, pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1024


@pytest.fixture
def mapped(tmp_path: Path) -> ArraySource:
    """Images of a megabyte each in an uncompressed file."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (SAMPLES, 512, 683, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    source = open_data(str(tmp_path / "images.npz"), None)
    assert isinstance(source, ArraySource)
    return source


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel says what is resident on Linux")
@pytest.mark.parametrize("what", ["batches", "hashes"])
def test_reading_all_samples_leaves_none_of_them_in_memory(mapped: ArraySource, what: str) -> None:
    before = resident_megabytes()
    if what == "batches":
        for batch in mapped.batches(8, torch.arange(SAMPLES)):
            assert batch.tensors[0].shape[0] == 8
    else:
        assert mapped.fingerprint
    assert resident_megabytes() - before < SAMPLES / 4


def test_large_samples_are_hashed_a_few_at_a_time(mapped: ArraySource) -> None:
    assert mapped.hashed_at_once == 15
    small = ArraySource("small", None, np.zeros((9, 4, 4, 3), np.uint8), None, images=True)
    assert small.hashed_at_once == 512


def test_samples_read_again_are_the_same(mapped: ArraySource) -> None:
    first, second = (next(iter(mapped.batches(4, torch.arange(4)))).tensors[0] for _ in range(2))
    assert torch.equal(first, second)


def test_arrays_in_memory_are_left_alone() -> None:
    rows = np.arange(12.0).reshape(3, 4)
    let_go(rows[1:])
    assert rows.sum() == 66

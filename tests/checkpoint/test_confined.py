"""What a network may not do while it is built, and what is not its doing."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest

from compress.checkpoint.building.confined import confined
from compress.errors import UnsupportedError


class Folder:
    """Deletes a folder when it is collected; part of a circle, which reference counts do not end."""

    def __init__(self, folder: Path) -> None:
        self.itself = self
        weakref.finalize(self, shutil.rmtree, folder)


def test_building_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    refused = pytest.raises(UnsupportedError, match=r"a network is refused: building it tried shutil\.rmtree")
    with refused, confined("a network"):
        shutil.rmtree(tmp_path / "kept")
    assert (tmp_path / "kept").exists()
    assert gc.isenabled()


def test_what_earlier_work_left_behind_is_no_doing_of_what_is_built(tmp_path: Path) -> None:
    (tmp_path / "left").mkdir()
    thresholds = gc.get_threshold()
    try:
        gc.set_threshold(10, 1, 1)
        with confined("a network"):
            Folder(tmp_path / "left")
            held: list[list[int]] = [[] for _ in range(1000)]  # as many objects as start a collection
            assert (tmp_path / "left").exists()
    finally:
        gc.set_threshold(*thresholds)
    assert gc.isenabled()
    assert len(held) == 1000
    gc.collect()
    assert not (tmp_path / "left").exists()

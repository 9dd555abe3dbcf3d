"""Freed memory stays with the process, unless whoever started it wants it otherwise."""

from __future__ import annotations

import pytest
import torch

from compress.allocator import give_back_freed_memory, keep_freed_memory


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_setting_of_the_user_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_freed_memory()


def test_giving_free_memory_back_leaves_tensors_alone() -> None:
    kept = torch.arange(1_000)
    torch.zeros(1_000_000)
    give_back_freed_memory()
    assert int(kept.sum()) == 499_500

"""Damaged files of every kind through the command line: one line and a known exit code (10 400 of them: benchmarks)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.safety.fuzzing import Corpus, damaged, make_corpus, meet

KINDS = ("zip", "legacy", "safetensors", "stored.npz", "packed.npz", "arrays", "recipe", "zoo")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_ends_in_one_line_and_a_known_exit_code(
    corpus: Corpus, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(f"test {kind}")
    for _ in range(12):
        code, fault = meet(corpus, kind, damaged(corpus.files[kind], kind, draw))
        assert fault is None, f"exit code {code}: {fault}"

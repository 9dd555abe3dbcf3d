"""Threads that wait sleep soon in commands, unless whoever started them wants it otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compress import waiting

SHOW = """
import os, sys
import compress.cli
assert "torch" not in sys.modules
compress.cli.main = lambda **_: print(os.environ.get("GOMP_SPINCOUNT")) or 0
compress.cli.entry()
"""


@pytest.mark.parametrize(
    ("told", "shown"), [({}, waiting.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_a_command_has_its_threads_sleep_before_torch_is_loaded(
    told: dict[str, str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in waiting.TOLD:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    ended = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == shown


def test_a_library_whose_caller_has_loaded_torch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name in waiting.TOLD:
        monkeypatch.delenv(name, raising=False)
    assert torch.get_num_threads() > 0
    assert not waiting.wait_asleep()

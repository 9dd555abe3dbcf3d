"""The journal keeps what was appended, whatever happens to the process or the disk."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from compress.errors import OutputError
from compress.zoo.journal import Journal, locked, read_journal


def names(path: Path) -> list[str]:
    return [entry["name"] for entry in read_journal(path)]


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for name in "abc":
            journal.append({"name": name})
    assert names(tmp_path / "j") == ["a", "b", "c"]


@pytest.mark.parametrize("torn", [b'{"na', b'{"name": "d"}', b"\xff\x00", b'{"name": "' + b"x" * 200_000])
def test_a_torn_last_line_is_ignored_and_replaced(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"name": "a"}\n' + torn)
    assert names(path) == ["a"]
    with Journal(path) as journal:
        journal.append({"name": "b"})
    assert names(path) == ["a", "b"]
    assert path.read_bytes() == b'{"name": "a"}\n{"name": "b"}\n'


@pytest.mark.parametrize("line", [b"nonsense", b"3", b"[]", b'{"name": 3}', b"[" * 100_000, b"\xff\xfe", b""])
def test_a_damaged_line_costs_only_itself(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "j").write_bytes(b'{"name": "a"}\n' + line + b'\n{"name": "b"}\n')
    assert names(tmp_path / "j") == ["a", "b"]


def test_an_entry_that_does_not_fit_the_disk_is_taken_back(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path / "j") as journal:
        journal.append({"name": "a"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        try:
            with pytest.raises(OutputError, match="cannot be written"):
                journal.append({"name": "b" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        journal.append({"name": "c"})
    assert (tmp_path / "j").read_bytes() == b'{"name": "a"}\n{"name": "c"}\n'


def test_a_journal_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    with pytest.raises(OutputError, match="cannot be written"), Journal(tmp_path / "j"):
        pass
    with pytest.raises(OutputError, match="cannot be read"):
        read_journal(tmp_path / "j")


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path, ""):
        with pytest.raises(OutputError, match="Another run is working"), locked(tmp_path, ""):
            pass
        with pytest.raises(OutputError, match="Another run is working"), locked(tmp_path, "-1-of-2"):
            pass
    with locked(tmp_path, ""):
        pass


def test_shards_work_side_by_side_but_not_twice(tmp_path: Path) -> None:
    with locked(tmp_path, "-1-of-2"), locked(tmp_path, "-2-of-2"):
        with pytest.raises(OutputError), locked(tmp_path, "-1-of-2"):
            pass
        with pytest.raises(OutputError), locked(tmp_path, ""):
            pass


def test_the_end_of_a_process_lets_its_folder_go(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from compress.zoo.journal import locked\n"
        "with locked(Path(sys.argv[1]), ''): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with locked(tmp_path, ""):
        pass

"""new_folder: whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.atomic import check_target, new_file, new_folder, reserved
from compress.errors import OutputError


def test_the_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as draft:
        (draft / "config.json").write_text("{}")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def write_and_fail(target: Path, fault: BaseException) -> None:
    """Start writing the folder, then meet a fault."""
    with new_folder(target, force=True) as draft:
        (draft / "config.json").write_text("new")
        raise fault


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_fault_leaves_nothing(tmp_path: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault):
        write_and_fail(tmp_path / "out", fault())
    assert list(tmp_path.iterdir()) == []


def test_a_fault_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(ValueError, match="stop"):
        write_and_fail(target, ValueError("stop"))
    assert (target / "config.json").read_text() == "old"
    with new_folder(target, force=True) as draft:
        (draft / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    check_target(target)
    (target / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="--force"):
        check_target(target)
    check_target(target, force=True)


def test_a_folder_of_somebody_else_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("…")
    with pytest.raises(OutputError, match="not written by compress"):
        check_target(tmp_path / "out", force=True)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_target(tmp_path / "out", force=True)
    with pytest.raises(OutputError, match="not a writable folder"):
        check_target(tmp_path / "out" / "below")


def test_a_symbolic_link_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(OutputError, match="is a symbolic link"):
        check_target(tmp_path / "out", force=True)


@pytest.mark.parametrize("target", ["out", "deep/below/out"])
def test_a_second_run_into_a_held_place_ends_before_it_begins(tmp_path: Path, target: str) -> None:
    with reserved(tmp_path / target):
        for force in (False, True):
            with pytest.raises(OutputError, match="Another run is working"), reserved(tmp_path / target, force=force):
                raise AssertionError("it began")
        with reserved(tmp_path / "other"):
            pass
    with reserved(tmp_path / target):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom compress.atomic import reserved\n"
        "with reserved(sys.argv[1]):\n    os.kill(os.getpid(), 9)\n"
    )
    code = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False).returncode
    assert code == -signal.SIGKILL
    with reserved(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_folder_can_be_read_by_those_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with new_folder(tmp_path / "out"):
            pass
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(old)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with new_file(target) as draft:
        draft.write_text("first")
    with pytest.raises(UnicodeEncodeError), new_file(target) as draft:
        draft.write_text("half of the sec\ud800", encoding="utf-8")
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]
    with pytest.raises(OutputError, match="Cannot write"), new_file(tmp_path / "new" / "file.txt" / "below") as draft:
        draft.write_text("x")

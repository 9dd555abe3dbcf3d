"""Places that cannot be written and folders that another run holds are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.cli import main
from compress.zoo.journal import locked
from tests.zoo.models import copies, small_plan


@pytest.mark.parametrize("place", ["file/zoo", "/proc/zoo", "file"])
def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = copies(tmp_path, 1)
    small_plan(tmp_path, [path])
    (tmp_path / "file").write_text("")
    assert main(["zoo", str(tmp_path / "zoo.yaml"), "--output", str(tmp_path / place)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_second_run_into_a_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = copies(tmp_path, 1)
    plan = small_plan(tmp_path, [path])
    plan.output.mkdir()
    (plan.output / "models").mkdir()
    with locked(plan.output, ""):
        assert main(["zoo", str(tmp_path / "zoo.yaml"), "--resume"]) == 1
    assert "Another run is working" in capsys.readouterr().err

"""README: short; its command and its Python do what it says, its table is what is printed, its picture is fresh."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from compress.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_readme_is_short() -> None:
    assert len(README.split()) <= 700


def test_every_link_of_readme_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_the_pictures_are_what_their_script_draws() -> None:
    pictures = runpy.run_path(str(ROOT / "docs/pictures/make.py"))["PICTURES"]
    for name, content in pictures.items():
        assert (ROOT / "docs/pictures" / name).read_text(encoding="utf-8") == content, "python docs/pictures/make.py"


def test_the_command_prints_the_table_and_the_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compress").symlink_to(ROOT / "compress")
    monkeypatch.chdir(tmp_path)
    (command,) = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ compress ")]
    assert main(shlex.split(command)[2:]) == 0
    printed = re.findall(r"^ +(\S+) +(\d+ → \d+)", capsys.readouterr().out, re.M)
    (table,) = blocks("text")
    assert re.findall(r"^ +(\S+) +(\d+ → \d+)", table, re.M) == printed
    assert len(printed) == 4
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    shape, parameters = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([1, 10])"
    assert int(parameters.split()[0]) < 16_522  # of the network that was given

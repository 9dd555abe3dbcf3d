"""README: the commands of its sections on CI and deployment run as they are written, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from compress.cli import main
from compress.export.pt2_file import keeps_weights_raw

ROOT = Path(__file__).parents[1]
SECTIONS = ("In CI", "Deployment")


def section(name: str) -> str:
    """The text below a heading of README.md."""
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found, name
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.skipif(
    not keeps_weights_raw(), reason="this torch pickles the weights of a .pt2, so one command is refused"
)
def test_the_commands_of_ci_and_deployment_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compress").symlink_to(ROOT / "compress")
    monkeypatch.chdir(tmp_path)
    commands = [line for name in SECTIONS for block in blocks(section(name), "console") for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        prompt, program, *words = shlex.split(command)
        assert (prompt, program) == ("$", "compress")
        assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
    capsys.readouterr()
    (code,) = blocks(section("Deployment"), "python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("torch.Size([5, 10])") == 4
    for name in ("gate.xml", "compare.html", "digits/report.html", "digits/SHA256SUMS", "digits/hf/README.md"):
        assert (tmp_path / "build" / name).stat().st_size > 0

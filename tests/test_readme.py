"""README: the commands of its sections on CI, deployment and training run as they are written, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from compress.artifact.exports.pt2_file import keeps_weights_raw
from compress.cli import main
from compress.recipe import read_recipe

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


def test_the_commands_of_training_run_as_written_on_shorter_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*-train.yaml"):
        recipe = read_recipe(path)
        recipe["training"] |= {"epochs": 2, "batch_size": 128, "target_tolerance": 0.4}
        (tmp_path / "recipes" / path.name).write_text(yaml.safe_dump(recipe))
    inputs = np.random.default_rng(0).normal(size=(60, 6))
    np.savez(tmp_path / "mg.npz", inputs=inputs, targets=inputs[:, 0])
    monkeypatch.chdir(tmp_path)
    (text,) = blocks(section("Training by the theory"), "console")
    commands = text.splitlines()
    assert len(commands) == 6
    for command in commands:
        prompt, program, *words = shlex.split(command.partition("#")[0])
        assert (prompt, program) == ("$", "compress")
        wanted = (0, 4) if "--merge-aligned" in words else (0,)  # 4: no two units are aligned
        assert main(words) in wanted, f"{command}\n{capsys.readouterr().err}"
    for name in ("net", "digits-train-trained", "mg", "small", "tuned"):
        assert (tmp_path / name / "model.safetensors").stat().st_size > 0

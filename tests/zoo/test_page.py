"""The page on zoos does what it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from compress.cli import main
from compress.demo import CHECKPOINT

PAGE = Path(__file__).parents[2] / "docs/zoo.md"
FEW = "calibration_samples: 100, selection: magnitude"  # the page's models, on fewer samples


def test_the_commands_of_the_page_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (zoo_file,) = re.findall(r"```yaml.*?\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    start = "defaults: {"
    assert zoo_file.count(start) == 1
    Path("night.yaml").write_text(zoo_file.replace(start, f"{start}{FEW}, "))
    Path("shared.yaml").write_text(f"{{data: digits, keep: 0.5, {FEW}}}")
    Path("nets").mkdir()
    for name in ("first", "second"):
        shutil.copy(CHECKPOINT, f"nets/{name}.safetensors")
    lines = [line.partition("$ compress ")[2] for line in commands.splitlines()]
    for line in lines:
        assert main(shlex.split(line, comments=True)) == 0, line
    counts = [json.loads(Path(name).read_text())["counts"]["done"] for name in (
        "night/summary.json", "other/summary.json", "parts/summary-1-of-2.json"
    )]  # fmt: skip
    assert counts == [3, 2, 2]
    assert Path("night/models/narrow/model.safetensors").is_file()
    assert "first" in Path("night/index.html").read_text()

"""The documentation does what it says: every command and every piece of Python on every page is run, in its order."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from compress.artifact.exports.pt2_file import keeps_weights_raw
from compress.cli import main
from compress.cli.catalogue import COMMANDS
from compress.cli.reference import reference_page
from compress.data import open_data
from compress.demo import CHECKPOINT
from compress.graph.rules import RULES
from compress.recipe import Recipe, make_recipe, read_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
BLOCK = re.compile(r'^```(console|python|yaml)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
NOT_RUN = ("pip", "python3", "torchrun", "mkdocs")  # what sets a machine up
FEW = {"calibration_samples": 120, "selection": "magnitude", "refine": 0}  # the pages' commands, on fewer samples


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, title and content of a page's blocks that can be run."""
    return [(found[1], found[2] or "", found[3]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the pages speak of: networks, data, recipes (with shorter trainings)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    shutil.copy(CHECKPOINT, "net.safetensors")
    for name, spec in (("train", "digits"), ("test", "digits?train=false")):
        source = open_data(spec, None)
        batch = next(iter(source.batches(160)))
        images = np.rint(batch.inputs.numpy() * (255 if batch.inputs.max() <= 1 else 1)).astype(np.uint8)
        np.savez(f"{name}.npz", images=images.transpose(0, 2, 3, 1), labels=np.asarray(batch.labels))
    inputs = np.random.default_rng(0).normal(size=(60, 6))
    np.savez("mg.npz", inputs=inputs, targets=inputs[:, 0])
    Path("recipes").mkdir()
    for path in (ROOT / "recipes").glob("*-train.yaml"):
        recipe = read_recipe(path)
        recipe["training"] |= {"epochs": 2, "batch_size": 128, "target_tolerance": 0.4}
        Path("recipes", path.name).write_text(yaml.safe_dump(recipe))

    def quicker(options: Mapping[str, Any], *rest: Any, **more: Any) -> Recipe:
        steps = {"recover": 5} if {"macs", "params"} & set(options) else {}  # a budget's own recovery, shorter
        return make_recipe({**FEW, **steps, **options}, *rest, **more)

    monkeypatch.setattr("compress.cli.takes.make_recipe", quicker)
    before, rules = set(sys.modules), dict(RULES)
    yield tmp_path
    RULES.clear()  # a page adds one
    RULES.update(rules)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page) and page.stem != "zoo"],  # tests/zoo runs that one and looks at its folders
    ids=lambda page: page.stem,
)
def test_what_a_page_shows_runs(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "pt2" in page.read_text(encoding="utf-8") and not keeps_weights_raw():
        pytest.skip("this torch pickles the weights of a .pt2, so one command is refused")
    names: dict[str, Any] = {}
    for language, title, content in blocks(page):
        if title:
            (place / title).write_text(content, encoding="utf-8")
        elif language == "python":
            exec(compile(content, page.name, "exec"), names)
        elif language == "console":
            for line in content.splitlines():
                run_line(line, capsys)


def run_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run one line of a console, or see that it is one that only sets a machine up."""
    prompt, program, *words = shlex.split(line, comments=True)
    assert prompt == "$", line
    if program != "compress":
        assert program in NOT_RUN, line
        return
    wanted = (0, 4) if "--merge-aligned" in words else (0,)  # 4: no two units are aligned
    assert main(words) in wanted, f"{line}\n{capsys.readouterr().err}"


def test_the_page_of_options_is_up_to_date() -> None:
    written = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert written == reference_page(), "python -m compress.cli.reference docs/reference.md writes it anew"


def test_every_command_is_shown_by_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.stem != "reference")
    shown = set(re.findall(r"^\$ compress (\w+)", text, re.MULTILINE)) & set(COMMANDS)
    assert set(COMMANDS) - shown <= {"run"}
    assert "$ compress net.safetensors" in text


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert set(listed) == {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_gallery_has_the_report_of_each_of_its_commands_and_none_names_a_place_of_a_machine() -> None:
    page = (ROOT / "docs/gallery/index.md").read_text(encoding="utf-8")
    for name in runpy.run_path(str(ROOT / "docs/gallery/make.py"))["COMMANDS"]:
        assert f"({name}.html)" in page
        report = (ROOT / "docs/gallery" / f"{name}.html").read_text(encoding="utf-8")
        assert len(report) < 400_000
        assert not re.search(r"/(tmp|home|root|work|Users)/", report)


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra `docs` is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "site/reference/index.html").is_file()

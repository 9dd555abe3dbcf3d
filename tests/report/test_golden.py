"""One run, as the console, Markdown, JSON and HTML show it: golden files, rewritten by `pytest --update-golden`.

`run.json` is the report of a real run without recipe, times and digests. The other files are made from it, and are
the same on every machine; a run today must have the same parts, and figures that differ by rounding alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compress
from compress.artifact.folder import write_json
from compress.cli.showing import display
from compress.report.html import render_report
from compress.report.markdown import markdown_report
from compress.report.model import RunReport

GOLDEN = Path(__file__).parent / "golden"
NETWORK = Path(__file__).parent / "release_0_1_0" / "training"
CHANGING = {
    "recipe",
    "seconds",
    "versions",
    "hashes",
    "fingerprint",
    "sha256",
    "before_ms",
    "after_ms",
    "threads",
    "status",
}


def write_samples(path: Path, count: int, seed: int) -> None:
    """Labelled samples of the kind that the network was trained on."""
    inputs = np.random.default_rng(seed).normal(size=(count, 4)).astype("float32")
    scores = inputs @ np.array([[1, 0, -0.5], [-1, 1, 0], [0.5, 1, 1], [0, -1, 1]], "float32")
    np.savez(path, inputs=inputs, labels=scores.argmax(1))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the run today, normalised."""
    place = tmp_path_factory.mktemp("golden")
    write_samples(place / "train.npz", 400, 1)
    write_samples(place / "test.npz", 300, 2)
    options = {"checkpoint": str(NETWORK), "data": str(place / "train.npz"), "eval": str(place / "test.npz")}
    recipe = compress.make_recipe({**options, "macs": 0.8, "min_reduction": "1.1x", "output": str(place / "out")})
    report = compress.run(recipe).report
    assert report is not None
    return normalised(report.to_json())


def normalised(value: Any, name: str = "") -> Any:
    """Plain data without what a clock, a version or a place in the file system wrote."""
    if name in CHANGING:
        return {} if isinstance(value, dict) else 1 if isinstance(value, (int, float)) else name
    if isinstance(value, dict):
        return {key: normalised(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [normalised(inner, name) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def show_console(report: RunReport, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints, 80 columns wide and without colours."""
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setenv("NO_COLOR", "1")
        patch.setenv("PYTHONUTF8", "1")
        console = display.PlainConsole(record=True, width=80, file=open_nowhere())
        patch.setattr(display, "PlainConsole", lambda: console)
        display.show_run(report, Path("out"))
        return console.export_text()


def open_nowhere() -> Any:
    """A text file in memory."""
    import io

    return io.StringIO()


VIEWS: dict[str, Callable[[RunReport, pytest.MonkeyPatch], str]] = {
    "run.txt": show_console,
    "run.md": lambda report, _: markdown_report(report),
    "run.html": lambda report, _: render_report(report),
}


def test_a_run_has_the_parts_of_the_golden_one(fresh: dict[str, Any], request: pytest.FixtureRequest) -> None:
    path = GOLDEN / "run.json"
    if request.config.getoption("--update-golden"):
        write_json(path, fresh)
    assert_alike(fresh, json.loads(path.read_text()), "report")


def assert_alike(found: Any, wanted: Any, place: str) -> None:
    """The same parts, names and whole numbers; other numbers up to rounding, which a solver or a library may change."""
    assert type(found) is type(wanted) or {type(found), type(wanted)} == {int, float}, place
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), place
        for key in wanted:
            assert_alike(found[key], wanted[key], f"{place}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), place
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            assert_alike(*pair, f"{place}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=0.05, abs=1e-3), place
    else:
        assert found == wanted, place


@pytest.mark.parametrize("name", VIEWS)
def test_a_report_is_shown_as_it_was(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = RunReport.from_json(json.loads((GOLDEN / "run.json").read_text()), "run.json")
    found = VIEWS[name](report, monkeypatch)
    if request.config.getoption("--update-golden"):
        (GOLDEN / name).write_text(found, encoding="utf-8")
    assert found == (GOLDEN / name).read_text(encoding="utf-8"), "look at it, then give --update-golden"

"""The notebooks under examples/: every cell runs, on smaller networks and shorter trainings."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compress.recipe import Recipe, make_recipe

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))
QUICKER = {"epochs = 5": "epochs = 1", "range(150)": "range(40)", "depth=8": "depth=8, width=4"}
FEW = {"calibration_samples": 128, "refine": 0, "recover": "off"}


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of the expression at its end."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_and_prints_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quicker(options: Mapping[str, Any], *rest: Any) -> Recipe:
        return make_recipe({**options, **FEW}, *rest)

    monkeypatch.setattr("compress.api.live.make_recipe", quicker)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    for cell in cells:
        source = "".join(cell["source"])
        for long, short in QUICKER.items():
            source = source.replace(long, short)
        printed, _ = run_cell(source, names)
        shown = "".join(text for output in cell["outputs"] for text in output.get("text", ()))
        assert bool(printed) == bool(shown), source
    assert names["result"].report.cost.parameters.factor > 1.1
    assert "<iframe" in names["result"]._repr_html_()


def test_both_notebooks_are_there_with_what_they_printed() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["small_resnet", "tabular"]
    for path in NOTEBOOKS:
        assert path.stat().st_size < 30_000
        assert '"output_type": "stream"' in path.read_text(encoding="utf-8")

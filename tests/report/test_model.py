"""Reports as values: JSON and back, releases before, faults, names that stay text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import compress
from compress.api.reporting import read_any_report, rebuild_report
from compress.errors import OutputError
from compress.report.escaping import code, escaped
from compress.report.markdown import markdown_report
from compress.report.model import SCHEMA, Report, RunReport
from compress.report.schema import KINDS, make_schema, schema_folder, schema_name
from tests.report.reports import SPIKED, make_report, make_small_report

RELEASE = Path(__file__).parent / "release_0_1_0"
FOLDERS = ("run", "regression", "unscored", "training", "regression-training")
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1)


def again(report: Report) -> Report:
    """A report after a way through JSON."""
    return type(report).from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)), "report.json")


def numbers(value: Any) -> Iterator[float]:
    """Every number in plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("report", [make_report(), make_small_report()])
def test_json_and_back_is_the_identity(report: RunReport) -> None:
    assert again(report) == report


@pytest.mark.parametrize("name", FOLDERS)
def test_a_report_of_the_first_release_is_read_and_no_figure_is_lost(name: str) -> None:
    report = read_any_report(RELEASE / name)
    content = json.loads((RELEASE / name / report.FILE).read_text())
    counted = (content.get("search") or {}).pop("held_back_evaluations", None)
    assert set(numbers(content)) <= set(numbers(report.to_json()))
    assert counted is None or counted == len(report.search.trials)
    assert again(report) == report


@pytest.mark.parametrize("name", ["run", "training"])
def test_a_folder_of_the_first_release_verifies_on_the_samples_of_its_report(name: str) -> None:
    found = compress.verify(RELEASE / name, str(RELEASE / "test.npz"))
    assert found.passed
    assert {check.name for check in found.checks if check.passed is None} == set()
    assert "accuracy as reported" in {check.name for check in found.checks}


@pytest.mark.parametrize("name", ["run", "regression", "unscored"])
def test_a_folder_of_the_first_release_is_reported_anew(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(RELEASE / name, folder)
    rebuild_report(folder)
    said = re.search(r"[\d.]+× fewer parameters.*", (RELEASE / name / "report.md").read_text())
    assert said is not None
    assert said[0].rstrip(".") in (folder / "report.md").read_text()
    assert (folder / "report.json").read_bytes() == (RELEASE / name / "report.json").read_bytes()


def without_words(schema: Any) -> Any:
    """A schema without what is only said, and without what versions of pydantic differ in."""
    if isinstance(schema, dict):
        return {
            name: without_words(inner)
            for name, inner in schema.items()
            if name not in ("description", "title", "additionalProperties") or isinstance(inner, dict)
        }
    return [without_words(inner) for inner in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_in_the_package_is_the_one_of_today(kind: type[Report]) -> None:
    written = json.loads((schema_folder() / schema_name(kind)).read_text())
    hint = "run `python -m compress.report.schema`"
    assert without_words(written) == without_words(json.loads(json.dumps(make_schema(kind)))), hint
    assert set(make_report().to_json()) == set(make_schema(RunReport)["properties"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": SCHEMA + 1}, f"schema {SCHEMA + 1}"),
        ({"cost": {"parameters": [1, "many"], "macs": [1, 1], "bytes": [1, 1]}}, "cost.parameters.1"),
        ({"layers": 3}, "layers"),
        ({"verification": {}}, "verification.narrowed_deviation"),
        ({"notes": ["\ud800"]}, "surrogates"),
        ({"evaluations": 10**400}, "401 digits"),
        ({"recipe": {"a": json.loads("[" * 50 + "]" * 50)}}, "recipe"),
        ({"seconds": {"prepare": float("nan")}}, "NaN"),
    ],
)
def test_a_damaged_report_is_refused_by_its_file_and_first_fault(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**make_small_report().to_json(), **change}))
    with pytest.raises(OutputError) as caught:
        read_any_report(tmp_path)
    assert repr(str(tmp_path / "report.json")) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        make_small_report().rule = "another"


def rendered(text: str) -> str:
    """Markdown as HTML, with tables and raw HTML allowed, as a generous renderer has it."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


@given(TEXTS)
def test_a_name_in_markdown_stays_text(text: str) -> None:
    flat = " ".join(text.split())
    assert unescape(rendered(f"a {escaped(text)} b")) == f"<p>{f'a {flat} b'.replace('  ', ' ')}</p>\n" or not flat


@given(TEXTS)
def test_a_name_in_a_cell_stays_in_its_cell(text: str) -> None:
    html = rendered(f"| a | b |\n|---|---|\n| {code(text, cell=True)} | {escaped(text)} |\n")
    assert html.count("<td>") == 2
    cells = [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", html, re.DOTALL)]
    flat = " ".join(text.split())
    assert cells == [f"<code>{flat}</code>", flat] or not flat


def test_nothing_in_a_report_becomes_markup_of_its_markdown() -> None:
    html = rendered(markdown_report(make_report()))
    assert "<script" not in html
    assert unescape(html).count(SPIKED) >= 4

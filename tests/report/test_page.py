"""The pages: one file each, nothing of a report becomes markup, and the same report gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress.api.reporting import compare, read_report, rebuild_report
from compress.errors import OutputError
from compress.report.html import render_comparison, render_report
from compress.report.html.scales import Axis, tick_label
from compress.report.model import Check, RunReport
from tests.report.reports import SPIKED, make_report, make_small_report

LARGEST = 1_500_000  # bytes of a page


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    return found


def test_nothing_in_a_report_becomes_markup() -> None:
    for page in (render_report(make_report()), render_comparison([(SPIKED, make_report()), ("b", make_report())])):
        found = parse(page)
        assert "script" not in {tag for tag, _ in found.tags}
        assert SPIKED in found.text


def test_nothing_is_fetched() -> None:
    for page in (render_report(make_report()), render_comparison([("a", make_report())])):
        addresses = [
            value for _, own in parse(page).tags for name, value in own.items() if name in ("src", "href") and value
        ]
        assert addresses
        assert all(address.startswith(("#", "data:")) for address in addresses)
        assert "url(" not in page
        assert "@import" not in page


def test_the_same_report_gives_the_same_bytes() -> None:
    assert render_report(make_report()) == render_report(make_report())


def test_a_page_of_a_very_deep_network_stays_small() -> None:
    page = render_report(make_report(layers=300, classes=1000, side=64))
    assert len(page.encode()) < LARGEST


def test_every_drawing_has_a_name_and_a_description_and_ids_are_unique() -> None:
    found = parse(render_report(make_report(layers=5)))
    ids = [own["id"] for _, own in found.tags if own.get("id")]
    assert len(ids) == len(set(ids))
    drawings = [own for tag, own in found.tags if tag == "svg"]
    assert len(drawings) == 5 * 3 + 4 + 5 * 2 + 3  # with costs, the strip and the search's two charts
    assert all({*str(own["aria-labelledby"]).split()} <= {*ids} for own in drawings)


def test_every_link_of_the_page_leads_somewhere() -> None:
    found = parse(render_report(make_report()))
    ids = {own.get("id") for _, own in found.tags}
    links = {str(own["href"])[1:] for tag, own in found.tags if tag == "a"}
    assert links
    assert links <= ids


@pytest.mark.parametrize("part", ["evaluation", "gates", "search", "finetune", "hashes"])
def test_a_report_without_an_optional_part_still_makes_a_page(part: str) -> None:
    content = make_report().to_json()
    del content[part]
    assert "Layer by layer" in render_report(RunReport.from_json(content, "report.json"))


def test_a_failed_gate_is_the_verdict() -> None:
    gate = Check("accuracy", "≤ 0.1 points lost", "0.50", False, "too much")
    page = parse(render_report(replace(make_report(), gates=(gate,))))
    assert "Failed: accuracy" in page.text
    passed = replace(make_report(), gates=(replace(gate, passed=True),))
    assert "Passed: accuracy" in parse(render_report(passed)).text


def test_an_axis_is_linear_or_logarithmic_and_never_leaves_its_ends() -> None:
    assert Axis(0, 10, 100, 200)(2.5) == pytest.approx(125)
    assert Axis(1e-4, 1, 0, 100, log=True)(1e-2) == pytest.approx(50)
    assert Axis(1e-4, 1, 0, 100, log=True)(0) == pytest.approx(0)
    assert Axis(3, 3, 0, 100)(7) == 0


@pytest.mark.parametrize(("low", "high", "log"), [(0, 7, False), (1, 768, False), (1e-6, 1, True), (98.3, 98.9, False)])
def test_ticks_lie_on_the_axis_and_are_told_apart(low: float, high: float, log: bool) -> None:
    ticks = Axis(low, high, 0, 1, log=log).ticks()
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert len({tick_label(tick) for tick in ticks}) == len(ticks)


def folder_with(report: RunReport, path: Path) -> Path:
    path.mkdir()
    (path / "report.json").write_text(json.dumps(report.to_json()))
    return path


def test_a_rebuilt_report_is_the_one_that_was_written(tmp_path: Path) -> None:
    folder = folder_with(make_report(), tmp_path / "out")
    rebuild_report(folder)
    assert (folder / "report.html").read_text() == render_report(read_report(folder))
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "report.html"}


def test_a_comparison_has_a_column_for_each_run_and_says_what_a_run_lacks(tmp_path: Path) -> None:
    second = replace(make_report(layers=2), evaluation=None)
    folders = [folder_with(make_report(layers=3), tmp_path / "a"), folder_with(second, tmp_path / "b")]
    found = compare(folders, tmp_path / "compare.html")
    assert [run.parameters for run in found.runs] == [250_000, 250_000]
    assert [run.top1 for run in found.runs] == [0.895, None]
    assert [layer.kept for layer in found.layers] == [(8, 8), (16, 16), (24, None)]
    assert all(len(row) == 3 for row in found.rows)
    assert (tmp_path / "compare.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("damage", ["no file", "no json", "[]", "{}", "missing", "wrong type"])
def test_a_damaged_report_is_one_clear_fault_and_leaves_no_file(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    report = make_report().to_json()
    if damage == "missing":
        del report["layers"][0]["units"]
    if damage == "wrong type":
        report["cost"]["parameters"] = "many"
    text = json.dumps(report) if damage in ("missing", "wrong type") else {"no json": "{"}.get(damage, damage)
    if damage != "no file":
        (folder / "report.json").write_text(text)
    for call in (lambda: rebuild_report(folder), lambda: compare([folder])):
        with pytest.raises(OutputError):
            call()
    assert not (folder / "report.html").exists()


def damaged(value: Any, wrong: Any) -> Iterator[Any]:
    """The value once for every part of it, with that part gone (`wrong` is ...) or replaced by `wrong`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            rest = {name: one for name, one in value.items() if name != key}
            yield rest if wrong is ... else {**value, key: wrong}
            yield from ({**value, key: changed} for changed in damaged(inner, wrong))
    elif isinstance(value, list):
        for place, inner in enumerate(value[:2]):
            after = value[place + 1 :]
            yield value[:place] + ([] if wrong is ... else [wrong]) + after
            yield from ([*value[:place], changed, *after] for changed in damaged(inner, wrong))


@pytest.mark.parametrize("wrong", [..., None, "x", -1, {}, [[]]])
def test_a_report_damaged_anywhere_is_a_page_or_one_fault(wrong: Any, tmp_path: Path) -> None:
    report = make_small_report().to_json()
    path, outcomes = tmp_path / "report.json", []
    for changed in damaged(report, wrong):
        path.write_text(json.dumps(changed))
        for call in (lambda: rebuild_report(tmp_path), lambda: compare([tmp_path, tmp_path])):
            try:
                call()
            except OutputError as error:
                outcomes.append("\n" in str(error))
    assert len(outcomes) > 20
    assert not any(outcomes)

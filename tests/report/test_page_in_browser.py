"""The pages in a real browser: a headless Chromium, where one is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.report.html import render_comparison, render_report
from tests.report.browser import Browser, find_browser, open_browser
from tests.report.reports import make_report

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
PAGES = ("report", "comparison")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    assert PROGRAM is not None
    with open_browser(PROGRAM) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both kinds of page, on disk."""
    folder = tmp_path_factory.mktemp("pages")
    report = make_report(layers=4, classes=30, side=32)
    texts = {"report": render_report(report), "comparison": render_comparison([("first", report), ("second", report)])}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_without_complaint_request_or_sideways_scrolling(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width, dark=dark)
    assert browser.complaints == []
    assert all(address.startswith(("file:", "data:")) for address in browser.requests)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelector('h1').getBoundingClientRect().height") > 10


def test_every_chart_has_marks_of_some_extent(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1280)
    extents = browser.evaluate(
        "[...document.querySelectorAll('svg')].map(one => "
        "[...one.querySelectorAll('polyline, circle, rect.kept, rect.part')]"
        ".filter(mark => { const box = mark.getBoundingClientRect(); return box.width + box.height > 2; }).length)"
    )
    assert len(extents) == 4 * 3 + 30 + 4 * 2 + 3
    assert min(extents) >= 1


def test_bars_are_drawn_to_scale(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1280)
    widths = browser.evaluate(
        "[...document.querySelectorAll('svg.bar rect.kept')].map(one => one.getBoundingClientRect().width)"
    )
    assert [width / widths[0] for width in widths] == pytest.approx([1, 2, 3, 4], rel=0.01)


def test_text_stands_out_from_the_paper_in_both_schemes(browser: Browser, pages: dict[str, Path]) -> None:
    seen = set()
    for dark in (False, True):
        browser.open(pages["report"], 1280, dark=dark)
        ink, paper = (
            [float(part) for part in browser.evaluate(f"getComputedStyle(document.body).{name}")[4:-1].split(",")]
            for name in ("color", "backgroundColor")
        )
        first, second = sorted((luminance(ink), luminance(paper)))
        assert (second + 0.05) / (first + 0.05) > 7  # WCAG 2.2, level AAA
        seen.add(tuple(paper))
    assert len(seen) == 2


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour (0 … 255), WCAG 2.2."""
    linear = [(part / 255 / 12.92) if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_keyboard_reaches_the_content_and_every_scrolling_table(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 360)
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.evaluate("document.activeElement.className") == "skip"
    assert browser.evaluate("[...document.querySelectorAll('.scroll')].every(one => one.tabIndex === 0)")


def test_a_page_prints(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], 1280)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) in (1, 2)

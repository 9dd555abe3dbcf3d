"""The page of a zoo: read without a script, sorted by its only one, at home on a phone and in the dark."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from compress.zoo.summary import COLUMNS, render_index
from tests.report.browser import find_browser, open_browser


def row(name: str, **cells: Any) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS), "name": name, "status": "done", **cells}


FOUND = {
    "models": 3,
    "counts": {"done": 2, "gate failed": 0, "failed": 1},
    "rows": [
        row("ten", parameters_before=1000, parameters_after=100, top1_after=0.91, drop_points=0.5, seconds=9.0),
        row("two", parameters_before=1000, parameters_after=500, top1_after=0.95, drop_points=-0.1, seconds=12.0),
        row("none", status="failed", reason="no file <b>here</b>"),
    ],
}


def test_every_figure_is_in_the_page_itself_and_names_stay_text(tmp_path: Path) -> None:
    page = render_index(FOUND, tmp_path)
    for word in ("ten", "10.00×", "2.00×", "91.00 %", "0.50", "no file &lt;b&gt;here", "2 done, 1 failed"):
        assert word in page


def test_the_page_allows_its_own_script_and_no_other(tmp_path: Path) -> None:
    page = render_index(FOUND, tmp_path)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (allowed,) = re.findall(r"script-src '([^']+)'", page)
    assert allowed == "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_a_click_on_a_heading_sorts_by_value_and_a_second_one_turns_it(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    file.write_text(render_index(FOUND, tmp_path), encoding="utf-8")
    names = "[...document.querySelectorAll('tbody th')].map(cell => cell.textContent).join()"
    click = "[...document.querySelectorAll('thead button')].find(one => one.textContent === '{}').click()"
    with open_browser(find_browser() or "") as browser:
        browser.open(file, 1280)
        assert browser.evaluate(names) == "ten,two,none"
        seen = []
        for heading in ("fewer parameters", "fewer parameters", "model", "seconds"):
            browser.evaluate(click.format(heading))
            seen.append(browser.evaluate(names))
        assert seen == ["two,ten,none", "ten,two,none", "none,ten,two", "ten,two,none"]
        for dark in (False, True):
            browser.open(file, 360, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= 360
        assert not browser.complaints

"""What CI systems read: workflow commands, outputs, JUnit XML."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.report.checks import check_drop, check_reduction
from compress.report.github import annotation, escape_data, format_output, write_outputs, write_summary
from compress.report.junit import junit_xml
from compress.report.model import Check, CostReport, Counts, Latency

COST = CostReport(
    parameters=Counts(1000, 250),
    macs=Counts(900, 300),
    bytes=Counts(4000, 1000),
    latency=(Latency(1, 1, "cpu", 1.0, 1.0), Latency(64, 1, "cpu", 6.0, 4.0)),
)


def unescape(text: str) -> str:
    """What the runner makes of an escaped message."""
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


@given(st.text())
def test_an_annotation_is_one_line_and_its_message_comes_back(message: str) -> None:
    line = annotation("error", message, title=message)
    assert "\n" not in line
    assert "\r" not in line
    assert line.startswith("::error title=")
    assert unescape(escape_data(message)) == message


def test_a_title_cannot_end_the_properties() -> None:
    assert annotation("notice", "a: b, c", "x::y,z=1") == "::notice title=x%3A%3Ay%2Cz=1::a: b, c"


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        annotation("fatal", "x")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=0))
def test_no_line_of_an_output_is_its_delimiter(value: str) -> None:
    first, *lines = format_output("name", value).split("\n")
    delimiter = first.removeprefix("name<<")
    assert lines[-2:] == [delimiter, ""]
    assert delimiter not in "\n".join(lines[:-2]).splitlines()


def test_summary_and_outputs_are_appended_to_the_files_of_the_runner(tmp_path: Path) -> None:
    environment = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "GITHUB_OUTPUT": str(tmp_path / "output")}
    for text in ("one\n", "two\n"):
        write_summary(text, environment)
        write_outputs({"passed": "true"}, environment)
    assert (tmp_path / "summary").read_text() == "one\ntwo\n"
    assert (tmp_path / "output").read_text().count("passed<<") == 2
    write_summary("nothing outside of a runner", {})


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([True, False, None]))
def test_junit_is_xml_whatever_the_texts_hold(text: str, passed: bool | None) -> None:
    checks = [Check(text, text, text, passed, text), Check("b", "w", "m", False, "too little")]
    suite = ElementTree.fromstring(junit_xml(text, checks, fault=text))[0]
    assert len(suite) == 3
    assert int(suite.attrib["failures"]) == 1 + (passed is False)
    assert int(suite.attrib["skipped"]) == (passed is None)
    assert int(suite.attrib["errors"]) == 1
    assert len(suite.findall("testcase/failure")) == 1 + (passed is False)


@pytest.mark.parametrize(
    ("quantity", "factor", "passed"),
    [
        ("params", 4, True), ("params", 4.01, False), ("macs", 3, True), ("macs", 3.1, False), ("bytes", 4, True),
        ("latency", 1.5, True), ("latency", 1.6, False),
    ],
)  # fmt: skip
def test_a_reduction_is_before_over_after(quantity: str, factor: float, passed: bool) -> None:
    assert check_reduction(COST, quantity, factor).passed is passed


def test_a_drop_at_its_bound_passes_and_a_larger_one_fails() -> None:
    assert check_drop(0.5, 0.5).passed
    assert not check_drop(0.51, 0.5).passed
    assert check_drop(-1.0, 0.0).passed

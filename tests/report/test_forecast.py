"""What more samples would bring, as a report tells it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compress.cli.showing.display import show_run
from compress.report.html import render_report
from compress.report.markdown import markdown_report
from compress.report.model import ForecastReport, RunReport, Step, TuningReport
from compress.report.rows import forecast_text
from tests.report.reports import make_small_report

POINTS = (Step(180, 0.4), Step(540, 0.3), Step(1800, 0.2))


def report_with(forecast: ForecastReport | None) -> RunReport:
    """A report of a run that was recovered."""
    return replace(make_small_report(), finetune=TuningReport("distillation", 600, 600, forecast=forecast))


def test_points_of_agreement_are_told_with_their_range_wherever_a_report_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = (
        "2,000 samples without labels: +1.0 points of held-back agreement; 10,000 would bring about 2.0 more "
        "(1.0 to 3.2)."
    )
    report = report_with(ForecastReport(2000, 10_000, POINTS, 0.64, 0.46, 0.81, 0.89, 0.90))
    assert forecast_text(report) == told
    show_run(report, None)
    assert told in " ".join(capsys.readouterr().out.split())
    assert told in markdown_report(report)
    assert told in render_report(report)
    assert RunReport.from_json(report.to_json(), "report.json") == report


def test_without_scores_the_distance_that_would_be_left_is_told() -> None:
    told = forecast_text(report_with(ForecastReport(2000, 10_000, POINTS, 0.64, 0.46, 0.81)))
    assert told is not None
    assert "64 % of their distance" in told
    assert "(46 to 81 %)" in told


def test_nothing_is_told_where_the_recoveries_did_not_tell() -> None:
    assert forecast_text(report_with(None)) is None
    assert forecast_text(make_small_report()) is None

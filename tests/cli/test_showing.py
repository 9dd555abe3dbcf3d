"""What the command line shows: on terminals without Unicode, with brackets in names, in pipes, loud and quiet."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.box import SIMPLE_HEAD
from rich.table import Table

from compress.cli import main
from compress.cli.showing.console import PlainConsole
from compress.cli.showing.display import show_run
from compress.cli.showing.display_zoo import LiveZoo
from compress.cli.showing.progress import LOUDNESS, StderrProgress, in_words
from compress.cli.spelling import spell
from compress.errors import CompressError, nearest
from compress.progress import Portion, SilentProgress
from compress.report.model import CostReport, Counts, FigureChange, FigureReport, Latency
from compress.zoo.backends.protocol import Event
from tests.report.reports import make_small_report


def shown_on(encoding: str, *cells: str) -> str:
    """A table with these cells, as a terminal of that encoding shows it."""
    raw = io.BytesIO()
    console = PlainConsole(file=io.TextIOWrapper(raw, encoding=encoding), width=60)
    table = Table("layer", "rank Φ · Ψ", box=SIMPLE_HEAD)
    table.add_row(*cells)
    console.print(table)
    console.file.flush()
    return raw.getvalue().decode(encoding)


def test_a_terminal_without_unicode_gets_ascii_with_the_columns_in_line() -> None:
    shown = shown_on("ascii", "conv", "24 → 12")
    assert "rank Phi . Psi" in shown
    assert "24 -> 12" in shown
    assert len({len(line) for line in shown.splitlines() if line.strip()}) == 1


def test_every_row_of_a_summary_keeps_its_name_and_numbers_on_one_line_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report = make_small_report()
    assert report.evaluation is not None
    loss = FigureReport(
        "loss", "output", 0.0412345, 0.0436789, FigureChange(1e-3, (-4.08e-3, 6.86e-3), 1e-3, 0.95, "t")
    )
    slow = Latency(64, 16, "cpu", 1129.12, 1057.34)
    large = CostReport(Counts(120_576_858, 41_000_000), Counts(398_136_832, 199_000_000), Counts(1, 1), (slow,))
    figures = (*report.evaluation.figures, loss)
    show_run(replace(report, cost=large, evaluation=replace(report.evaluation, figures=figures)), None)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if "fewer" not in line)  # a pipe's last line is never broken
    for words in ("latency, batch 64, 16 threads 1129.12 ms 1057.34 ms 1.07×", "MACs per sample 398,136,832",
                  "top-1 90.00 % 89.50 % -0.50 points", "right → wrong, wrong → right 9, 4"):  # fmt: skip
        assert any(words in " ".join(line.split()) for line in lines), (words, lines)


@pytest.mark.parametrize("name", ["[red]x[/bold]", "[/]", ":smile:", "a[0]"])
def test_names_are_no_markup(name: str) -> None:
    assert name in shown_on("utf-8", name, "1")


def test_what_can_be_shown_is_left_as_it_is() -> None:
    assert spell("‖w‖ → λ", "utf-8") == "‖w‖ → λ"
    assert spell("naïve 漢", "ascii") == r"na\xefve \u6f22"


def test_a_pipe_gets_no_colours_and_no_more_than_80_columns() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    for words in (["--help"], ["run", "--help"], ["doctor"]):
        done = subprocess.run(
            [sys.executable, "-m", "compress", *words], capture_output=True, env=environment, check=True
        )
        assert b"\x1b" not in done.stdout
        if words != ["doctor"]:
            assert max(map(len, done.stdout.splitlines())) <= 80


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that progress reads."""
    made = Clock()
    monkeypatch.setattr("compress.cli.showing.progress.time", made)
    return made


def test_without_a_terminal_a_long_stage_is_told_with_the_time_that_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with StderrProgress() as progress:
        progress.stage("short")
        clock.now = 1.0
        progress.stage("long")
        clock.now = 30.0
        progress.reach(0.25)
        progress.stage("last")
        clock.now = 70.0
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if ":" in line] == ["long: 29.0 s, about 2 min left", "last: 40.0 s"]


def test_quiet_says_nothing_and_keeps_the_notes_and_verbose_tells_every_stage(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for loudness, said in ((-1, ""), (1, "careful\nstage: 0.0 s\n")):
        token = LOUDNESS.set(loudness)
        with StderrProgress() as progress:
            progress.stage("stage")
            progress.note("careful")
        LOUDNESS.reset(token)
        assert progress.notes == ["careful"]
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(("seconds", "words"), [(3, "10 s"), (44, "40 s"), (200, "3 min"), (9000, "2.5 h")])
def test_durations_are_said_roughly(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_portion_of_a_portion_tells_its_share_of_the_whole() -> None:
    class Told(SilentProgress):
        shares: list[float]

        def reach(self, share: float) -> None:
            self.shares.append(share)

    told = Told()
    told.shares = []
    Portion(Portion(told, 0.2, 0.6), 0.5, 1).reach(0.5)
    assert told.shares == [pytest.approx(0.5)]


def test_every_command_can_be_quiet_and_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quiet"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert main(["inspect", "nothing.pt", "--verbose"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("error: ")


def test_a_message_that_quotes_another_ends_in_one_full_stop() -> None:
    assert str(CompressError("it fails: no such file..")) == "it fails: no such file."
    assert str(CompressError("did you mean this?.")) == "did you mean this?"
    assert str(CompressError("and so on...")) == "and so on..."


def test_only_a_near_word_is_suggested() -> None:
    assert nearest("resnt18", ["vgg11", "resnet18"]) == " (did you mean 'resnet18'?)"
    assert nearest("zebra", ["vgg11", "resnet18"]) == ""


def test_doctor_tells_versions_and_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "numpy", "cores", "packaged network: works", "one layer solved: works"):
        assert word in shown
    assert os.getcwd() not in shown
    assert os.path.expanduser("~") + "/" not in shown


def test_a_quiet_zoo_says_nothing_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = {"status": "failed", "reason": "no memory"}
    for loudness, said in ((-1, ""), (0, "[1/0] net: failed: no memory\n")):
        token = LOUDNESS.set(loudness)
        with LiveZoo() as zoo:
            zoo.event(Event("net", outcome=outcome))
        LOUDNESS.reset(token)
        assert capsys.readouterr().err == said

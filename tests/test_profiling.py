"""Where the time goes: stages are noted, those of one kind counted together, written as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.errors import OutputError
from compress.profiling import Spent, profiled, summarise
from compress.progress import SilentProgress


def spent(stage: str, wall: float = 1.0, peak: int = 1) -> Spent:
    return Spent(stage, wall, wall / 2, wall / 4, peak)


def test_what_is_done_to_every_layer_counts_as_one() -> None:
    stages = [
        spent("loading"),
        spent("recording a.b", 2.0, 7),
        spent("solving a.b"),
        spent("recording c", 3.0, 5),
        spent("solving c"),
        spent("measuring sensitivities"),
        spent("measuring latency"),
    ]
    found = {each.stage: each for each in summarise(stages)}
    assert list(found) == [
        "loading",
        "recording each layer",
        "solving each layer",
        "measuring sensitivities",
        "measuring latency",
    ]
    assert found["recording each layer"] == Spent("recording each layer", 5.0, 2.5, 1.25, 7, 2)


def test_a_stage_of_several_words_keeps_its_name() -> None:
    stages = [spent("recording held-back samples"), spent("scoring held-back samples"), spent("solving samples")]
    assert [each.stage for each in summarise(stages)] == [each.stage for each in stages]


def test_a_profile_is_written_though_the_run_fails(tmp_path: Path) -> None:
    def run() -> None:
        with profiled(SilentProgress(), str(tmp_path / "times.json")) as progress:
            progress.stage("loading")
            progress.stage("tracing", 3)
            progress.advance()
            raise KeyError

    with pytest.raises(KeyError):
        run()
    content = json.loads((tmp_path / "times.json").read_text())
    assert [each["stage"] for each in content["stages"]] == ["loading", "tracing"]
    assert all(each["peak_bytes"] > 0 and each["wall"] >= 0 for each in content["summary"])


def test_a_table_has_a_line_a_kind_and_their_sum(tmp_path: Path) -> None:
    with profiled(SilentProgress(), str(tmp_path / "times.txt")) as progress:
        progress.stage("loading")
        progress.note("said")
    lines = (tmp_path / "times.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "loading", "all"]
    assert progress.notes == ["said"]  # type: ignore[attr-defined]


def test_a_profile_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError), profiled(SilentProgress(), str(tmp_path / "file" / "times.txt")):
        pass

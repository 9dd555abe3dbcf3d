"""The gate of a run, and `compress verify`, as a pipeline meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.artifact.checksums import write_checksums
from compress.checkpoint.manifest import file_sha256
from compress.cli import main
from compress.demo import DEMO_OPTIONS
from compress.errors import RecipeError
from compress.recipe import make_recipe, parse_reduction

EVALUATION = str(DEMO_OPTIONS["eval"])
RUN = [str(DEMO_OPTIONS["checkpoint"]), "--data", "digits", "--calibration-samples", "300", "--eval", EVALUATION]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that passed its gates, and what the run told a GitHub runner and a JUnit reader."""
    place = tmp_path_factory.mktemp("gates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GITHUB_STEP_SUMMARY", str(place / "summary.md"))
        patch.setenv("GITHUB_OUTPUT", str(place / "output.txt"))
        gates = ["--min-reduction", "2x", "--min-reduction", "macs:1.5x", "--max-drop", "5"]
        told = ["--github", "--junit", str(place / "junit.xml")]
        assert main([*RUN, "--keep", "0.5", *gates, *told, "--output", str(place / "out")]) == 0
    return place / "out"


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_passed_gates_are_in_the_report_the_summary_and_the_outputs(written: Path) -> None:
    report = json.loads((written / "report.json").read_text())
    names = ["accuracy", "reduction of parameters", "reduction of MACs"]
    assert [(gate["name"], gate["passed"]) for gate in report["gates"]] == [(name, True) for name in names]
    assert "Passed: accuracy" in (written / "report.html").read_text()
    assert "reduction of MACs" in (written.parent / "summary.md").read_text()
    output = (written.parent / "output.txt").read_text()
    assert "passed<<" in output
    assert "\ntrue\n" in output
    assert str(written) in output
    suite = ElementTree.parse(written.parent / "junit.xml").getroot()
    assert suite.attrib["failures"] == "0"
    assert {*names} < {case.attrib["name"] for case in suite.iter("testcase")}


def test_a_gate_that_fails_ends_with_3_writes_nothing_and_says_so_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output.txt"))
    told = ["--github", "--junit", str(tmp_path / "junit.xml"), "--json"]
    gate = ["--keep", "0.5", "--min-reduction", "100x", "--output", str(tmp_path / "out")]
    assert main([*RUN, *gate, *told]) == 3
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "::error title=compress%3A reduction of parameters::" in captured.err
    assert not (tmp_path / "out").exists()
    assert "\nfalse\n" in (tmp_path / "output.txt").read_text()
    assert (tmp_path / "summary.md").read_text().startswith("**Failed.**")
    failures = [
        case for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase") if case.find("failure") is not None
    ]
    assert [case.attrib["name"] for case in failures] == ["reduction of parameters"]


def test_a_fault_that_is_no_gate_is_an_error_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["missing.pt", "--data", "digits", "--github", "--junit", str(tmp_path / "junit.xml")]
    assert main(arguments) == 1
    assert "::error title=compress::" in capfd.readouterr().err
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().attrib["errors"] == "1"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("2x", ("params", 2.0)), ("1.5", ("params", 1.5)), ("macs:2X", ("macs", 2.0)), ("latency:1.2×", ("latency", 1.2))],
)
def test_a_reduction_names_what_and_how_much(text: str, meaning: tuple[str, float]) -> None:
    assert parse_reduction(text) == meaning


@pytest.mark.parametrize("text", ["", "x", "0.5x", "macs:", "speed:2x", "nanx", "infx", "-2x"])
def test_what_is_no_reduction_is_refused_with_the_choices(text: str) -> None:
    with pytest.raises(RecipeError, match="macs:2x"):
        make_recipe({"checkpoint": "x.pt", "min_reduction": [text]})


def verify(folder: Path, *arguments: str) -> int:
    return main(["verify", str(folder), *arguments])


def test_an_artifact_as_written_is_verified_with_its_accuracy(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit = ["--junit", str(tmp_path / "junit.xml")]
    assert verify(written, "--eval", EVALUATION, "--max-drop", "5", "--json", *junit) == 0
    found = json.loads(capsys.readouterr().out)
    report = json.loads((written / "report.json").read_text())
    assert found["passed"] is True
    assert found["evaluation"]["top1"] == pytest.approx(report["evaluation"]["compressed"]["top1"])
    assert {one["batch_size"] for one in found["latency"]} == {1, 64}
    assert all(one["milliseconds"] > 0 for one in found["latency"])
    assert all(check["passed"] for check in found["checks"])
    assert len(list(ElementTree.parse(tmp_path / "junit.xml").iter("testcase"))) == len(found["checks"])


def test_a_verification_gate_that_is_not_met_ends_with_3(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((written / "report.json").read_text())
    path, drop = written / "report.json", report["evaluation"]["drop_points"]
    original = path.read_text()
    report["evaluation"]["figures"][0]["original"] = 1.0  # as if more had been lost
    path.write_text(json.dumps(report))
    write_checksums(written)
    try:
        assert verify(written, "--eval", EVALUATION, "--max-drop", str(drop + 0.5)) == 3
    finally:
        path.write_text(original)
        write_checksums(written)
    assert "points" in capsys.readouterr().err


def change_a_byte(folder: Path) -> str:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "model.safetensors is changed"


def remove_a_file(folder: Path) -> str:
    (folder / "recipe.yaml").unlink()
    return "recipe.yaml is missing"


def add_a_file(folder: Path) -> str:
    (folder / "more.bin").write_bytes(b"x")
    return "more.bin is unlisted"


def change_weights_and_all_hashes(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in state:
        if state[name].is_floating_point() and state[name].ndim > 1:
            state[name] += 0.3 * torch.randn(state[name].shape, generator=generator)
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["hashes"]["model.safetensors"] = file_sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_checksums(folder)
    return "was measured"


def widen_the_report(folder: Path) -> str:
    report = json.loads((folder / "report.json").read_text())
    report["layers"][0]["kept"] += 1
    (folder / "report.json").write_text(json.dumps(report))
    write_checksums(folder)
    return "the manifest"


@pytest.mark.parametrize(
    "damage", [change_a_byte, remove_a_file, add_a_file, change_weights_and_all_hashes, widen_the_report]
)
def test_a_changed_artifact_ends_with_3_and_says_what_changed(
    copied: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = damage(copied)
    assert verify(copied, "--eval", EVALUATION) == 3
    assert words in capsys.readouterr().err


def test_other_samples_are_not_compared_and_cannot_be_a_gate(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(written, "--eval", "digits", "--json") == 0
    checks = {check["name"]: check["passed"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["accuracy as reported"] is None
    assert verify(written, "--eval", "digits", "--max-drop", "1") == 1
    assert verify(written, "--max-drop", "1") == 2


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"layers": 3}'])
def test_a_folder_that_is_no_artifact_is_one_line(copied: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "report.json").write_text(text)
    write_checksums(copied)
    assert verify(copied) == 1
    assert verify(copied / "nowhere") == 1
    assert capsys.readouterr().err.count("error:") == 2

"""A gate that says no: evaluations on which no loss would show, and bounds that hold with a confidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.cli import main
from compress.data import Batch, open_data
from compress.demo import DEMO_OPTIONS
from compress.errors import GateError, RecipeError
from compress.measures.outputs import Output
from compress.recipe import Bound
from compress.report.checks import check_losses
from compress.report.doubts import find_doubts
from compress.report.evaluation import Evaluation, evaluate_networks

CHECKPOINT = str(DEMO_OPTIONS["checkpoint"])


class Table(nn.Module):
    """Class scores that are right on the samples listed; inputs are sample numbers."""

    def __init__(self, labels: Tensor, right: Tensor, classes: int) -> None:
        super().__init__()
        self.answers = torch.where(right, labels, (labels + 1) % classes)
        self.classes = classes

    def forward(self, numbers: Tensor) -> Tensor:
        return nn.functional.one_hot(self.answers[numbers[:, 0].long()], self.classes).float()


def evaluated(before: int, after: int, samples: int, classes: int = 10) -> Evaluation:
    """Networks that are right on the first so many of balanced samples."""
    labels = torch.arange(samples) % classes
    networks = [Table(labels, torch.arange(samples) < right, classes) for right in (before, after)]
    batch = Batch(torch.arange(samples)[:, None].float(), labels)
    return evaluate_networks(*networks, [batch], (Output("output", (classes,), "classes", class_dim=1),), "output")


def test_a_sound_evaluation_leaves_no_doubt() -> None:
    assert find_doubts(evaluated(450, 448, 500), Bound(0.5)) == []


@pytest.mark.parametrize(
    ("evaluation", "most", "words"),
    [
        (evaluated(0, 5, 500), 0.5, "no better than always giving the commonest label"),
        (evaluated(55, 54, 500), 0.5, "no better than always giving"),
        (evaluated(1, 1, 1), 0.5, "at least 200"),
        (evaluated(30, 30, 30), 3.0, "30 evaluation samples cannot show a loss of 3 points"),
        (evaluated(200, 400, 500), 0.5, "the original is broken"),
        (evaluated(4, 4, 4, classes=2), None, "no better than"),
    ],
)
def test_an_evaluation_that_cannot_show_a_loss_is_doubted(evaluation: Evaluation, most: float, words: str) -> None:
    (first, *_) = find_doubts(evaluation, None if most is None else Bound(most))
    assert words in first


def test_what_was_trained_after_the_cut_may_be_better() -> None:
    assert find_doubts(evaluated(200, 400, 500), Bound(0.5), tuned=True) == []


@pytest.mark.parametrize(
    ("evaluation", "most", "passed", "words"),
    [
        (evaluated(450, 449, 500), 0.5, None, "not enough samples to be so sure, about"),
        (evaluated(9500, 9500, 10_000), 0.5, True, "with 95 % confidence by at most 0.03"),
        (evaluated(9500, 9300, 10_000), 0.5, False, "falls by 2.00 points"),
    ],
)
def test_a_bound_with_a_confidence_is_a_test_of_non_inferiority(
    evaluation: Evaluation, most: float, passed: bool | None, words: str
) -> None:
    (check,) = check_losses(evaluation, Bound(most, confidence=0.95))
    assert check.passed is bool(passed)
    assert words in check.message
    (plain,) = check_losses(evaluation, Bound(most))
    assert plain.passed is (passed is not False)


def test_a_confidence_needs_a_bound() -> None:
    with pytest.raises(RecipeError, match="max_drop"):
        compress.make_recipe({"checkpoint": "x.pt", "confidence": 0.9})


@pytest.fixture
def shifted(tmp_path: Path) -> str:
    """The digits to evaluate on, their labels shifted by one."""
    source = open_data("digits?train=false")
    batch = next(iter(source.batches(500)))
    assert batch.labels is not None
    np.savez(tmp_path / "shifted.npz", inputs=batch.inputs.numpy(), labels=(batch.labels.numpy() + 1) % 10)
    return str(tmp_path / "shifted.npz")


def run(**options: Any) -> compress.api.RunResult:  # type: ignore[name-defined]
    given = {"checkpoint": CHECKPOINT, "data": "digits", "keep": 0.5, "calibration_samples": 200}
    return compress.run(compress.make_recipe({**given, **options}), dry_run=True)


def test_labels_that_do_not_fit_end_with_3_before_any_work(shifted: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "digits", "--eval", shifted, "--keep", "0.5", "--max-drop", "0.5"]
    assert main([CHECKPOINT, *options, "--dry-run"]) == 3
    said = capsys.readouterr().err
    assert "no better than always giving the commonest label" in said
    assert "--force-gate" in said
    assert "nothing was compressed" in said


def test_a_forced_gate_passes_and_says_so(shifted: str) -> None:
    report = run(eval=shifted, max_drop=5, force_gate=True).report
    assert [gate.passed for gate in report.gates] == [True]
    assert any("no better than always" in note for note in report.notes)


def test_without_a_gate_there_is_a_warning(shifted: str) -> None:
    report = run(eval=shifted).report
    assert any(note.startswith("warning: the original's top-1") for note in report.notes)
    assert report.gates == ()


def test_too_few_samples_for_a_confidence_end_with_how_many_would_do() -> None:
    with pytest.raises(GateError, match=r"not enough samples to be so sure, about [\d,]+ would do"):
        run(eval="digits?train=false", max_drop=0.5, confidence=0.99, keep=0.9)

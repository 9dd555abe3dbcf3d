"""Guard sets: calibrated on with a weight, shown apart, bounded; a loss above the bound fails the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.cli import main
from compress.data import open_data
from compress.data.mixing import Mixed
from compress.demo import DEMO_OPTIONS
from compress.errors import DataError, GateError
from tests.api.test_pruning import Chain, batches, normal, seeded

CHECKPOINT = str(DEMO_OPTIONS["checkpoint"])
QUICK = [
    "--data", "digits", "--calibration-samples", "200", "--selection", "magnitude", "--refine", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with noise, labelled, and the same without labels."""
    folder = tmp_path_factory.mktemp("guards")
    batch = next(iter(open_data("digits?train=false").batches(120)))
    assert batch.labels is not None
    rng = np.random.default_rng(0)
    images = np.rint(255 * batch.inputs.numpy()).transpose(0, 2, 3, 1)
    images = np.clip(images + rng.normal(0, 30, images.shape), 0, 255).astype(np.uint8)
    np.savez(folder / "noisy.npz", images=images, labels=batch.labels.numpy())
    np.savez(folder / "bare.npz", images=images)
    np.savez(folder / "wide.npz", images=np.zeros((20, 9, 9, 1), np.uint8))
    np.savez(folder / "few.npz", images=images[:5])
    return folder


def run(*options: str) -> int:
    return main([CHECKPOINT, *QUICK, *([] if "--keep" in options else ["--keep", "50%"]), *options])


def test_guards_are_mixed_in_bounded_and_shown_apart(shifted: Path, tmp_path: Path) -> None:
    guards = ["--guard", f"noisy={shifted}/noisy.npz", "--guard", f"{shifted}/bare.npz", "--guard-weight", "40%"]
    assert run(*guards, "--guard-drop", "60", "--output", str(tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = report["guards"]
    assert (first["name"], second["name"], first["weight"]) == ("noisy", "guard2", 0.2)
    assert first["evaluation"]["samples"] == 120
    assert first["evaluation"]["figures"][0]["key"] == "top1"
    assert second["evaluation"]["figures"] == []
    assert [gate["name"] for gate in report["gates"]] == ["guard noisy: accuracy", "guard guard2: agreement"]
    assert [guard["samples"] for guard in report["inputs"]["data"]["guards"]] == [120, 120]
    fitting = report["inputs"]["data"]["fitting"]
    assert fitting["samples"] + fitting["held_back"] == 200
    for page in ("report.md", "report.html"):
        text = (tmp_path / "out" / page).read_text()
        assert "guard noisy: top-1" in text
        assert "guard guard2: agreement" in text


def test_a_guard_that_loses_too_much_fails_the_gate_and_nothing_is_written(
    shifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = ["--guard", f"noisy={shifted}/bare.npz", "--guard-drop", "noisy=0", "--keep", "20%"]
    assert run(*guard, "--output", str(tmp_path / "out")) == 3
    assert "Guard noisy: The agreement falls by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_of_a_guard_change_what_is_fitted(shifted: Path, tmp_path: Path) -> None:
    guard = ["--guard", f"noisy={shifted}/bare.npz", "--guard-drop", "100", "--guard-weight", "0.8"]
    assert run("--output", str(tmp_path / "without")) == 0
    assert run(*guard, "--output", str(tmp_path / "with")) == 0
    first, second = (compress.load(tmp_path / name) for name in ("without", "with"))
    same = [torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True)]
    assert not all(same)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--guard", "x=nowhere.npz"], 1, "--guard x"),
        (["--guard", "x=FOLDER/few.npz"], 1, "at least 8 samples"),
        (["--guard", "x=FOLDER/wide.npz"], 1, "--guard x"),
        (["--guard", "x=digits", "--guard", "x=digits"], 2, "two guards are called x"),
        (["--guard", "x=digits", "--guard-drop", "y=3"], 2, "names no guard: y"),
        (["--guard", "x=digits", "--guard-drop", "much"], 2, "--guard-drop"),
        (["--guard", "x=digits", "--guard-drop", "-1"], 2, "--guard-drop"),
        (["--guard", "x=digits", "--guard-weight", "1"], 2, "--guard-weight"),
    ],
)
def test_what_is_wrong_with_a_guard_is_one_line(
    shifted: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    assert run(*(text.replace("FOLDER", str(shifted)) for text in options), "--dry-run") == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said in line


def pruned(**options: Any) -> compress.PruneResult:
    return compress.prune(seeded(Chain), batches(), progress=False, **options)


def test_guards_are_bounded_from_python_too() -> None:
    far = [3 + normal(40, 6, seed=seed) for seed in range(20, 23)]
    result = pruned(keep=0.6, guards={"far": far}, guard_drop=99)
    (guard,) = result.report.guards
    assert (guard.name, guard.evaluation.samples, guard.most) == ("far", 120, 99)
    with pytest.raises(GateError, match="Guard far"):
        pruned(keep=0.3, guards={"far": far}, guard_drop={"far": 0})
    with pytest.raises(DataError, match="gives other inputs"):
        pruned(keep=0.6, guards={"far": [{"values": normal(9, 6)}]})


def test_a_guard_holds_a_bounded_search_back() -> None:
    """The search steps back to a milder cut where the guard alone loses too much."""
    inputs = normal(400, 6, seed=50)
    wanted = seeded(Chain)(inputs).argmax(1)

    def agreement(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(inputs).argmax(1) == wanted).double().mean())

    far = [3 * normal(60, 6, seed=seed) for seed in range(30, 34)]
    free = pruned(evaluate=agreement, max_drop=0.2)
    unbounded = pruned(evaluate=agreement, max_drop=0.2, guards={"far": far}, guard_drop=100)
    lost = 100 * unbounded.report.guards[0].evaluation.relative_output_change
    held = pruned(evaluate=agreement, max_drop=0.2, guards={"far": far}, guard_drop=0.6 * lost)
    assert held.report.cost.parameters.after > free.report.cost.parameters.after
    assert 100 * held.report.guards[0].evaluation.relative_output_change <= 0.6 * lost


def test_mixed_sources_read_in_any_order_and_keep_labels_where_all_have_them(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        np.savez(tmp_path / f"{name}.npz", inputs=np.full((3, 2), number) + np.arange(3)[:, None], labels=np.arange(3))
    np.savez(tmp_path / "c.npz", inputs=np.zeros((2, 2)))
    one, two, three = (open_data(str(tmp_path / f"{name}.npz")) for name in "abc")
    mixed = Mixed([one, two])
    order = np.array([5, 0, 3, 1])
    assert mixed.read_inputs(order)[:, 0].tolist() == [3, 0, 1, 1]
    assert mixed.labels is not None
    assert mixed.labels[order].tolist() == [2, 0, 0, 1]
    assert len(mixed.ordered_hashes) == mixed.sample_count == 6
    assert Mixed([one, three]).labels is None

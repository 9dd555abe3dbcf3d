"""Nothing silent: what must not be read without a warning gets one, what is sound gets none, and causes are named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.api.live import prepare_live
from compress.api.steps.cautions import caution_layers, caution_samples, caution_shift
from compress.api.steps.widths import make_problem
from compress.checkpoint.architecture import Architecture
from compress.cli import main
from compress.data import Preprocessing
from compress.data.arrays import ArraySource
from compress.data.extremes import find_extremes
from compress.errors import DataError
from compress.preparation import choose_preprocessing, note_preprocessing
from compress.progress import SilentProgress


def source(rows: np.ndarray) -> ArraySource:
    return ArraySource("own", None, rows, None, images=False)


def shifted(first: np.ndarray, second: np.ndarray) -> list[str]:
    return list(caution_shift(source(first.astype("f4")), source(second.astype("f4"))))


@pytest.mark.parametrize("shape", [(200, 5), (200, 3, 8, 8)])
def test_samples_of_one_distribution_are_not_called_unlike(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        assert shifted(draw.normal(size=shape), draw.normal(size=shape)) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x, lambda x: 60 * x + 120),
        (lambda x: x, lambda x: 1e20 * x),
        (lambda x: x, lambda x: x + np.array([0, 0, 3, 0, 0])),
        (lambda x: x * np.array([1, 1, 0, 1, 1]), lambda x: x + 1),
    ],
)
def test_a_shift_of_means_or_of_spreads_is_told(first: Any, second: Any) -> None:
    draw = np.random.default_rng(0)
    (told,) = shifted(first(draw.normal(size=(100, 5))), second(draw.normal(size=(100, 5))))
    assert told.startswith("warning: the calibration samples are unlike the evaluation samples")


def test_unknown_tokens_are_told() -> None:
    draw = np.random.default_rng(0)
    first, second = (draw.integers(low, low + 50, (40, 9)) for low in (0, 30))
    assert "evaluation's tokens" in next(iter(caution_shift(source(first), source(second))))
    assert list(caution_shift(source(first), source(first))) == []


def layer(
    name: str, units: int, kept: int, error: float | None, held_back: float | None, inherited: float | None = 0.0
) -> Any:
    fit = SimpleNamespace(error=error, held_back_error=held_back, inherited_error=inherited)
    return SimpleNamespace(name=name, units=units, kept=kept, fit=fit)


def test_single_units_and_parting_errors_are_told_of_cut_layers_only() -> None:
    whole = layer("whole", 9, 9, 0.0, 5.0)
    assert list(caution_layers([whole, layer("sound", 9, 4, 0.1, 0.12), layer("none", 9, 4, None, None)], 50)) == []
    told = list(caution_layers([layer("thin", 9, 1, 0.2, 0.2), layer("parted", 9, 4, 0.01, 0.5)], 50))
    assert told[0] == "warning: a single unit is left of thin."
    assert "parted, at most 0.50 beside 0.01" in told[1]
    assert len(told) == 2


def test_errors_that_grow_from_layer_to_layer_are_told_where_each_layer_is_allowed_its_own() -> None:
    layers = [layer("first", 9, 8, 0.04, 0.05), layer("second", 9, 9, 0.8, 0.8, 0.79), layer("none", 9, 4, 0, 0, None)]
    (told,) = caution_layers(layers, 50, within=True)
    assert "all units of second would err by up to 0.79" in told
    assert list(caution_layers(layers, 50)) == []


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small network of a stranger with calibration and evaluation data."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    torch.save(module.state_dict(), tmp_path / "net.pt")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cautioned_net.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))\n"
    )
    draw = np.random.default_rng(0)
    for name, count in (("data", 120), ("eval", 50)):
        inputs, labels = draw.normal(size=(count, 6)).astype("f4"), draw.integers(0, 4, count)
        np.savez(tmp_path / f"{name}.npz", inputs=inputs, **({"labels": labels} if name == "data" else {}))
    return {
        "checkpoint": str(tmp_path / "net.pt"),
        "arch": "cautioned_net:net",
        "data": str(tmp_path / "data.npz"),
        "keep": 6,
    }


def notes(given: dict[str, Any], **more: Any) -> list[str]:
    """The warnings of a dry run."""
    progress = SilentProgress()
    found = compress.run(compress.make_recipe({**given, **more}), progress, dry_run=True)
    assert list(found.report.notes) == progress.notes
    return [note for note in progress.notes if note.startswith("warning:")]


def test_a_sound_run_warns_of_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    assert notes(given, eval=str(tmp_path / "eval.npz")) == []


def test_few_samples_and_one_unit_are_told(given: dict[str, Any]) -> None:
    told = notes(given, calibration_samples=20, keep=1)
    assert "only 20 calibration samples" in told[0]
    assert any("a single unit is left of 0" in note for note in told)


def test_copies_of_samples_are_told_and_equal_ones_refused(given: dict[str, Any], tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(10, 6)).astype("f4")
    np.savez(tmp_path / "copies.npz", inputs=np.repeat(rows, 20, 0))
    assert "of 200 calibration samples only 10 are different" in notes(given, data=str(tmp_path / "copies.npz"))[0]
    np.savez(tmp_path / "equal.npz", inputs=np.repeat(rows[:1], 40, 0))
    with pytest.raises(compress.CompressError, match="all equal"):
        notes(given, data=str(tmp_path / "equal.npz"))


def test_samples_that_belong_together_are_told_and_held_back_together() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 64, generator=draw).repeat_interleave(3, 0) + 0.2 * torch.randn(240, 64, generator=draw)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    prepared, recipe = prepare_live(network, [rows], None, {"keep": 16}, SilentProgress(), "prune")
    problem = make_problem(prepared, recipe)
    assert problem.calibration.related == 240
    told = [note for note in caution_samples(prepared, problem) if "held back together" in note]
    assert told[0].startswith("warning: 240 of 240 calibration samples look like crops, frames or windows")
    fitting, held_back = (set((stream.indices // 3).tolist()) for stream in (problem.fitting, problem.held_back))
    assert len(held_back) == 8
    assert not fitting & held_back


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 5))


def test_a_sample_that_outweighs_all_others_is_left_out_and_told_of() -> None:
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    network, fresh = chain(), rows.flip(1)
    clean = compress.prune(network, [rows], keep=0.75, progress=False)
    rows[17, 2] = 1e20
    result = compress.prune(network, [rows], keep=0.75, progress=False)
    (told,) = [note for note in result.report.notes if "left out" in note]
    assert told.startswith("warning: calibration sample 17 is left out: numbers up to 1e+20 outweigh")
    errors = [(each.model(fresh) - network(fresh)).square().mean() for each in (clean, result)]
    assert errors[1] < 2 * errors[0]


def test_samples_of_zeros_and_a_tenth_of_large_ones_are_all_taken() -> None:
    rows = torch.zeros(200, 8)
    rows[:4] = 1e-3
    assert find_extremes(source(rows.numpy()), torch.arange(200), 64).numbers == ()
    assert find_extremes(source(rows[:, 0].numpy()), torch.arange(200), 64).numbers == ()
    rows = torch.randn(200, 8)
    rows[:30] *= 1e8
    assert find_extremes(source(rows.numpy()), torch.arange(200), 64).numbers == ()


def test_samples_that_make_the_outputs_no_numbers_are_named() -> None:
    rows = torch.randn(200, 8)
    rows[[17, 40], 2] = torch.nan
    with pytest.raises(DataError, match="calibration samples 17, 40 hold NaN or Inf, and so do the network's outputs"):
        compress.prune(chain(), [rows], keep=0.5, progress=False)


class Filling(nn.Module):
    """Puts zeros where numbers are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = chain()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layers(values.nan_to_num())
        return scores


def test_a_network_that_takes_missing_numbers_gets_them() -> None:
    rows = torch.randn(200, 8)
    rows[::3, 2] = torch.nan
    assert compress.prune(Filling(), [rows], keep=0.5, progress=False).report.layers[0].kept == 12


def test_evaluation_data_of_another_shape_is_refused_before_any_work(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "other.npz", inputs=np.ones((20, 7), "f4"))
    monkeypatch.setattr("compress.preparation.trace_network", None)
    with pytest.raises(compress.CompressError, match=r"--eval: the network runs on .* shape \(6,\), but not .* \(7,\)"):
        notes(given, eval=str(tmp_path / "other.npz"))


def test_evaluation_data_of_more_dimensions_are_refused_though_the_network_runs_on_them(
    given: dict[str, Any], tmp_path: Path
) -> None:
    np.savez(tmp_path / "other.npz", inputs=np.ones((20, 3, 6), "f4"), labels=np.zeros(20, int))
    with pytest.raises(compress.CompressError, match=r"'output' has 3 dimensions, on the others, of shape \(6,\), 2"):
        notes(given, eval=str(tmp_path / "other.npz"))


@pytest.mark.parametrize("option", ["data", "eval"])
def test_a_data_fault_names_the_option(given: dict[str, Any], option: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", x=np.ones((20, 6)))
    with pytest.raises(compress.CompressError, match=f"^--{option}: "):
        notes(given, **{option: str(tmp_path / "wrong.npz")})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"keep": 10**9}, "--keep 1000000000 keeps every unit: the widest selected layer, 0, has 12"),
        ({"keep": 0.999}, "--keep 0.999 keeps every unit"),
        ({"round_to": 1000}, "--round-to 1000 keeps every unit"),
        ({"memory": "1K", "keep": 11}, "more than --memory 1K"),
    ],
)
def test_what_leaves_every_layer_whole_is_named(given: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(compress.CompressError, match=words) as caught:
        notes(given, **more)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("options", "known", "how", "images", "words"),
    [
        ({}, Preprocessing((0.5,), (0.25,)), "recognised", True, "as published for own:net: --mean 0.5 --std 0.25"),
        ({}, None, "named", True, "not normalised"),
        ({"mean": (0.5,), "std": (0.25,)}, None, "named", True, None),
        ({}, Preprocessing((0.5,), (0.25,)), "recorded", True, None),
        ({}, None, "named", False, None),
    ],
)
def test_preprocessing_that_nobody_named_is_said(
    options: dict[str, Any], known: Preprocessing | None, how: str, images: bool, words: str | None
) -> None:
    rows = np.zeros((2, 4, 4, 1), np.uint8) if images else np.zeros((2, 4))
    recipe = compress.make_recipe({"checkpoint": "net.pt", **options})
    architecture, progress = Architecture("own:net", preprocessing=known, how=how), SilentProgress()
    preprocessing = choose_preprocessing(recipe, architecture)
    note_preprocessing(
        recipe, architecture, preprocessing, ArraySource("own", None, rows, None, images=images), progress
    )
    assert [words in note for note in progress.notes if words] == [True] * len(progress.notes)
    assert len(progress.notes) == (words is not None)


def test_the_last_line_tells_held_back_agreement_where_nothing_is_evaluated(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(given))
    assert main(["run", "--recipe", str(path), "--dry-run"]) == 0
    assert "% on 12 held-back samples." in capsys.readouterr().out

"""Budgets end to end on the packaged network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.demo import DEMO_OPTIONS
from compress.errors import GateError, RecipeError
from compress.report.model import RunReport
from compress.report.rows import headline
from tests.clocks import use_steady_clock
from tests.strange_networks import residual

BASE: dict[str, Any] = {**DEMO_OPTIONS, "calibration_samples": 500}


def report(**options: Any) -> RunReport:
    found = compress.run(compress.make_recipe({**BASE, "recover": "off", **options}), dry_run=True).report
    assert found is not None
    return found


@pytest.mark.parametrize("budgets", [{"macs": 0.5}, {"params": 0.2}, {"macs": 0.6, "params": 0.3}])
def test_the_cut_network_keeps_its_budgets_and_the_prediction_was_exact(budgets: dict[str, float]) -> None:
    found = report(**budgets)
    for name, key in (("macs", "macs"), ("params", "parameters")):
        before, after = getattr(found.cost, key)
        assert after / before == pytest.approx(found.search.predicted_costs[name], abs=1e-6)
        if name in budgets:
            assert after / before <= budgets[name] + 1e-9
    assert found.evaluation.drop_points < 3
    cut = [layer for layer in found.layers if layer.kept < layer.units]
    assert cut
    assert all(layer.certificate.relative_duality_gap <= 1e-6 for layer in cut)


def test_an_accuracy_bound_gives_the_largest_cut_that_held_back_samples_allow() -> None:
    found = report(max_drop=3.0, calibration_samples=1000)
    before, after = found.cost.parameters
    assert after < 0.5 * before
    trials = found.search.trials
    assert all(trial.held_back.samples == 100 for trial in trials)
    assert 1 <= found.evaluations <= 4
    assert found.evaluation.drop_points <= 3.0 + 1e-9


@pytest.mark.parametrize("budgets", [{}, {"macs": 0.5}])
def test_a_bound_that_no_held_back_samples_could_show_is_refused_before_any_work(budgets: dict[str, float]) -> None:
    with pytest.raises(GateError, match=r"^20 held-back samples tell 0\.00 ± .*--max-drop 0\.5: hold back more"):
        report(max_drop=0.5, calibration_samples=200, **budgets)


def test_widths_are_rounded_where_asked() -> None:
    found = report(macs=0.5, round_to=8)
    assert all(layer.kept % 8 == 0 or layer.kept == layer.units for layer in found.layers)


def test_an_impossible_budget_is_a_failed_gate_that_names_the_best(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"params 0\.0001 was asked for"):
        report(params=0.0001, output=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_budget_out_of_reach_of_the_layers_alone_names_what_cuts_streams_too() -> None:
    batches = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(32)
    with pytest.raises(GateError, match=r"least the layers allow.* With --couple a residual stream would be cut too"):
        compress.prune(residual().eval(), batches, macs=0.05, depth=False)
    with pytest.raises(GateError, match=r"least the layers allow") as fault:
        compress.prune(residual().eval(), batches, macs=0.001, depth=False, couple=True)
    assert "--couple" not in str(fault.value)


def test_a_width_rule_and_a_budget_contradict_each_other() -> None:
    with pytest.raises(RecipeError, match="keep"):
        report(keep=0.5, macs=0.5)


def test_the_error_form_at_zero_is_exact() -> None:
    found = report(error=0, layer=["classifier.2"])
    (layer,) = found.layers
    assert layer.certificate.form.startswith("exact")
    assert layer.fit.error < 2e-3


def test_a_latency_budget_is_searched_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    use_steady_clock(monkeypatch)
    found = report(latency=0.7)
    assert all(one.measured_ms == pytest.approx(one.predicted_ms) for one in found.search.times)
    costs = found.search.predicted_costs
    assert costs["latency"] <= 0.7 + 1e-9
    before, after = found.cost.macs
    assert after < before


def test_recovery_is_reported_apart() -> None:
    found = report(keep=3, recover=20)
    tuning = found.finetune
    assert (tuning.method, tuning.length) == ("distillation", 20)
    assert found.evaluations == 2
    divergences = dict(tuning.divergences)
    assert divergences[tuning.kept] < divergences[0]  # the nearest of those that no figure calls worse
    plain = report(keep=3)
    assert plain.finetune is None
    assert tuning.evaluation_before.compressed == plain.evaluation.compressed


def test_a_cut_under_a_budget_recovers_unless_told_not_to() -> None:
    assert report(macs=0.4, recover="auto", calibration_samples=200).finetune is not None
    assert report(keep=5, recover="auto", calibration_samples=200).finetune is None


def test_fine_tuning_with_labels_is_reported_apart() -> None:
    found = report(keep=4, finetune="pathprox", training={"epochs": 4, "lr": 0.003, "batch_size": 16})
    tuning = found.finetune
    losses = [row.validation_loss for row in tuning.curve]
    assert len(losses) == 4
    assert tuning.kept == 1 + losses.index(min(losses))
    assert min(losses) < tuning.held_back_before.loss
    assert tuning.evaluation_before.compressed == report(keep=4).evaluation.compressed
    assert found.evaluation.compressed.loss < tuning.evaluation_before.compressed.loss
    assert "before 4 epochs of pathprox" in headline(found)


def test_a_fine_tuning_that_gains_nothing_leaves_the_cut_network() -> None:
    found = report(keep=3, finetune="sgd", training={"epochs": 1, "lr": 10.0, "momentum": 0.0})
    assert found.finetune.kept == 0
    assert found.evaluation.compressed == found.finetune.evaluation_before.compressed


def test_a_recovery_that_cannot_be_made_is_left_out_with_a_note_unless_steps_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("derivative for this operation is not implemented")

    monkeypatch.setattr("compress.api.steps.tuning.recover", refuse)
    found = report(macs=0.4, recover="auto", calibration_samples=200)
    assert found.finetune is None
    assert any("recovery is left out: derivative" in note for note in found.notes)
    with pytest.raises(RuntimeError, match="derivative"):
        report(macs=0.4, recover=3, calibration_samples=200)

"""A layer whose moments or whose problem are no good stays as it is, with the reason, while the rest is cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.compression import sweep as sweeping
from compress.errors import NothingToCompressError, SolverError
from compress.report.model import RunReport

RULES: list[dict[str, Any]] = [
    {},
    {"macs": 0.6},
    {"keep": 0.5},
    {"penalty": 0.05},
    {"error": 0.0},
    {"macs": 0.6, "refine": 2},
]


class TwoBranches(nn.Module):
    """A sound branch, and one whose activations are NaN or infinite where the first input is negative."""

    def __init__(self, ill: str) -> None:
        super().__init__()
        self.ill = ill
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.side, self.joined = nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, values: Tensor) -> Tensor:
        sound = self.head(torch.relu(self.second(torch.relu(self.first(values)))))
        wrong = values[:, :1].log() if self.ill == "nan" else (values[:, :1] * -1e4).exp()
        side = self.joined(torch.relu(self.side(values * wrong)))
        return sound + torch.nan_to_num(side, 0.0, 0.0, 0.0)


def redundant(module: nn.Module) -> nn.Module:
    """The same with every second unit of the hidden layers a multiple of the one before it."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and layer.out_features > 4:
                layer.weight[1::2] = 2 * layer.weight[::2]
                layer.bias[1::2] = 2 * layer.bias[::2]
    return module


def samples(count: int = 400) -> Tensor:
    values = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    values[:, 0] = values[:, 0].abs() + 0.1
    values[50::7, 0] *= -1  # the first samples, on which the network is tried, are sound
    return values


def skipped(report: RunReport) -> dict[str, str]:
    """Reasons by layer, but for those that are outputs."""
    return {layer.name: layer.reason for layer in report.skipped if "output" not in layer.reason}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("ill", ["nan", "inf"])
def test_a_branch_that_is_not_finite_is_skipped_and_the_others_are_cut(ill: str, rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = redundant(TwoBranches(ill)).eval()
    found = compress.prune(module, samples(), **rule)
    assert set(skipped(found.report)) == {"side"}
    assert "NaN or Inf" in skipped(found.report)["side"]
    assert {layer.name for layer in found.report.layers} == {"first", "second"}
    assert any(layer.kept < layer.units for layer in found.report.layers)
    assert found.model.side.weight.equal(module.side.weight)
    assert torch.isfinite(found.model(samples())).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_layer_whose_solver_fails_is_skipped_and_the_others_are_cut(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = redundant(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)))
    solve = sweeping.solve_layer

    def fails_once(layer: Any, decision: Any) -> Any:
        if layer.group.name == "0":
            raise SolverError("no pivot is left.")
        return solve(layer, decision)

    monkeypatch.setattr(sweeping, "solve_layer", fails_once)
    found = compress.prune(module.eval(), samples(), **rule)
    assert skipped(found.report) == {"0": "no pivot is left"}
    assert [layer.name for layer in found.report.layers] == ["2"]


def test_a_factorisation_that_fails_is_told_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

    def singular(*_: Any, **__: Any) -> Any:
        return torch.linalg.inv(torch.zeros(2, 2))

    monkeypatch.setattr(sweeping, "solve_layer", singular)
    with pytest.raises(NothingToCompressError, match="0: a factorisation of its moments failed"):
        compress.prune(module, samples())


def test_a_skipped_layer_is_a_row_of_every_form_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.cli.showing.display import show_run

    torch.manual_seed(0)
    found = compress.prune(redundant(TwoBranches("nan")).eval(), samples())
    folder = found.save(tmp_path / "out")
    assert "skipped: NaN or Inf" in (folder / "report.md").read_text(encoding="utf-8")
    assert "NaN or Inf" in (folder / "report.html").read_text(encoding="utf-8")
    show_run(found.report, None)
    assert "skipped side (10 units): NaN or Inf" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rule", [{}, {"macs": 0.7}], ids=str)
def test_a_layer_that_never_fires_is_cut_to_one_unit_and_the_outputs_stay(rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        module[2].bias.fill_(-1e3)
    found = compress.prune(module, samples(), **rule)
    assert found.model(samples()).allclose(module(samples()), atol=1e-6)
    assert found.model[2].out_features < 12


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_layer_behind_a_dead_one_has_nothing_to_explain_and_the_outputs_stay(rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    widths = (8, 16, 16, 12, 4)
    layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(widths)]
    module = nn.Sequential(*layers[:-1], layers[-1][0]).eval()
    with torch.no_grad():
        module[1][0].bias.fill_(-1e3)
    found = compress.prune(module, samples(), **rule)
    assert found.model(samples()).allclose(module(samples()), atol=1e-6)
    assert {layer.name: layer.kept for layer in found.report.layers}["2.0"] < 12

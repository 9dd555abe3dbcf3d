"""`--allow-bias`: a constant for consumers that have none, in the artifact too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compress


def bias_free() -> nn.Module:
    """A convolution and a linear map without biases."""
    return nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 24, 1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 4, bias=False),
    )


def normalised() -> nn.Module:
    """The convolution without a bias has a batch norm behind it."""
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def run(folder: Path, build: str, **options: Any) -> Any:
    """Compress weights of a seed on seeded data.

    Output weights are positive: what the removed units give on average adds up, and few units cannot stand in for it.
    """
    torch.manual_seed(1)
    module = globals()[build]()
    module[2].weight.data.abs_()
    save_file(module.state_dict(), folder / "weights.safetensors")
    generator = np.random.default_rng(0)
    for name, count in (("train", 256), ("test", 128)):
        np.savez(folder / f"{name}.npz", inputs=generator.standard_normal((count, 4, 6, 6)).astype(np.float32))
    recipe = {
        "checkpoint": str(folder / "weights.safetensors"),
        "arch": f"tests.units.test_biases:{build}",
        "data": str(folder / "train.npz"),
        "eval": str(folder / "test.npz"),
        "output": str(folder / "out"),
        "force": True,
        **({} if "params" in options else {"keep": 0.25}),
        **options,
    }
    return compress.run(compress.make_recipe(recipe), dry_run="output" not in options)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    return {allowed: run(tmp_path_factory.mktemp("run"), "bias_free", allow_bias=allowed) for allowed in (False, True)}


def test_a_bias_lowers_the_error_on_samples_that_no_fit_has_seen(results: dict[bool, Any]) -> None:
    without, with_bias = (results[allowed].report.evaluation.relative_output_change for allowed in (False, True))
    assert with_bias < 0.9 * without


def test_without_the_option_no_parameter_is_added(results: dict[bool, Any]) -> None:
    assert results[False].report.added_biases == ()
    assert {name for name, _ in results[False].module.named_parameters()} == {
        name for name, _ in bias_free().named_parameters()
    }


def test_the_report_says_which_layers_gained_a_bias_and_counts_it(results: dict[bool, Any]) -> None:
    found = results[True]
    assert found.report.added_biases == ("2.bias", "6.bias")
    assert any("got a bias: 2, 6" in note for note in found.report.notes)
    before, after = found.report.cost.parameters
    assert before == sum(value.numel() for value in bias_free().parameters())
    assert after == sum(value.numel() for value in found.module.parameters())
    assert [tuple(found.module[layer].bias.shape) for layer in (2, 6)] == [(6,), (4,)]


def test_a_batch_norm_that_takes_the_constant_leaves_nothing_to_add(tmp_path: Path) -> None:
    assert run(tmp_path, "normalised", allow_bias=True).report.added_biases == ()


def test_a_budget_counts_the_biases_against_the_original(tmp_path: Path) -> None:
    before, after = run(tmp_path, "bias_free", allow_bias=True, params=0.5).report.cost.parameters
    assert after <= 0.5 * before


def test_the_artifact_loads_with_its_biases_and_can_be_cut_again(tmp_path: Path) -> None:
    found = run(tmp_path, "bias_free", allow_bias=True, output=str(tmp_path / "first"))
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(compress.load(tmp_path / "first", trust_code=True)(x), found.module(x))
    assert found.report.verification.reload_deviation <= 1e-6
    options = {
        "checkpoint": str(tmp_path / "first"),
        "data": str(tmp_path / "train.npz"),
        "keep": 0.5,
        "trust_code": True,
    }
    again = compress.run(compress.make_recipe({**options, "output": str(tmp_path / "second")}))
    assert again.report.added_biases == ()
    assert compress.load(tmp_path / "second", trust_code=True)[6].bias.shape == (4,)


class Filters(nn.Module):
    """Fixed filters under a name of their own, with an empty place for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", torch.linspace(-1, 1, 64).reshape(8, 8))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.filters, self.bias)


def test_an_empty_place_for_a_bias_beside_no_weight_is_left_alone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Filters(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4, bias=False))

    network = build()
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    result = compress.prune(network, [rows], keep="50%", allow_bias=True)
    result.save(tmp_path / "half")
    again = compress.load(tmp_path / "half", model=build())
    torch.testing.assert_close(again(rows), result.model(rows))

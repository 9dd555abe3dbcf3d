"""Weight norm, spectral norm, masks and parametrisations: written out as plain weights, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import compress
from compress.checkpoint.fitting import load_weights
from compress.checkpoint.parametrisations import materialise
from compress.errors import CheckpointError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
X = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(5))


class Squashed(nn.Module):
    """A user's own parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


class OnlyInTraining(nn.Module):
    """A parametrisation that has no value in evaluation."""

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("there is no weight in evaluation")
        return weight


def masked(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


def registered(kind: type[nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def register(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", kind())
        return layer

    return register


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": utils.weight_norm,
    "old weight_norm over all": lambda layer: utils.weight_norm(layer, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "masked": masked,
    "own": registered(Squashed),
}


def build(way: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    around = WAYS[way]
    return nn.Sequential(
        around(nn.Conv2d(2, 12, 3, padding=1)),
        nn.ReLU(),
        around(nn.ConvTranspose2d(12, 10, 3)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        around(nn.Linear(10, 4)),
    ).eval()


@pytest.mark.parametrize("way", WAYS)
def test_a_network_whose_weights_are_written_out_computes_the_same(way: str) -> None:
    module = build(way)
    with torch.no_grad():
        wanted = module(X)
        names = materialise(module)
        found = module(X)
    assert names == (() if way == "plain" else ("0.weight", "2.weight", "6.weight"))
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in build("plain").named_parameters()}
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("stored", ["plain", "weight_norm", "old weight_norm", "old weight_norm over all", "masked"])
@pytest.mark.parametrize("built", ["plain", "weight_norm", "old weight_norm", "own"])
def test_weights_load_whichever_convention_the_file_and_the_network_follow(stored: str, built: str) -> None:
    original, other = build(stored), build(built, seed=1)
    load_weights(other, original.state_dict())
    with torch.no_grad():
        wanted, found = original(X), other(X)
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


def weight_normalised() -> nn.Module:
    return build("weight_norm")


def old_weight_normalised() -> nn.Module:
    return build("old weight_norm")


@pytest.mark.parametrize("name", ["weight_normalised", "old_weight_normalised"])
def test_a_weight_normalised_checkpoint_is_cut_and_the_artifact_loads_again(name: str, tmp_path: Path) -> None:
    module = globals()[name]()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    inputs = np.random.default_rng(0).standard_normal((64, 2, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs)
    options = {
        "checkpoint": str(tmp_path / "weights.safetensors"),
        "arch": f"tests.checkpoint.test_parametrisations:{name}",
        "data": str(tmp_path / "data.npz"),
        "keep": 0.5,
        "output": str(tmp_path / "out"),
    }
    found = compress.run(compress.make_recipe(options))
    assert [layer.kept for layer in found.report.layers] == [6, 5]
    assert found.report.verification.reload_deviation <= 1e-6  # in a fresh process
    assert any("0.weight, 2.weight, 6.weight" in note for note in found.report.notes)
    module = globals()[name]()
    module(X)  # the older one then holds a weight that it computed
    for loaded in (
        compress.load(tmp_path / "out", trust_code=True),
        compress.load(tmp_path / "out", model=module),
    ):
        with torch.inference_mode():
            assert torch.equal(loaded(X), found.module(X))


def test_a_weight_without_a_value_in_evaluation_is_refused_in_one_line() -> None:
    layer = registered(OnlyInTraining)(nn.Linear(3, 2))
    with pytest.raises(UnsupportedError, match=r"`0\.weight` cannot be written out: there is no weight in evaluation$"):
        materialise(nn.Sequential(layer))


class Positions(nn.Module):
    """A network that keeps its position numbers out of the state dict, as today's transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(6)[None], persistent=False)
        self.table = nn.Embedding(6, 4)

    def forward(self, values: Tensor) -> Tensor:
        return values + self.table(self.position_ids)


def test_a_file_with_buffers_that_the_network_computes_itself_loads() -> None:
    module = Positions()
    state = {**module.state_dict(), "position_ids": torch.arange(6)[None]}
    load_weights(module, state)
    with pytest.raises(CheckpointError, match="position_ids"):
        load_weights(module, {**state, "position_ids": torch.arange(6)[None] + 1})

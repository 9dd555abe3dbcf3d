"""Batch norms folded into the layers in front of them: which, that outputs stay, and that what is written reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress.api.steps import forms as steps
from compress.checkpoint.removed import remove_modules
from compress.compression.searching import search
from compress.preparation import trace
from compress.units.folding import Foldable, find_foldable, folded
from compress.units.network import Network
from compress.units.surgery import module_outputs, narrow, relative_deviation
from tests.networks import randomise


class Odd(nn.Module):
    """Batch norms that can be folded, and others: behind a sum, a value read twice, a hook, or called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.plain_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks, self.blocks_norm = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False)
        self.summed, self.summed_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.twice, self.twice_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.again, self.shared_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.hooked, self.hooked_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.linear, self.linear_norm = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_norm(self.plain(x)).relu()
        x = self.blocks_norm(self.blocks(x)).relu()
        x = self.summed_norm(self.summed(x) + x).relu()
        y = self.twice(x)
        x = self.twice_norm(y) + y
        x = self.shared_norm(self.shared_norm(self.again(x)))
        x = self.hooked_norm(self.hooked(x)).relu()
        return self.linear_norm(self.linear(x.mean((2, 3))))


@pytest.fixture(scope="module")
def network() -> Network:
    return trace(randomise(Odd()), (torch.randn(2, 3, 8, 8),), couple=False)


def test_only_batch_norms_right_behind_a_layer_of_their_own_are_folded(network: Network) -> None:
    pairs = [("plain", "plain_norm"), ("blocks", "blocks_norm"), ("linear", "linear_norm")]
    assert find_foldable(network) == tuple(Foldable(*pair) for pair in pairs)


def test_a_folded_network_gives_what_it_gave_and_is_rebuilt_from_plain_data(network: Network) -> None:
    folds = find_foldable(network)
    small = folded(narrow(network.module, {}, ()), folds)
    inputs = (torch.randn(4, 3, 8, 8),)
    wanted = module_outputs(network.module, inputs)
    assert relative_deviation(wanted, module_outputs(small.module, inputs)) < 1e-5
    assert {type(small.module.get_submodule(fold.norm)) for fold in folds} == {nn.Identity}
    assert small.removed == {fold.norm: {"through": True} for fold in folds}
    assert small.shapes["plain.bias"] == [8]
    assert not any(name.startswith("plain_norm") for name in small.shapes)
    fresh = Odd()
    remove_modules(fresh, small.removed, {})
    assert isinstance(fresh.plain_norm, nn.Identity)


def test_layers_that_are_gone_already_are_left_out(network: Network) -> None:
    before = narrow(network.module, {}, ())
    gone = {"plain": {"rank": 2}, "blocks_norm": {"along": [], "outputs": 0}}
    after = folded(before.__class__(before.module, {}, {}, dict(gone)), find_foldable(network))
    assert after.removed == {**gone, "linear_norm": {"through": True}}


class NormAct(nn.BatchNorm2d):
    """With an activation behind, and one that doubles what it gives."""

    def __init__(self, channels: int, *, twice: bool = False, learned: bool = False) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels) if learned else nn.ReLU6()
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(super().forward(x))
        return 2 * x if self.twice else x


def test_what_a_derived_batch_norm_calls_behind_it_stays() -> None:
    norms = NormAct(6), NormAct(5, twice=True), NormAct(4, learned=True)
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)
    pairs = [each for pair in zip(layers, norms, strict=True) for each in pair]
    module = randomise(nn.Sequential(*pairs, nn.Flatten(), nn.Linear(144, 3)))
    network = trace(module, (torch.randn(2, 3, 8, 8),), couple=False)
    folds = find_foldable(network)
    assert folds == (Foldable("0", "1"),)  # not what does more, nor what has other tensors
    small = folded(narrow(network.module, {}, ()), folds)
    inputs = (torch.randn(4, 3, 8, 8),)
    deviation = relative_deviation(module_outputs(network.module, inputs), module_outputs(small.module, inputs))
    assert deviation < 1e-5
    assert isinstance(small.module[1].act, nn.ReLU6)


class Same(nn.Conv2d):
    """Padded to the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (0, 2, 0, 2)), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Its weight is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight / self.weight.std(), self.bias)


class Biasless(nn.Conv2d):
    """Reads no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight)


def test_derived_layers_take_in_batch_norms_where_they_are_maps_by_their_own_weights() -> None:
    layers = Same(3, 6, 3, bias=False), Standardised(6, 5, 1), Biasless(5, 4, 1, bias=False)
    pairs = [each for layer in layers for each in (layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())]
    module = randomise(nn.Sequential(*pairs, nn.Flatten(), nn.Linear(256, 3)))
    network = trace(module, (torch.randn(2, 3, 8, 8),), couple=False)
    folds = find_foldable(network)
    assert folds == (Foldable("0", "1"),)
    small = folded(narrow(network.module, {}, ()), folds)
    inputs = (torch.randn(4, 3, 8, 8),)
    assert relative_deviation(module_outputs(network.module, inputs), module_outputs(small.module, inputs)) < 1e-5
    assert type(small.module[0]) is Same


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.second, self.second_norm = nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(self.first(x)).relu()
        return self.head(self.second_norm(self.second(x)).relu().mean((2, 3)))


def pruned(**options: Any) -> compress.PruneResult:
    batches = [torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    return compress.prune(randomise(Small()), batches, progress=False, **options)


def norms_of(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.mark.parametrize("recover", ["off", 5])
def test_folding_changes_no_output_and_is_written(tmp_path: Path, recover: Any) -> None:
    with_norms, without = (pruned(macs=0.7, recover=recover, fold=choice) for choice in ("off", "on"))
    assert (norms_of(with_norms.model), norms_of(without.model)) == (2, 0)
    inputs = torch.randn(8, 3, 12, 12)
    torch.testing.assert_close(without.model(inputs), with_norms.model(inputs), rtol=1e-4, atol=1e-5)
    assert any("2 batch norms folded" in note for note in without.report.notes)
    assert not any("folded" in note for note in with_norms.report.notes)
    without.save(tmp_path / "out")
    loaded = compress.load(tmp_path / "out", model=randomise(Small()))
    assert norms_of(loaded) == 0
    assert torch.equal(loaded(inputs), without.model(inputs))


@pytest.mark.parametrize(("share", "left"), [(0.8, 0), (1.02, 2)])
def test_under_a_budget_of_time_batch_norms_go_where_that_saves_some(
    monkeypatch: pytest.MonkeyPatch, share: float, left: int
) -> None:
    timed: list[int] = []

    def time_forms(problem: Any, forms: Any) -> list[float]:
        assert [len(form.folds) for form in forms] in ([0, 2], [2])
        return [1.0, share][-len(forms) :]

    def time_cut(problem: Any, kept: Any, ranks: Any = None) -> float:
        timed.append(len(problem.form.folds))
        return 0.5

    monkeypatch.setattr(steps, "time_forms", time_forms)
    monkeypatch.setattr(search, "time_cut", time_cut)
    found = pruned(latency=0.6, recover="off", in_place="off", memory_format="keep")
    assert norms_of(found.model) == left
    assert set(timed) == {2 - left}  # cut networks are timed as they will be written


def test_other_budgets_leave_batch_norms_where_they_are() -> None:
    assert norms_of(pruned(macs=0.7, recover="off").model) == 2

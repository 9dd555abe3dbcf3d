"""The form of a written network: activations in place, convolutions channels last; outputs stay, and it reloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.api.steps import forms as steps
from compress.checkpoint.execution import Execution, convolution_weights, has_layout, is_channels_last
from compress.compression.searching import search
from compress.errors import NothingToCompressError, OutputError, SurgeryError
from compress.preparation import trace
from compress.units.forms import Form, can_be_channels_last, find_in_place
from compress.units.network import Network
from compress.units.surgery import module_outputs, narrow
from tests.networks import randomise


class Odd(nn.Module):
    """Activations that may write over what they read, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.norm, self.behind_norm = nn.BatchNorm2d(8), nn.ReLU6()
        self.behind_sum, self.already = nn.SiLU(), nn.ReLU(inplace=True)
        self.of_input, self.of_part, self.read_twice = nn.ReLU(), nn.ReLU(), nn.Hardtanh()
        self.called_twice, self.hooked = nn.ReLU(), nn.ReLU()
        self.hooked.register_forward_hook(lambda *_: None)
        self.left, self.right, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(self.stem(self.of_input(x)))
        y = self.behind_norm(self.norm(y))
        y = self.behind_sum(self.left(y) + y)
        z = self.right(y)
        y = self.read_twice(z) + z
        y = self.already(self.left(y)) + x.mean()
        y = torch.cat([self.of_part(y[:, :4]), y[:, 4:]], 1)
        y = self.called_twice(self.right(self.called_twice(self.left(y))))
        return self.head(self.hooked(self.left(y)).mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    return trace(randomise(Odd()), (torch.randn(2, 3, 8, 8),), couple=False)


def test_only_values_that_nothing_else_reads_are_written_over(network: Network) -> None:
    assert find_in_place(network) == ("plain", "behind_norm", "behind_sum")


def test_a_network_in_another_form_gives_what_it_gave(network: Network) -> None:
    form = Form(execution=Execution(find_in_place(network), channels_last=True))
    small = form.of(narrow(network.module, {}, ()))
    inputs = (torch.randn(4, 3, 8, 8),)
    torch.testing.assert_close(module_outputs(small.module, inputs), module_outputs(network.module, inputs))
    assert is_channels_last(small.module)
    assert small.module.behind_sum.inplace
    assert not network.module.behind_sum.inplace  # the network itself is as it was
    assert small.execution == form.execution
    assert Execution.from_dict(small.execution.as_dict()) == small.execution


def test_activations_that_went_with_their_block_are_left_out(network: Network) -> None:
    before = narrow(network.module, {}, ())
    gone = before.__class__(before.module, {}, {}, {"plain": {"along": [], "outputs": 0}})
    form = Form(execution=Execution(("plain", "behind_sum")))
    assert form.of(gone).execution.in_place == ("behind_sum",)


class Viewed(nn.Module):
    """Feature maps are taken for rows by where they lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().view(x.shape[0], -1))


@pytest.mark.parametrize(
    ("module", "can"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), True),
        (nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(864, 4)), True),
        (Viewed(), False),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), False),  # maps are given, of another layout
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)), False),
    ],
)
def test_convolutions_have_their_channels_last_where_nothing_else_changes(module: nn.Module, can: bool) -> None:
    shape = (2, 3, 8, 8, 8) if isinstance(next(module.children()), nn.Conv3d) else (2, 3, 8, 8)
    assert can_be_channels_last(trace(randomise(module), (torch.randn(shape),), couple=False)) == can


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.first_act = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        self.second, self.second_act = nn.Conv2d(12, 8, 3), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second_act(self.second(self.first_act(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


ASKED = {"in_place": "on", "memory_format": "channels_last"}


def pruned(module: nn.Module | None = None, **options: Any) -> compress.PruneResult:
    batches = [torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    return compress.prune(module or randomise(Small()), batches, progress=False, recover="off", **options)


def test_the_form_is_written_and_carried_on(tmp_path: Path) -> None:
    plain, other = pruned(macs=0.7), pruned(macs=0.7, **ASKED)
    inputs = torch.randn(8, 3, 12, 12)
    torch.testing.assert_close(other.model(inputs), plain.model(inputs), rtol=1e-4, atol=1e-5)
    assert (is_channels_last(plain.model), is_channels_last(other.model)) == (False, True)
    assert any("2 activations in place, convolutions laid out channels last" in note for note in other.report.notes)
    other.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/config.json").read_text())
    assert manifest["execution"] == {"memory_format": "channels_last", "in_place": ["first_act", "second_act"]}
    loaded = compress.load(tmp_path / "out", model=randomise(Small()))
    assert is_channels_last(loaded)
    assert loaded.first_act.inplace
    assert torch.equal(loaded(inputs), other.model(inputs))


def test_a_network_with_its_channels_last_stays_so(tmp_path: Path) -> None:
    given = randomise(Small()).to(memory_format=torch.channels_last)
    found = pruned(given, macs=0.6, fold="on")
    assert {has_layout(weight) for weight in convolution_weights(found.model)} == {True}
    assert not any("channels last" in note for note in found.report.notes)
    found.save(tmp_path / "out")
    assert is_channels_last(compress.load(tmp_path / "out", model=randomise(Small())))


def test_a_network_with_its_channels_last_can_have_nothing_to_cut() -> None:
    given = randomise(Small()).to(memory_format=torch.channels_last)
    with pytest.raises(NothingToCompressError):
        pruned(given, error=0.0)


@pytest.mark.parametrize(("share", "taken"), [(0.8, True), (1.02, False)])
def test_under_a_budget_of_time_a_form_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, share: float, taken: bool
) -> None:
    timed: list[Form] = []

    def time_cut(problem: Any, kept: Any, ranks: Any = None) -> float:
        timed.append(problem.form)
        return 0.5

    monkeypatch.setattr(steps, "time_forms", lambda problem, forms: [1.0, share][-len(forms) :])
    monkeypatch.setattr(search, "time_cut", time_cut)
    found = pruned(latency=0.6)
    assert is_channels_last(found.model) == found.model.first_act.inplace == taken
    assert found.report.cost.macs.after < found.report.cost.macs.before
    assert {form.channels_last for form in timed} == {taken}  # cut networks are timed as they will be written


def test_a_budget_that_the_form_keeps_costs_no_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "time_forms", lambda problem, forms: [1.0, 0.7][-len(forms) :])
    module = randomise(Small())
    found = pruned(module, latency=0.8)
    inputs = torch.randn(8, 3, 12, 12)
    torch.testing.assert_close(found.model(inputs), module(inputs), rtol=1e-4, atol=1e-5)
    assert found.report.cost.macs.after == found.report.cost.macs.before
    assert any("kept by the network's form alone" in note for note in found.report.notes)
    found.save(tmp_path / "out")
    assert is_channels_last(compress.load(tmp_path / "out", model=randomise(Small())))


def test_other_budgets_leave_the_form_as_it_is() -> None:
    model = pruned(macs=0.7).model
    assert not is_channels_last(model)
    assert not model.first_act.inplace


def test_what_cannot_be_is_said() -> None:
    module = randomise(nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.Tanh(), nn.Linear(16, 4)))
    notes = pruned(module, keep=0.5, **ASKED).report.notes
    assert any(note.startswith("--in-place: no activation") for note in notes)
    assert any(note.startswith("--memory-format: the network has no convolutions") for note in notes)


@pytest.mark.parametrize(
    ("entry", "fault", "words"),
    [
        ({"in_place": ["nowhere"]}, SurgeryError, "no module `nowhere`"),
        ({"in_place": ["first"]}, SurgeryError, r"`first` \(Conv2d\) cannot work in place"),
        ({"memory_format": "upside_down"}, OutputError, "execution.memory_format"),
    ],
)
def test_a_damaged_entry_is_refused(tmp_path: Path, entry: dict[str, Any], fault: type[Exception], words: str) -> None:
    pruned(macs=0.7, **ASKED).save(tmp_path / "out")
    (tmp_path / "out/SHA256SUMS").unlink()
    manifest = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**manifest, "execution": entry}))
    with pytest.raises(fault, match=words):
        compress.load(tmp_path / "out", model=randomise(Small()))

"""Networks that a program holds: any module, any iterable of batches, any measure, nothing on disk unless asked."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compress
from compress.artifact.checksums import write_checksums
from compress.errors import (
    CheckpointError,
    CompressError,
    DataError,
    GateError,
    NothingToCompressError,
    OutputError,
    UnsupportedError,
)
from compress.progress import SilentProgress


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.layers(values)
        return found


class Detector(nn.Module):
    """Two inputs by keyword, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read = nn.Conv2d(1, 12, 3), nn.Linear(4, 12)
        self.scores, self.boxes = nn.Linear(24, 3), nn.Linear(24, 4)

    def forward(self, image: Tensor, *, features: Tensor) -> dict[str, Tensor]:
        seen = torch.relu(self.look(image)).mean((2, 3))
        both = torch.cat([seen, torch.relu(self.read(features))], 1)
        return {"scores": self.scores(both), "boxes": self.boxes(both)}


def batches(count: int = 6) -> list[Tensor]:
    return [normal(32, 6, seed=seed) for seed in range(count)]


@pytest.fixture(scope="module")
def pruned() -> compress.PruneResult:
    return compress.prune(seeded(Chain), batches(), macs=0.6, progress=False)


def test_the_result_is_smaller_and_of_the_same_class(pruned: compress.PruneResult) -> None:
    before, after = seeded(Chain), pruned.model
    assert type(after) is Chain
    assert not after.training
    counts = [sum(tensor.numel() for tensor in net.parameters()) for net in (before, after)]
    assert counts[1] < counts[0]
    assert pruned.report.cost.parameters == tuple(counts)
    assert "parameters" in repr(pruned)
    assert "<iframe" in pruned._repr_html_()


def test_the_given_module_is_not_changed() -> None:
    module = seeded(Chain).train()
    state = copy.deepcopy(module.state_dict())
    compress.prune(module, batches(), keep=0.5, progress=False)
    assert module.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_module_with_computed_weights_works_after_it_was_pruned(normed: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(normed(nn.Linear(8, 24)), nn.ReLU(), nn.Linear(24, 4)).eval()
    values = torch.randn(64, 8)
    before = module(values)
    for _ in range(2):  # the copy that is cut shares torch's class with the original
        compress.prune(module, values, keep=0.5, recover="off", progress=False)
    assert module(values).equal(before)
    assert nn.utils.parametrize.is_parametrized(module[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_forward_left_in_the_module_do_not_keep_it_from_being_copied() -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 12)), nn.ReLU(), nn.Linear(12, 2))
    with torch.enable_grad():
        net(torch.randn(2, 6))
    assert compress.prune(net, [torch.randn(50, 6)], keep="50%").report.layers[0].kept == 6


class TimeFirst(nn.Module):
    """(B, T, 6) to scores (T, B, 4), as losses of sequences take them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.out(torch.relu(self.hidden(x))).transpose(0, 1)
        return scores


def test_an_output_with_the_samples_second_is_compared_sample_by_sample(tmp_path: Path) -> None:
    batches = [torch.randn(size, 5, 6) for size in (16, 16, 7)]
    result = compress.prune(TimeFirst(), batches, test=[torch.randn(30, 5, 6)], macs=0.6)
    assert result.report.evaluation is not None
    assert 0 < result.report.evaluation.relative_output_change < 1
    result.save(tmp_path / "out")
    again = compress.load(tmp_path / "out", model=TimeFirst())
    torch.testing.assert_close(again(batches[0]), result.model(batches[0]))


class Mixed(nn.Module):
    """Computes its first layer in float64 and the rest in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 24).double(), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, values: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(values.double())).float())))


def test_a_network_of_two_precisions_is_verified_in_the_coarser() -> None:
    module = seeded(Mixed)
    found = compress.prune(module, torch.randn(64, 8), keep=0.5, recover="off", progress=False)
    assert found.model.first.weight.dtype == torch.float64
    assert found.model.second.out_features == 8


def test_a_network_of_two_precisions_is_written_and_loaded_in_both(tmp_path: Path) -> None:
    found = compress.prune(seeded(Mixed), torch.randn(64, 8), keep=0.5, recover="off", progress=False)
    values = torch.randn(5, 8)
    again = compress.load(found.save(tmp_path / "out"), model=Mixed())
    assert [tensor.dtype for tensor in again.parameters()] == [tensor.dtype for tensor in Mixed().parameters()]
    assert torch.equal(again(values), found.model(values))


def test_a_saved_result_reloads_into_the_users_own_class(pruned: compress.PruneResult, tmp_path: Path) -> None:
    folder = pruned.save(tmp_path / "chain")
    again = compress.load(folder, model=seeded(Chain))
    torch.testing.assert_close(again(batches()[0]), pruned.model(batches()[0]))
    assert not [file for file in folder.rglob("*") if file.suffix in (".pt", ".pth", ".pkl", ".bin")]
    with pytest.raises(CompressError):
        compress.load(folder)  # names code, without a word for it
    torch.testing.assert_close(compress.load(folder, trust_code=True)(batches()[0]), pruned.model(batches()[0]))
    with pytest.raises(OutputError):
        pruned.save(folder)
    pruned.save(folder, force=True)


def test_equal_calls_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        compress.prune(seeded(Chain), batches(), macs=0.6, progress=False).save(tmp_path / name)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_keywords_and_several_outputs_pass_through_and_reload(tmp_path: Path) -> None:
    given = [{"image": normal(24, 1, 8, 8, seed=seed), "features": normal(24, 4, seed=seed + 50)} for seed in range(5)]
    result = compress.prune(seeded(Detector), given, keep=0.5, progress=False)
    found = result.model(given[0]["image"], features=given[0]["features"])
    assert {name: tuple(value.shape) for name, value in found.items()} == {"scores": (24, 3), "boxes": (24, 4)}
    again = compress.load(result.save(tmp_path / "out"), model=seeded(Detector))
    torch.testing.assert_close(again(**given[0]), found)


def test_a_measure_is_called_before_and_after(tmp_path: Path) -> None:
    inputs, labels = normal(300, 6), torch.randint(3, (300,), generator=torch.Generator().manual_seed(1))
    seen: list[int] = []

    def accuracy(network: nn.Module) -> dict[str, float]:
        seen.append(sum(tensor.numel() for tensor in network.parameters()))
        return {"accuracy": float((network(inputs).argmax(1) == labels).float().mean())}

    loader = DataLoader(TensorDataset(inputs, labels), 50)
    result = compress.prune(seeded(Chain), loader, keep=0.5, evaluate=accuracy, progress=False)
    assert len(seen) == 3  # the original twice
    assert seen[0] == seen[1] > seen[2]
    assert result.report.metrics["accuracy"] == result.metrics["accuracy"]
    assert "accuracy" in repr(result)
    result.save(tmp_path / "out")
    for page in ("report.json", "report.md", "report.html"):
        assert "accuracy" in (tmp_path / "out" / page).read_text()


def test_a_measure_that_falls_too_far_is_a_failed_gate() -> None:
    values = iter([0.9, 0.9, 0.5])
    with pytest.raises(GateError, match=r"0\.9 → 0\.5"):
        compress.prune(
            seeded(Chain), batches(), keep=0.5, evaluate=lambda _: next(values), max_drop=0.1, progress=False
        )


def test_labelled_test_batches_give_the_built_in_figures() -> None:
    pairs = [(normal(40, 6, seed=seed), torch.arange(40) % 3) for seed in range(6)]
    result = compress.prune(seeded(Chain), pairs[:4], test=pairs[4:], keep=0.5, progress=False)
    assert result.report.evaluation is not None
    assert result.report.evaluation.samples == 80


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_targets_of_any_shape_are_compared_like_those_of_files(shape: tuple[int, ...]) -> None:
    one = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))
    pairs = [(normal(40, 6, seed=seed), normal(*shape, seed=seed + 9)) for seed in range(6)]
    result = compress.prune(one, pairs[:4], test=pairs[4:], keep=0.5, progress=False)
    assert result.report.evaluation is not None
    assert [figure.key for figure in result.report.evaluation.figures] == ["squared_error", "absolute_error"]


def test_wrappers_are_taken_off() -> None:
    for wrapped in (nn.DataParallel(seeded(Chain)), torch.compile(seeded(Chain))):
        assert type(compress.prune(wrapped, batches(), keep=0.5, progress=False).model) is Chain  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_folder_is_loaded_into_a_wrapped_network(wrap: Any, pruned: compress.PruneResult, tmp_path: Path) -> None:
    loaded = compress.load(pruned.save(tmp_path / "out"), model=wrap(seeded(Chain)))
    assert type(loaded) is Chain
    assert torch.equal(loaded(batches()[0]), pruned.model(batches()[0]))


def test_frozen_parameters_are_compressed_all_the_same() -> None:
    module = seeded(Chain).requires_grad_(False)
    found = compress.prune(module, batches(), keep=0.5, progress=False).model
    assert not any(tensor.requires_grad for tensor in found.parameters())


class Wavering:
    """A measure that gives another number each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, network: nn.Module) -> float:
        self.calls += 1
        return 0.9 + 0.01 * (self.calls % 2)


def raising() -> Iterator[Tensor]:
    yield normal(32, 6)
    raise OSError("the disk is gone")


def test_a_measure_that_draws_random_samples_repeats_itself_and_one_that_does_not_is_told_of() -> None:
    result = compress.prune(
        seeded(Chain), batches(), keep=0.5, evaluate=lambda _: torch.rand(()) + np.random.rand(), progress=False
    )
    before, after = result.metrics["metric"]
    assert before == after
    assert not [note for note in result.report.notes if "repeat" in note]
    told = SilentProgress()
    compress.prune(seeded(Chain), batches(), keep=0.5, evaluate=Wavering(), progress=told)
    assert [note for note in told.notes if "does not repeat itself" in note]


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda module: module.to("meta"), "meta device"), (lambda module: nn.Sequential(nn.LazyLinear(3)), "run it on")],
)
def test_a_module_without_numbers_is_refused(change: Callable[[nn.Module], nn.Module], said: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules are under development
        module = change(seeded(Chain))
    with pytest.raises(CheckpointError, match=said):
        compress.prune(module, batches(), keep=0.5)


def test_a_module_on_two_devices_is_refused() -> None:
    module = seeded(Chain)
    module.layers[0].to("meta")  # type: ignore[index, union-attr, operator]
    with pytest.raises(CheckpointError, match="move it to one device"):
        compress.prune(module, batches(), keep=0.5)


def test_half_precision_comes_back_as_it_was_given() -> None:
    result = compress.prune(seeded(Chain).bfloat16(), batches(), keep=0.5, progress=False)
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.bfloat16}


def test_biases_that_half_precision_lacked_are_made_in_it(tmp_path: Path) -> None:
    """Folded batch norms give the convolutions in front of them a bias."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 3), nn.Flatten(1)
        ).bfloat16()

    given = [normal(40, 3, 6, 6).bfloat16()]
    result = compress.prune(build().eval(), given, keep=0.5, fold="on", progress=False)
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.bfloat16}
    assert result.model(given[0]).isfinite().all()
    result.save(tmp_path / "small")
    assert torch.equal(compress.load(tmp_path / "small", model=build())(given[0]), result.model(given[0]))


def endless() -> Iterator[Tensor]:
    while True:
        yield normal(32, 6)


def test_an_endless_generator_is_read_to_the_limit() -> None:
    result = compress.prune(seeded(Chain), endless(), keep=0.5, calibration_samples=100, progress=False)
    assert result.report.inputs.data.fitting.samples + result.report.inputs.data.fitting.held_back == 100


@pytest.mark.parametrize(
    ("options", "fault", "said"),
    [
        ({"data": []}, DataError, "no sample"),
        ({"data": [normal(32, 5)]}, CompressError, "does not run"),
        ({"data": [torch.full((32, 6), float("nan"))]}, CompressError, "NaN"),
        ({"evaluate": lambda _: float("nan")}, DataError, "nan"),
        ({"evaluate": lambda _: "good"}, DataError, "number"),
        ({"evaluate": lambda _: 1 / 0}, DataError, "ZeroDivisionError"),
        ({"evaluate": lambda _: {}}, DataError, "empty"),
        ({"evaluate": lambda _: torch.ones(2)}, DataError, "Tensor"),
        ({"evaluate": Wavering(), "max_drop": 0.01}, DataError, "does not repeat itself"),
        ({"data": 3}, DataError, "iterable"),
        ({"data": "train.npz"}, DataError, "iterable"),
        ({"data": iter(())}, DataError, "no sample"),
        ({"data": [normal(32, 6), normal(32, 7)]}, DataError, "pad or crop"),
        ({"data": [(normal(32, 6), torch.zeros(31))]}, DataError, "equally many"),
        ({"data": [(normal(32, 6), torch.zeros(32)), normal(32, 6)]}, DataError, "some without"),
        ({"data": [(normal(32, 6), normal(32, 6), normal(32, 6))]}, DataError, "tuple of 3"),
        ({"data": [([normal(6)] * 9, [{"boxes": normal(2, 4)}] * 9)]}, DataError, "Samples in a list, as detection"),
        ({"data": [([normal(9, 6), normal(9, 6)],)]}, CheckpointError, "Samples in a list, as detection"),
        ({"data": ({} for _ in range(3))}, DataError, "tensors"),
        ({"data": raising()}, DataError, "OSError: the disk is gone"),
        ({"test": [normal(8, 6, seed=77)], "max_drop": 1}, CompressError, "label"),
        ({"layer": "nothing"}, CompressError, "matches no layer"),
        ({"keep": 2.5}, CompressError, "keep"),
        ({"colour": "red"}, CompressError, "colour"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    options: dict[str, object], fault: type[Exception], said: str
) -> None:
    module = seeded(Chain)
    state = copy.deepcopy(module.state_dict())
    given = {"data": batches(), "keep": 0.5, **options}
    with pytest.raises(fault, match=said) as caught:
        compress.prune(module, **given, progress=False)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


class Third(nn.Module):
    """Needs what its signature says may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None, "no mask"
        return self.last(self.first(values * mask).relu())  # type: ignore[no-any-return]


def test_an_input_that_was_taken_for_targets_is_told_of() -> None:
    said = "no mask. The last part of each batch was taken for labels or targets; if it is forward()'s `mask`, give"
    with pytest.raises(CompressError, match=re.escape(said)):
        compress.prune(Third(), [(normal(32, 6), normal(32, 6))], keep=0.5)
    named = {"values": normal(32, 6), "mask": normal(32, 6)}
    assert compress.prune(Third(), [named], keep=0.5).model.get_submodule("first").out_features == 6


class Unregistered(nn.Module):
    """Keeps its layers in a list that torch does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(6, 12), nn.Linear(12, 3)]

    def forward(self, values: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](values).relu())  # type: ignore[no-any-return]


def test_layers_in_a_plain_list_are_said_to_be_unseen() -> None:
    with pytest.raises(NothingToCompressError, match=r"those in nn\.ModuleList are"):
        compress.prune(Unregistered(), [normal(32, 6)], keep=0.5)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nn\.Module"):
        compress.prune("net.pt", batches())  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        traced = torch.jit.trace(seeded(Chain), normal(2, 6))  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedError, match="TorchScript"):
        compress.prune(traced, batches())


class Pair(nn.Module):
    """Two inputs by place; importable, so that a folder of it is verified like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read, self.head = nn.Linear(6, 12), nn.Linear(4, 12), nn.Linear(24, 3)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        both = torch.cat([torch.relu(self.look(image)), torch.relu(self.read(features))], 1)
        found: Tensor = self.head(both)
        return found


def test_a_folder_of_several_inputs_is_verified_and_inspected_and_one_with_wrong_shapes_fails(tmp_path: Path) -> None:
    given = [(normal(30, 6, seed=seed), normal(30, 4, seed=seed + 9)) for seed in range(5)]
    folder = compress.prune(seeded(Pair), given, keep=0.5, progress=False).save(tmp_path / "out")
    assert compress.verify(folder, trust_code=True).passed
    recipe = compress.make_recipe({"checkpoint": str(folder), "trust_code": True}, "inspect")
    assert compress.inspect(recipe)["layers"]
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["further_inputs"][0]["shape"] = [5]
    (folder / "config.json").write_text(json.dumps(config))
    write_checksums(folder)
    found = compress.verify(folder, trust_code=True)
    assert not found.passed
    assert any("does not run on inputs of shape (2, 6), (2, 5)" in check.message for check in found.checks)


class Padded(nn.Module):
    """Attention over tokens of which those of number 0 are padding: a sample of padding alone has no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(20, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        hidden = self.attention(hidden, hidden, hidden, key_padding_mask=tokens == 0)[0]
        return self.down(self.up(hidden).relu().mean(1))  # type: ignore[no-any-return]


def test_a_network_that_has_no_answer_for_padding_alone_is_verified_and_inspected(tmp_path: Path) -> None:
    tokens = torch.randint(1, 20, (60, 5), generator=torch.Generator().manual_seed(0))
    folder = compress.prune(seeded(Padded), [tokens], keep=0.5, layer="up", progress=False).save(tmp_path / "out")
    assert compress.verify(folder, trust_code=True).passed
    recipe = compress.make_recipe({"checkpoint": str(folder), "trust_code": True, "input_shape": (5,)})
    assert compress.inspect(recipe)["layers"]


class Spectral(nn.Module):
    """A filter in frequency, with complex weights, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 32), nn.Linear(32, 3)
        self.response = nn.Parameter(torch.randn(9, 1, dtype=torch.cfloat))

    def forward(self, rows: Tensor) -> Tensor:
        filtered = torch.fft.irfft(torch.fft.rfft(rows, dim=1) * self.response, n=rows.shape[1], dim=1)
        return self.head(torch.relu(self.first(filtered))).mean(1)  # type: ignore[no-any-return]


def test_complex_weights_stay_as_they_are_while_the_others_recover() -> None:
    torch.manual_seed(0)
    module = Spectral().eval()
    result = compress.prune(module, [torch.randn(50, 16, 6) for _ in range(6)], macs=0.5, recover=10)
    assert torch.equal(result.model.response, module.response)
    assert result.model.first.out_features <= 16


class Phases(nn.Module):
    """Complex weights whose products are read as magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12, dtype=torch.cfloat), nn.Linear(12, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(torch.complex(values, torch.zeros_like(values))).abs()
        return self.last(self.second(hidden).relu())  # type: ignore[no-any-return]


def test_complex_features_are_mimicked_in_recovery() -> None:
    result = compress.prune(seeded(Phases), [normal(32, 6, seed=seed) for seed in range(3)], keep=0.5, recover=3)
    assert result.model.second.out_features == 8


class Causal(nn.Module):
    """Attention whose mask of -inf is a buffer in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.attention(values, values, values, attn_mask=self.mask, need_weights=False)[0]
        return self.down(self.up(hidden).relu())  # type: ignore[no-any-return]


def test_a_mask_of_infinities_in_the_state_dict_is_kept(tmp_path: Path) -> None:
    module = seeded(Causal)
    found = compress.prune(module, [normal(60, 5, 6)], keep=0.5, layer="up", progress=False)
    again = compress.load(found.save(tmp_path / "out"), model=Causal())
    assert torch.equal(again.mask, module.mask)
    assert again.up.out_features == 6


class Tables(nn.Module):
    """Columns of whole numbers, each with a table of its own size, beside numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 6) for size in (3, 5, 40))
        self.hidden, self.scores = nn.Linear(22, 24), nn.Linear(24, 3)

    def forward(self, columns: Tensor, numbers: Tensor) -> Tensor:
        parts = [table(columns[:, place]) for place, table in enumerate(self.tables)]
        scores: Tensor = self.scores(self.hidden(torch.cat([*parts, numbers], 1)).relu())
        return scores


def test_columns_of_classes_keep_to_their_tables() -> None:
    columns = torch.stack([torch.arange(100) % size for size in (3, 5, 40)], 1).flip(0)
    result = compress.prune(seeded(Tables), [(columns, normal(100, 4))], keep=0.5, progress=False)
    assert result.model.hidden.out_features == 12


class Legal(nn.Module):
    """Scores of actions, -inf for those that the second input rules out."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.scores = nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, state: Tensor, legal: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.hidden(state).relu())
        return scores.masked_fill(~legal, -torch.inf)


@pytest.mark.parametrize("labelled", [False, True])
def test_scores_that_are_masked_out_are_compared_where_they_are_not(labelled: bool, tmp_path: Path) -> None:
    network = seeded(Legal)
    state, legal = normal(200, 6), normal(200, 5, seed=1) > -0.5
    answers = (network(state, legal).argmax(1),) if labelled else ()
    batch = (state, legal, *answers)
    test = tuple(part[:60] for part in (normal(60, 6, seed=2), legal, *answers))
    result = compress.prune(network, [batch], macs=0.6, test=[test], progress=False)
    after, before = (each(state, legal).detach()[legal] for each in (result.model, network))
    assert result.report.evaluation is not None
    assert float((after - before).norm() / before.norm()) < 2 * result.report.evaluation.relative_output_change < 0.5
    result.save(tmp_path / "small")
    assert torch.equal(compress.load(tmp_path / "small", model=Legal())(state, legal), result.model(state, legal))


class OneByOne(nn.Module):
    """Goes through the samples of a batch in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, values: Tensor) -> Tensor:
        return torch.stack([self.last(self.first(row).relu()) for row in values])


def test_a_network_that_takes_single_samples_in_a_loop_recovers() -> None:
    found = compress.prune(seeded(OneByOne), [normal(40, 6)], keep=0.5, recover=2, batch_size=8, progress=False)
    assert found.model.first.out_features == 6


class Recommender(nn.Module):
    """A score for a user and an item, each a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(30, 6), nn.Embedding(40, 6)
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        pairs = torch.cat([self.users(users), self.items(items)], 1)
        return self.last(self.first(pairs).relu()).squeeze(1)  # type: ignore[no-any-return]


def test_inputs_of_a_single_number_a_sample_are_calibrated_on() -> None:
    torch.manual_seed(0)
    batches = [(torch.randint(0, 30, (64,)), torch.randint(0, 40, (64,))) for _ in range(3)]
    assert compress.prune(Recommender(), batches, keep=0.5).model.get_submodule("first").out_features == 8


class SparseExperts(nn.Module):
    """Every sample is sent to one of three experts, of which the last is chosen by none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(3))
        with torch.no_grad():
            self.gate.bias[2] = -1e3

    def forward(self, x: Tensor) -> Tensor:
        chosen, result = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            result = result.index_add(0, rows, expert(x[rows]))
        return result


def test_experts_are_cut_by_the_samples_sent_to_them_and_one_that_gets_none_stays() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(64, 6) for _ in range(3)]
    network = compress.prune(SparseExperts(), batches, keep=0.5).model
    assert [network.get_submodule(f"experts.{number}.0").out_features for number in range(3)] == [6, 6, 12]


class Changing(nn.Module):
    """Gives other outputs each time that it is called."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)
        if self.kind == "counts":
            self.calls = self.calls + 1
            hidden = hidden + self.calls
        else:
            hidden = nn.functional.dropout(hidden, 0.5, training=True)
        return self.last(hidden.relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("counts", "forward() changes its buffer `calls`; change it only where self.training"),
        ("draws", "forward() draws random numbers in evaluation mode (dropout)"),
    ],
)
def test_a_network_that_gives_other_outputs_each_time_is_refused_with_the_cause(kind: str, said: str) -> None:
    with pytest.raises(compress.CompressError, match=re.escape(said)):
        compress.prune(Changing(kind), [torch.randn(32, 4)], keep=0.5)

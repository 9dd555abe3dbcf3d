"""Layers of a low rank under budgets: chosen with the widths, written as two layers, reloaded, exported, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.artifact.exports.pt2_file import keeps_weights_raw
from compress.compression.pricing.allocate import Choices, Lowering, allocate, damage_curve, legal_widths
from compress.compression.pricing.costs import CostModel, SizedTensor
from compress.compression.searching.lowerings import probed_ranks
from compress.errors import CompressError, GateError, NothingToCompressError
from compress.models.resnet import resnet_cifar10
from tests.clocks import use_steady_clock
from tests.networks import Function, randomise

EXPORTS = ("onnx", "pt2", "hf") if keeps_weights_raw() else ("onnx", "hf")


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer parameters are faster, whatever else the machine does."""
    use_steady_clock(monkeypatch)


def low(layer: nn.Module, rank: int) -> nn.Module:
    """The layer with what its weight has beyond a rank made small."""
    with torch.no_grad():
        left, values, right = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
        values[rank:] *= 1e-3
        layer.weight.copy_(((left * values) @ right).reshape(layer.weight.shape))
    return layer


def head(outputs: int = 48) -> nn.Module:
    """Two layers, of which the last, whose units are the outputs, is nearly of rank 3."""
    module = randomise(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, outputs)))
    low(module[2], 3)
    return module


def batches(*shape: int) -> list[Tensor]:
    return [torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def pruned(module: nn.Module, *shape: int, **options: Any) -> compress.PruneResult:
    return compress.prune(module, batches(*shape), recover="off", progress=False, **options)


def test_a_layer_of_low_rank_becomes_two_and_does_less_harm_than_widths_alone() -> None:
    widths, both = (pruned(head(), 12, macs=0.5, low_rank=choice) for choice in (False, True))
    assert isinstance(both.model[2], nn.Sequential)
    assert isinstance(widths.model[2], nn.Linear)
    scores = [found.report.calibration.held_back for found in (widths, both)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[1].distance < 0.1 * scores[0].distance
    assert both.report.cost.macs.after <= 0.5 * both.report.cost.macs.before


def half_cut(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    stream = parts["first"](x)
    stream = stream + parts["up"](parts["down"](stream).relu())
    return parts["end"](stream)  # type: ignore[no-any-return]


@pytest.mark.parametrize("cost", ["macs", "params", "latency"])
def test_a_budget_below_what_widths_reach_is_kept(cost: str) -> None:
    layers = {"first": (16, 16), "down": (16, 8), "up": (8, 16), "end": (16, 12)}
    module = randomise(Function(half_cut, **{name: nn.Linear(*size) for name, size in layers.items()}))
    with pytest.raises(GateError, match="cannot be met"):
        pruned(module, 16, **{cost: 0.55})
    report = pruned(module, 16, **{cost: 0.55}, low_rank=True).report
    assert report.search is not None
    assert report.search.low_rank
    kept = {"macs": report.cost.macs.kept, "params": report.cost.parameters.kept}
    assert kept.get(cost, 0) <= 0.55


def streams() -> nn.Module:
    """Nothing of it can be cut: the stream has two producers."""
    module = Function(
        lambda parts, x: parts["end"](parts["first"](x) + parts["second"](x)),
        first=nn.Linear(16, 16), second=nn.Linear(16, 16), end=nn.Linear(16, 12),
    )  # fmt: skip
    return randomise(module)


def test_where_no_unit_can_go_ranks_alone_keep_the_budget() -> None:
    with pytest.raises(NothingToCompressError):
        pruned(streams(), 16, macs=0.7)
    found = pruned(streams(), 16, macs=0.7, low_rank=True)
    assert found.report.cost.macs.after <= 0.7 * found.report.cost.macs.before
    assert found.report.layers == ()
    search = found.report.search
    assert search is not None
    assert {layer.name for layer in search.low_rank} == {
        name for name, part in found.model.named_modules() if isinstance(part, nn.Sequential)
    }


def test_its_folder_has_pages_without_any_cut_layer(tmp_path: Path) -> None:
    found = pruned(streams(), 16, macs=0.7, low_rank=True)
    found.save(tmp_path / "out")
    inputs = batches(16)[0]
    with torch.no_grad():
        assert torch.allclose(compress.load(tmp_path / "out", model=streams())(inputs), found.model(inputs), atol=1e-6)
    assert "Layers of a low rank" in (tmp_path / "out" / "report.html").read_text()


def test_a_network_of_which_nothing_can_be_done_says_why_in_one_sentence() -> None:
    module = randomise(Function(lambda parts, x: parts["end"](parts["end"](x)), end=nn.Linear(16, 16)))
    with pytest.raises(
        NothingToCompressError, match=r"Of no low rank can be: layers\.end: its weight is shared\."
    ) as told:
        pruned(module, 16, macs=0.7, low_rank=True)
    assert "\n" not in str(told.value)


def test_streams_may_be_cut_and_lowered_at_once() -> None:
    report = pruned(streams(), 16, macs=0.3, low_rank=True, couple=True).report
    assert report.cost.macs.kept <= 0.3
    assert report.verification.narrowed_deviation <= 1e-4


def test_the_report_tells_damage_costs_and_times_of_every_layer() -> None:
    found = pruned(head(), 12, macs=0.5, low_rank=True)
    assert found.report.search is not None
    (layer,) = found.report.search.low_rank
    assert (layer.name, layer.kind) == ("2", "linear")
    assert layer.rank in [step for step, _ in layer.tried]
    assert layer.macs.before == 960
    assert layer.macs.after < layer.macs.before
    assert layer.milliseconds.after < layer.milliseconds.before
    assert layer.predicted_damage == max(damage for rank, damage in layer.tried if rank >= layer.rank)
    assert abs(layer.measured_damage) < 0.1


def test_two_layers_that_are_slower_are_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "compress.compression.pricing.pairs.measure_latency"
    monkeypatch.setattr(place, lambda modules, inputs, **_: [Slow(len(list(each.modules()))) for each in modules])
    found = pruned(head(), 12, macs=0.5, low_rank=True)
    assert found.report.search is not None
    assert found.report.search.low_rank == ()
    assert found.report.search.full_rank["2"] == "two layers are no faster at any rank"


class Slow:
    """A measured time."""

    def __init__(self, least: float) -> None:
        self.least = least


def test_with_every_layer_refused_the_run_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "compress.compression.pricing.pairs.measure_latency"
    monkeypatch.setattr(place, lambda modules, inputs, **_: [Slow(len(list(each.modules()))) for each in modules])
    with pytest.raises(GateError, match=r"Of no low rank can be: .*layers\.end: two layers are no faster") as caught:
        pruned(streams(), 16, macs=0.7, low_rank=True)
    assert "\n" not in str(caught.value)


def test_a_rank_needs_a_budget() -> None:
    with pytest.raises(CompressError, match="low_rank"):
        pruned(head(), 12, keep=0.5, low_rank=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on a small ResNet, two of whose convolutions are nearly of rank 2, writes with all exports."""
    place = tmp_path_factory.mktemp("low")
    module = randomise(resnet_cifar10(8, num_classes=4, width=6))
    low(module.layer2[0].conv1, 2)
    low(module.layer3[0].conv1, 2)
    torch.save({name: tensor.half() for name, tensor in module.state_dict().items()}, place / "net.pt")
    images = torch.cat(batches(3, 8, 8))
    np.savez(place / "data.npz", inputs=images.numpy(), labels=np.arange(len(images)) % 4)
    with pytest.MonkeyPatch.context() as patch:
        use_steady_clock(patch)
        compress.run(recipe(place, "net.pt", "out", macs=0.6, refine=1, recover=3, export=EXPORTS, low_rank=True))
    return place / "out"


def recipe(place: Path, checkpoint: str, output: str, **options: Any) -> compress.Recipe:
    return compress.make_recipe(
        {
            "checkpoint": str(place / checkpoint), "data": f"npz:{place / 'data.npz'}",
            "output": str(place / output), **options,
        }
    )  # fmt: skip


def replaced(folder: Path) -> dict[str, int]:
    manifest = json.loads((folder / "config.json").read_text())
    return {path: entry["rank"] for path, entry in manifest["removed"].items() if "rank" in entry}


def test_the_written_network_reloads_with_two_layers(folder: Path) -> None:
    ranks = replaced(folder)
    assert ranks
    network = compress.load(folder)
    for path, rank in ranks.items():
        pair = network.get_submodule(path)
        assert [type(part) for part in pair] == [nn.Conv2d, nn.Conv2d]  # type: ignore[arg-type]
        assert pair[0].out_channels == pair[1].in_channels == rank  # type: ignore[index,union-attr]
    assert "layers of a low rank" in (folder / "report.md").read_text()
    assert "Layers of a low rank" in (folder / "report.html").read_text()


def test_its_tensors_have_the_precision_of_the_checkpoint(folder: Path) -> None:
    from safetensors.torch import load_file

    assert {tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()} <= {
        torch.float16, torch.int64,
    }  # fmt: skip


@pytest.mark.usefixtures("fresh_process")
def test_a_fresh_process_gives_the_same_outputs(folder: Path) -> None:
    options = {"macs": 0.6, "refine": 0, "recover": "off", "low_rank": True}
    report = compress.run(recipe(folder.parent, "net.pt", "fresh", **options)).report
    assert report is not None
    assert report.verification.reload_deviation is not None
    assert report.verification.reload_deviation <= 1e-5
    assert replaced(folder.parent / "fresh")


@pytest.mark.parametrize("kind", EXPORTS)
def test_every_export_gives_what_the_folder_gives(kind: str, folder: Path) -> None:
    inputs = batches(3, 8, 8)[0][:5]
    exported = compress.load(folder / ("hf" if kind == "hf" else f"model.{kind}"))
    with torch.no_grad():
        wanted = compress.load(folder)(inputs)
        assert torch.allclose(exported(inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_verify_passes_it(folder: Path) -> None:
    assert all(check.passed is not False for check in compress.verify(str(folder)).checks)


def test_it_is_inspected_and_cut_again(folder: Path) -> None:
    again = recipe(folder.parent, "out", "again", macs=0.7, recover="off", refine=0, low_rank=True)
    compress.run(again)
    ranks = replaced(folder.parent / "again")
    assert ranks.items() >= replaced(folder).items()
    assert compress.load(folder.parent / "again") is not None
    assert compress.inspect(recipe(folder.parent, "again", "never")) is not None


def test_it_is_finetuned(folder: Path) -> None:
    options = {"training": {"epochs": 1}, "force": True}
    trained = compress.finetune(recipe(folder.parent, "out", "tuned", **options))
    assert replaced(folder.parent / "tuned") == replaced(folder)
    assert trained.module.state_dict().keys() == compress.load(folder).state_dict().keys()


@pytest.mark.parametrize("rank", [0, -1, 10**9, 1.5, "2", True, [2]])
def test_a_forged_rank_is_refused_in_one_line(rank: object, folder: Path, tmp_path: Path) -> None:
    forged(folder, tmp_path, {next(iter(replaced(folder))): {"rank": rank}})


@pytest.mark.parametrize("path", ["bn1", "layer1", "nowhere", "", "fc.weight", "layer1.0.conv1.0"])
def test_a_rank_of_what_is_no_layer_is_refused_in_one_line(path: str, folder: Path, tmp_path: Path) -> None:
    forged(folder, tmp_path, {path: {"rank": 2}})


def forged(folder: Path, place: Path, entry: dict[str, Any]) -> None:
    for name in ("config.json", "model.safetensors"):
        (place / name).write_bytes((folder / name).read_bytes())
    manifest = json.loads((folder / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**manifest, "removed": {**manifest["removed"], **entry}}))
    with pytest.raises(CompressError) as caught:
        compress.load(place)
    assert "\n" not in str(caught.value)


def test_a_killed_run_goes_on_to_the_same_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, options = folder.parent, {"macs": 0.6, "refine": 1, "recover": 3, "low_rank": True}
    from compress.compression import sweep

    settled = sweep.lower_layer
    calls = []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return settled(*arguments)

    monkeypatch.setattr(sweep, "lower_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe(place, "net.pt", "resumed", **options), resume=True)
    monkeypatch.setattr(sweep, "lower_layer", settled)
    compress.run(recipe(place, "net.pt", "resumed", **options), resume=True)
    assert (place / "resumed" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_weight_norm_reloads(tmp_path: Path) -> None:
    def built() -> nn.Module:
        module = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(20, 48)))
        return module.eval()

    module = built()
    module[0].load_state_dict(head()[0].state_dict())  # type: ignore[index]
    with torch.no_grad():
        module[2].weight = head()[2].weight.data  # type: ignore[union-attr]
    found = pruned(module, 12, macs=0.5, low_rank=True)
    assert isinstance(found.model[2], nn.Sequential)
    found.save(tmp_path / "out")
    inputs = batches(12)[0]
    with torch.no_grad():
        assert torch.allclose(compress.load(tmp_path / "out", model=built())(inputs), found.model(inputs), atol=1e-6)


def test_the_same_run_gives_the_same_bytes() -> None:
    first, second = (pruned(head(), 12, macs=0.5, low_rank=True).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_three_ranks_are_tried_below_the_one_that_saves_nothing() -> None:
    assert probed_ranks(15) == (12, 8, 4)
    assert probed_ranks(28) == (24, 16, 8)
    assert probed_ranks(57) == (40, 32, 16)
    assert probed_ranks(15, 8) == (8,)
    assert probed_ranks(1) == (1,)
    assert probed_ranks(0) == ()


def test_the_rank_of_least_damage_within_the_budget_is_taken() -> None:
    tensors = (
        SizedTensor("a.weight", (8, 10), ((("g", 1),), ()), 1),
        SizedTensor("b.weight", (12, 8), ((), (("g", 1),)), 1),
    )
    model = CostModel({"g": 8}, tensors, lowerable=frozenset({"b.weight"}))
    errors = torch.linspace(1, 0, 9, dtype=torch.float64)
    curves = {"g": damage_curve(errors, [(1, 1.0)], legal_widths(8, 1, 1))}
    lowering = Lowering("b.weight", (3, 2, 1), (1e-6, 1e-4, 5.0), (0.9, 0.8, 0.7))
    found = allocate(Choices(model, curves, lowerings=(lowering,)), {"macs": 0.8})
    assert found.widths == {"g": 8, "b.weight": 3}
    assert model.macs(found.widths) == 80 + 3 * (12 + 8)
    assert found.damage == pytest.approx(1e-6, rel=1e-4)

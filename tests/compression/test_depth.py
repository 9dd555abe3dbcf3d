"""Blocks chosen together with widths: from a budget to a folder that reloads, is checked, exported and cut again."""

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
from compress.compression.pricing.allocate import Choices, Removal, allocate, damage_curve, legal_widths
from compress.compression.pricing.costs import CostModel, SizedTensor
from compress.compression.pricing.latency import TimedMap, time_widths
from compress.errors import CompressError
from compress.models.resnet import CifarResNet, resnet_cifar10
from tests.clocks import use_steady_clock
from tests.networks import randomise
from tests.units.test_branches import Basic, Bottleneck, Layer

EXPORTS = ("onnx", "pt2", "hf") if keeps_weights_raw() else ("onnx", "hf")
REMOVED = ["layer2.1.conv1", "layer2.1.bn1", "layer2.1.conv2", "layer2.1.bn2"]


class Residual(nn.Module):
    """Four blocks, of which the second adds next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.blocks = nn.Sequential(Basic(6), Bottleneck(6), Basic(6, written=False), Basic(6))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))
        return found


class Transformer(nn.Module):
    """Two layers; the first one's attention and the second one's MLP add next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layers = nn.Sequential(Layer(8), Layer(8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(self.embed(x)).mean(1))
        return found


def residual() -> nn.Module:
    module = randomise(Residual())
    with torch.no_grad():
        module.blocks[1].body[2].weight *= 1e-3
    return module


def transformer() -> nn.Module:
    module = randomise(Transformer())
    with torch.no_grad():
        module.layers[0].attention.out.weight *= 1e-3
        module.layers[1].mlp[2].weight *= 1e-5
    return module


def batches(*shape: int) -> list[Tensor]:
    return [torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on a small ResNet, one of whose blocks adds next to nothing, writes with all exports."""
    place = tmp_path_factory.mktemp("depth")
    module = randomise(resnet_cifar10(14, num_classes=4, width=4))
    with torch.no_grad():
        module.layer2[1].bn2.weight *= 1e-3
    torch.save(module.state_dict(), place / "net.pt")
    images = torch.cat(batches(3, 8, 8))
    np.savez(place / "data.npz", inputs=images.numpy(), labels=np.arange(len(images)) % 4)
    options: dict[str, Any] = {"macs": 0.6, "refine": 1, "recover": 3, "export": EXPORTS}
    compress.run(recipe(place, "net.pt", "out", **options))
    return place / "out"


def recipe(place: Path, checkpoint: str, output: str, **options: Any) -> compress.Recipe:
    return compress.make_recipe(
        {
            "checkpoint": str(place / checkpoint), "data": f"npz:{place / 'data.npz'}",
            "output": str(place / output), **options,
        }
    )  # fmt: skip


def test_a_block_that_adds_little_goes_before_units_that_matter() -> None:
    found = compress.prune(residual(), batches(3, 8, 8), macs=0.6, recover="off", progress=False)
    assert found.report.removed == ("blocks.1.body (0, 1, 2)",)
    assert {layer.name for layer in found.report.layers if not layer.kept} == {"blocks.1.body.0", "blocks.1.body.1"}
    assert found.report.cost.macs.after <= 0.6 * found.report.cost.macs.before
    assert not [name for name in found.model.state_dict() if name.endswith(("body.0.weight", "body.1.weight"))]


def test_attention_and_mlp_go_each_by_itself() -> None:
    found = compress.prune(transformer(), batches(6, 5), params=0.5, recover="off", progress=False)
    assert found.report.removed == ("layers.0 (norm1, attention)", "layers.1 (norm2, mlp)")


def test_without_depth_every_block_stays() -> None:
    found = compress.prune(residual(), batches(3, 8, 8), macs=0.6, recover="off", depth=False, progress=False)
    assert found.report.removed == ()
    assert all(layer.kept for layer in found.report.layers)


def test_an_accuracy_bound_alone_may_remove_blocks() -> None:
    shown = [(batch, batch.mean((1, 2, 3)).mul(50).long().remainder(4)) for batch in batches(3, 8, 8)]
    found = compress.prune(residual(), shown, evaluate=lambda net: 1.0, max_drop=50.0, macs=0.6, progress=False)
    assert found.report.removed


@pytest.mark.parametrize(("build", "shape"), [(residual, (3, 8, 8)), (transformer, (6, 5))])
def test_what_is_left_of_a_block_is_as_wide_as_the_narrowed_stream(
    build: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    given = build()
    found = compress.prune(given, batches(*shape), macs=0.3, couple=True, recover="off", progress=False)
    widths = [layer.kept for layer in found.report.layers]
    assert 0 in widths
    assert found.report.verification.narrowed_deviation <= 1e-5
    images = batches(*shape)[0]
    again = compress.load(found.save(tmp_path / "out"), model=given)
    torch.testing.assert_close(again(images), found.model(images))


def test_the_written_network_reloads_without_the_layers(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert "layer2.1 (conv1, bn1, conv2, bn2)" in report["removed"]
    manifest = json.loads((folder / "config.json").read_text())
    assert set(manifest["removed"]) >= set(REMOVED)
    network = compress.load(folder)
    assert "layer2.1.conv1.weight" not in network.state_dict()
    assert "blocks removed" in (folder / "report.md").read_text()


@pytest.mark.parametrize("kind", EXPORTS)
def test_every_export_gives_what_the_folder_gives(kind: str, folder: Path) -> None:
    inputs = batches(3, 8, 8)[0][:5]
    network = compress.load(folder)
    exported = compress.load(folder / ("hf" if kind == "hf" else f"model.{kind}"))
    with torch.no_grad():
        wanted = network(inputs)
        assert torch.allclose(exported(inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_verify_passes_a_network_without_a_block(folder: Path) -> None:
    found = compress.verify(str(folder))
    assert all(check.passed is not False for check in found.checks)


def test_a_network_without_a_block_is_cut_again(folder: Path) -> None:
    again = compress.run(recipe(folder.parent, "out", "again", macs=0.7, recover="off", refine=0))
    assert again.report is not None
    manifest = json.loads((folder.parent / "again" / "config.json").read_text())
    assert set(manifest["removed"]) >= set(REMOVED)
    assert isinstance(compress.load(folder.parent / "again"), CifarResNet)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"nowhere": {"along": [], "outputs": 0}}, "no module"),
        ({"": {"along": [], "outputs": 0}}, "whole network"),
        ({"conv1": {"along": [99], "outputs": 0}}, "damaged"),
        ({"conv1": {"along": [], "outputs": 10**9}}, "damaged"),
    ],
)
def test_a_forged_removal_is_refused_in_one_line(
    entry: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    manifest = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**manifest, "removed": {**manifest["removed"], **entry}}))
    with pytest.raises(CompressError, match=said):
        compress.load(tmp_path)


def test_a_budget_of_time_tells_what_each_layer_was_predicted_to_take_and_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_steady_clock(monkeypatch)
    found = compress.prune(
        residual(), batches(3, 8, 8), latency=0.7, latency_batch=2, latency_threads=1, recover="off", progress=False
    )
    search = found.report.search
    assert search is not None
    names = {one.name for one in search.times}
    assert {"stem", "blocks.0.conv1", "head"} <= names
    gone = {layer.name for layer in found.report.layers if not layer.kept}
    assert all((one.measured_ms == 0) == (one.predicted_ms == 0) for one in search.times)
    assert all(one.predicted_ms == 0 for one in search.times if one.name in gone)
    assert [one.batch_size for one in found.report.cost.latency] == [1, 2, 64]


def two_blocks() -> CostModel:
    """Two blocks 10 → 4 → 10 beside each other, with groups a and b."""
    tensors = []
    for group in "ab":
        tensors += [
            SizedTensor(f"{group}.in", (4, 10), (((group, 1),), ()), 1),
            SizedTensor(f"{group}.out", (10, 4), ((), ((group, 1),)), 1),
        ]
    blocks = tuple((group, frozenset({f"{group}.in", f"{group}.out"})) for group in "ab")
    return CostModel({"a": 4, "b": 4}, tuple(tensors), blocks=blocks)


def test_the_block_of_least_damage_goes_and_the_other_keeps_its_width() -> None:
    errors = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.0], dtype=torch.float64)
    curves = {name: damage_curve(errors, [(1, 1.0)], legal_widths(4, 1, 1)) for name in "ab"}
    choices = Choices(two_blocks(), curves, (Removal(("a",), 0.1), Removal(("b",), 0.2)))
    found = allocate(choices, {"macs": 0.5})
    assert found.widths == {"a": 0, "b": 4}
    assert found.damage == pytest.approx(0.1)


def test_no_block_goes_that_does_more_damage_than_narrowing() -> None:
    errors = torch.tensor([1.0, 0.4, 0.1, 0.05, 0.0], dtype=torch.float64)
    curves = {name: damage_curve(errors, [(1, 0.16)], legal_widths(4, 1, 1)) for name in "ab"}
    choices = Choices(two_blocks(), curves, (Removal(("a",), 9.0), Removal(("b",), 9.0)))
    assert all(allocate(choices, {"macs": 0.5}).widths.values())


def test_a_map_without_channels_takes_no_time() -> None:
    flat = torch.tensor([0.0, *[1.0] * 8], dtype=torch.float64)
    timed = TimedMap("", ((8, (("a", 1),)), (8, ())), flat, flat, shrinking=2.0, fixed=1.0)
    assert timed.milliseconds({"a": 8}) == 0.0
    assert timed.milliseconds({"a": 7}) == 2.25
    assert time_widths(lambda width: 1.0, 0).tolist() == [0.0]

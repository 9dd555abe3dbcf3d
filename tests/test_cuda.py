"""Every command on a CUDA device: the widths, figures and files of the CPU, the same bytes each time.

Skipped where there is no such device; networks of unusual shapes are those of `test_strange_networks`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.demo import DEMO_OPTIONS
from compress.zoo import run_zoo
from tests.test_strange_networks import SHAPES, options, run
from tests.training.test_train_command import trained
from tests.zoo.models import copies, small_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def recipe(folder: Path, **more: Any) -> compress.Recipe:
    """The packaged network under a budget, on the device; None takes an option away."""
    given = {**DEMO_OPTIONS, "tolerance": None, "macs": 0.5, "device": "cuda", "output": str(folder), **more}
    return compress.make_recipe({key: value for key, value in given.items() if value is not None})


def demo(folder: Path, **more: Any) -> Any:
    """Its run."""
    return compress.run(recipe(folder, **more))


@pytest.mark.parametrize("name", SHAPES)
def test_every_network_is_cut_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    there, here = (
        run(given, keep=0.5, device=device, output=str(tmp_path / f"on-{number}")).report
        for number, device in enumerate(("cuda", "cpu"))
    )
    assert there.verification.narrowed_deviation <= 1e-4
    assert [layer.kept for layer in there.layers] == [layer.kept for layer in here.layers]
    for one, other in zip(there.layers, here.layers, strict=True):
        assert (one.fit.error or 0) == pytest.approx(other.fit.error or 0, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name", ["residual", "Vit", "Inception", "segmentation"])
def test_the_same_budget_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    for folder in ("one", "two"):
        run(given, macs=0.6, device="cuda", output=str(tmp_path / folder))
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_a_budget_is_kept_recovered_exported_and_verified(tmp_path: Path) -> None:
    result = demo(tmp_path / "net", export=["onnx", "pt2"], force_gate=True)
    before, after = result.report.cost.macs
    assert after <= 0.5 * before
    for device in ("cuda", "cpu"):
        assert compress.verify(tmp_path / "net", "digits?train=false", device=device).passed
        again = compress.evaluate(tmp_path / "net", "digits?train=false", device=device)
        assert again["top1"] == pytest.approx(result.report.evaluation.compressed.top1, abs=0.01)


def test_time_is_measured_on_the_device(tmp_path: Path) -> None:
    with pytest.raises(compress.CompressError, match="latency"):  # the demo's operations are launch-bound: none gains
        demo(tmp_path / "net", macs=None, latency=0.2)


def test_an_accuracy_bound_works(tmp_path: Path) -> None:
    assert demo(tmp_path / "net", macs=None, max_drop=2).report.evaluation.drop_points <= 2


def test_a_resumable_run_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = demo(tmp_path / "whole")
    again = compress.run(recipe(tmp_path / "again"), resume=True)
    assert again.report.cost.parameters == whole.report.cost.parameters
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_looking_balancing_and_plateaus(tmp_path: Path) -> None:
    given = recipe(tmp_path / "x", macs=None)
    assert compress.inspect(given, deep=True)["layers"]
    assert compress.balance(given, output=tmp_path / "balanced.safetensors")
    assert compress.plateau(given, "2,4", samples=100, steps=30)["losses"]


@pytest.mark.parametrize("method", ["sgd", "pathprox", "group_lasso"])
def test_training_learns_and_repeats_itself(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.training.test_train_command as commands

    monkeypatch.setattr(commands, "MLP", {**commands.MLP, "device": "cuda"})
    reports = [trained(tmp_path, name, method=method, penalty=1e-4, epochs=3) for name in ("a", "b")]
    assert all(report.evaluation.trained.top1 > 0.6 for report in reports)  # type: ignore[attr-defined]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("half", [False, True])
def test_a_module_on_the_device_stays_there_and_settings_are_put_back(half: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).cuda().eval()  # fmt: skip
    if half:
        net = net.half()
    batches = [
        (torch.randn(32, 3, 12, 12).to(next(net.parameters()).dtype), torch.randint(0, 5, (32,))) for _ in range(8)
    ]
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        result = compress.prune(
            net,
            batches,
            test=batches[:2],
            macs=0.6,
            evaluate=lambda module: float(module(batches[0][0].cuda()).float().square().mean()),
            progress=False,
        )
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.backends.cudnn.benchmark = False
    assert all(tensor.is_cuda for tensor in result.model.parameters())
    assert result.model(batches[0][0].cuda()).shape == (32, 5)
    if not half:
        tuned = compress.finetune(result.model, batches, epochs=1, lr=0.01, progress=False)
        assert next(tuned.model.parameters()).is_cuda


def test_jobs_of_a_zoo_take_turns_on_the_card(tmp_path: Path) -> None:
    entries = [{"name": f"m{k}", "checkpoint": path, "device": "cuda"} for k, path in enumerate(copies(tmp_path, 3))]
    found = run_zoo(small_plan(tmp_path, entries))
    assert [row["status"] for row in found["rows"]] == ["done"] * 3

"""Every command on a device: the widths, figures and files of the CPU, the same bytes each time.

On a CUDA device where there is one, and everywhere on one that is pretended, where tensors of two devices must not meet
either. Networks of unusual shapes are those of `test_strange_networks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import backend_registration

import compress
from compress.demo import DEMO_OPTIONS
from compress.zoo import run_zoo
from tests.clocks import use_steady_clock
from tests.pretended_device import NAME, OnDevice, pretend
from tests.test_strange_networks import SHAPES, options, run
from tests.training import test_train_command
from tests.zoo.models import copies, small_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
PRETENDED = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot pretend a device",
)
FEW = ("residual", "Vit", "Inception", "SeveralOutputs", "Tokens", "degenerate")  # for which there is time everywhere
WHERE = [pytest.param(NAME, marks=PRETENDED), *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a device that is there."""
    if request.param == "cuda":
        yield "cuda"
        return
    with pretend():
        yield NAME


def cut(device: str) -> dict[str, Any]:
    """Options by which nothing is trained on the pretended device: torch keeps a thread for gradients of each."""
    return {"recover": "off"} if device == NAME else {}


def recipe(device: str, folder: Path, **more: Any) -> compress.Recipe:
    """The packaged network under a budget, on the device; None takes an option away."""
    given = {
        **DEMO_OPTIONS,
        "tolerance": None,
        "macs": 0.5,
        "device": device,
        "output": str(folder),
        **cut(device),
        **more,
    }
    return compress.make_recipe({key: value for key, value in given.items() if value is not None})


@pytest.mark.parametrize("name", SHAPES if torch.cuda.is_available() else FEW)
def test_a_network_is_cut_as_on_the_cpu(device: str, name: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    there = run(given, keep=0.5, device=device, output=str(tmp_path / "there")).report
    here = run(given, keep=0.5, output=str(tmp_path / "here")).report
    assert there.verification.narrowed_deviation <= 1e-4
    assert [layer.kept for layer in there.layers] == [layer.kept for layer in here.layers]
    for one, other in zip(there.layers, here.layers, strict=True):
        assert (one.fit.error or 0) == pytest.approx(other.fit.error or 0, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name", ["residual", *(["Vit", "segmentation"] if torch.cuda.is_available() else [])])
def test_the_same_budget_gives_the_same_bytes(device: str, name: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    for folder in ("one", "two"):
        run(given, macs=0.6, device=device, output=str(tmp_path / folder), **cut(device))
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_a_budget_is_kept_recovered_exported_and_verified(device: str, tmp_path: Path) -> None:
    exports = [] if device == NAME else ["onnx", "pt2"]  # torch writes no archive where such a device was told of
    given = recipe(device, tmp_path / "net", export=exports, force_gate=True)
    result = compress.run(given)
    before, after = result.report.cost.macs
    assert after <= 0.5 * before
    for place in (device, "cpu"):
        assert compress.verify(tmp_path / "net", "digits?train=false", device=place).passed
        again = compress.evaluate(tmp_path / "net", "digits?train=false", device=place)
        assert again["top1"] == pytest.approx(result.report.evaluation.compressed.top1, abs=0.01)


def test_widths_are_chosen_by_time_and_by_accuracy(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != NAME:
        found = compress.run(recipe(device, tmp_path / "drop", macs=None, max_drop=2), dry_run=True).report
        assert found.evaluation.drop_points <= 2
    use_steady_clock(monkeypatch)
    timed = compress.run(recipe(device, tmp_path / "time", macs=None, latency=0.7, force_gate=True), dry_run=True)
    before, after = timed.report.cost.parameters
    assert after < before
    assert {latency.device for latency in timed.report.cost.latency} == {f"{device}:0"}


def test_looking_balancing_and_plateaus(device: str, tmp_path: Path) -> None:
    given = recipe(device, tmp_path / "x", macs=None)
    assert compress.inspect(given, deep=True)["layers"]
    assert compress.balance(given, output=tmp_path / "balanced.safetensors")
    assert compress.plateau(given, "2,4", samples=100, steps=30)["losses"]


@pytest.mark.parametrize("method", ["sgd", "pathprox", "group_lasso"])
@CUDA
def test_training_learns_and_repeats_itself(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_train_command, "MLP", {**test_train_command.MLP, "device": "cuda"})
    reports = [test_train_command.trained(tmp_path, name, method=method, penalty=1e-4, epochs=3) for name in ("a", "b")]
    assert all(report.evaluation.trained.top1 > 0.6 for report in reports)  # type: ignore[attr-defined]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_module_on_the_device_stays_there(device: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).to(device).eval()  # fmt: skip
    batches = [(torch.randn(32, 3, 12, 12), torch.randint(0, 5, (32,))) for _ in range(8)]

    def size(module: nn.Module) -> float:
        return float(module(batches[0][0].to(device)).square().mean())

    result = compress.prune(net, batches, test=batches[:2], macs=0.6, evaluate=size, progress=False, **cut(device))
    modules = [result.model]
    if device != NAME:
        modules.append(compress.finetune(result.model, batches, epochs=1, lr=0.01, progress=False).model)
    for module in modules:
        assert {tensor.device.type for tensor in module.state_dict().values()} == {device}
        assert module(batches[0][0].to(device)).shape == (32, 5)


def test_outputs_are_watched_as_on_the_cpu(device: str) -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
    batches = [torch.randn(50, 12) for _ in range(6)]
    here = compress.prune(net, batches, tolerance=0.2, progress=False).report
    there = compress.prune(net.to(device), batches, tolerance=0.2, progress=False, **cut(device)).report
    assert any("would move held-back outputs" in note for note in there.notes)
    assert [layer.kept for layer in there.layers] == [layer.kept for layer in here.layers]


@CUDA
def test_half_precision_and_the_callers_settings() -> None:
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)).cuda().half().eval()
    batches = [torch.randn(32, 20).half() for _ in range(8)]
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        result = compress.prune(net, batches, keep=0.5, progress=False)
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.backends.cudnn.benchmark = False
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.float16}


@CUDA
def test_jobs_of_a_zoo_take_turns_on_the_card(tmp_path: Path) -> None:
    entries = [{"name": f"m{k}", "checkpoint": path, "device": "cuda"} for k, path in enumerate(copies(tmp_path, 3))]
    rows = run_zoo(small_plan(tmp_path, entries))["rows"]
    assert [(row["status"], row.get("reason")) for row in rows] == [("done", None)] * 3


@PRETENDED
def test_the_pretended_device_refuses_what_a_real_one_does() -> None:
    with pretend():
        there = torch.randn(3, 4, device=NAME)
        assert isinstance(there @ there.T, OnDevice)
        with pytest.raises(RuntimeError, match="on the device and on the CPU"):
            there.index_select(0, torch.tensor([0, 1]))
        with pytest.raises(RuntimeError, match="on the device and on the CPU"):
            there + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert type(there.cpu()) is torch.Tensor

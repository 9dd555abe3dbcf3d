"""--merge-aligned: units that are positive multiples of one another merge, and the outputs stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.cli import main
from compress.data import Preprocessing, open_data
from compress.demo import CHECKPOINT
from compress.models import digits_net, mlp

MEAN, STD = "0.306", "0.3762"
COMMON = ["--data", "digits", "--calibration-samples", "300", "--mean", MEAN, "--std", STD, "--json"]


def digits() -> torch.Tensor:
    source = open_data("digits?train=false", Preprocessing(mean=(0.306,), std=(0.3762,)))
    return next(iter(source.batches(64))).inputs


def with_multiples(place: Path) -> str:
    """The packaged network with channel 5 = 2·channel 3 behind the first activation, and linear units 7 = 8/3 = 9."""
    state = load_file(CHECKPOINT)
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"features.1.{name}"][5] = state[f"features.1.{name}"][3] * (2 if name in ("weight", "bias") else 1)
    state["features.0.weight"][5] = state["features.0.weight"][3]
    for unit, factor in ((8, 3.0), (9, 1.0)):
        for name in ("weight", "bias"):
            state[f"classifier.0.{name}"][unit] = factor * state[f"classifier.0.{name}"][7]
    save_file(state, place / "net.safetensors")
    return str(place / "net.safetensors")


def test_aligned_units_merge_and_the_outputs_stay(tmp_path, capsys):
    file, out = with_multiples(tmp_path), str(tmp_path / "out")
    assert main([file, *COMMON, "--merge-aligned", "--output", out]) == 0
    report = json.loads(capsys.readouterr().out)
    widths = {layer["name"]: (layer["units"], layer["kept"]) for layer in report["layers"] if "kept" in layer}
    assert [pair for pair in widths.values() if pair[0] != pair[1]] == [(24, 23), (128, 126)]
    original = digits_net()
    original.load_state_dict(load_file(file))
    with torch.inference_mode():
        wanted, got = original.eval()(digits()), compress.load(out)(digits())
    assert float((wanted - got).abs().max() / wanted.abs().max()) < 1e-5
    assert report["rule"] == "merge aligned units"
    assert any("aligned units merged" in note for note in report["notes"])


def test_merging_finds_what_the_deep_inspection_lists(tmp_path, capsys):
    file = with_multiples(tmp_path)
    assert main(["inspect", file, *COMMON, "--deep"]) == 0
    aligned = {layer["name"]: layer.get("aligned") for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert [groups for groups in aligned.values() if groups] == [[[3, 5]], [[7, 8, 9]]]


def test_a_network_without_aligned_units_is_left_alone(tmp_path, capsys):
    torch.manual_seed(0)
    save_file(mlp((64, 12, 12, 10)).state_dict(), tmp_path / "net.safetensors")
    out = tmp_path / "out"
    assert main([str(tmp_path / "net.safetensors"), *COMMON, "--merge-aligned", "--output", str(out)]) == 4
    assert "positive multiples" in capsys.readouterr().err
    assert not out.exists()


def test_units_that_are_aligned_on_the_fitting_samples_only_are_refused(tmp_path, capsys):
    """Unit 1 is twice unit 0 where the second input is zero, as it is on all samples but one, which is held back."""
    inputs = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    inputs[:, 1] = 0
    inputs[torch.randperm(64, generator=torch.Generator().manual_seed(0))[0], 1] = 1.0
    save_file({"inputs": inputs}, tmp_path / "data.safetensors")
    net = mlp((2, 3, 2))
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0], [-1.0, 0.0]]))
        net.layers[0].bias.copy_(torch.tensor([0.0, 0.0, 0.7]))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    arguments = ["--data", str(tmp_path / "data.safetensors"), "--merge-aligned", "--input-shape", "2"]
    assert main([str(tmp_path / "net.safetensors"), *arguments, "--output", str(tmp_path / "out")]) == 1
    assert "held-back" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [["--keep", "3"], ["--macs", "0.5"]])
def test_merging_goes_with_no_other_width_rule(other, tmp_path, capsys):
    assert main([str(CHECKPOINT), *COMMON, "--merge-aligned", *other, "--output", str(tmp_path / "out")]) == 2
    assert "--merge-aligned" in capsys.readouterr().err

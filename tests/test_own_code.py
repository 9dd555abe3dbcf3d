"""From the shell with code of one's own: a network in a file, a measure, several inputs, nested arguments, exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import compress
from compress.artifact.exports.pt2_file import keeps_weights_raw
from compress.cli import main
from compress.errors import UntrustedCodeError

PT2 = ("--export", "pt2") if keeps_weights_raw() else ()
MINE = '''
from dataclasses import dataclass

import torch
from beside import HIDDEN
from torch import Tensor, nn


@dataclass
class Found:
    scores: Tensor
    boxes: Tensor


class Two(nn.Module):
    """Two inputs by name, of which one is a keyword; two outputs."""

    def __init__(self):
        super().__init__()
        self.look, self.read = nn.Conv2d(1, HIDDEN, 3), nn.Linear(4, HIDDEN)
        self.scores, self.boxes = nn.Linear(2 * HIDDEN, 3), nn.Linear(2 * HIDDEN, 4)

    def forward(self, image, *, features):
        seen = torch.relu(self.look(image)).mean((2, 3))
        both = torch.cat([seen, torch.relu(self.read(features))], 1)
        return Found(self.scores(both), self.boxes(both))


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, values):
        return self.layers(values)


def largest_error(outputs, targets):
    return (outputs - targets).abs().max()


def size(network):
    return {"size": sum(one.numel() for one in network.parameters()), "one": 1}


def wrong(first, second, third):
    return 0


def fails(network):
    raise RuntimeError("no such luck")


state = 3
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code beside, weights and data; the working directory is another one."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(MINE)
    (tmp_path / "code" / "beside.py").write_text("HIDDEN = 12\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "nothing"))  # so that what is appended is taken off again
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)

    def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name.replace("__", "."): 0.4 * torch.randn(size, generator=generator) for name, size in shapes.items()}

    save_file(
        weights(
            look__weight=(12, 1, 3, 3), look__bias=(12,), read__weight=(12, 4), read__bias=(12,),
            scores__weight=(3, 24), scores__bias=(3,), boxes__weight=(4, 24), boxes__bias=(4,),
        ),
        "two.safetensors",
    )  # fmt: skip
    flat = weights(layers__0__weight=(24, 5), layers__0__bias=(24,), layers__2__weight=(1, 24), layers__2__bias=(1,))
    save_file(flat, "flat.safetensors")
    for name, count in (("train", 96), ("test", 40)):
        np.savez(
            f"{name}-two.npz", features=rng.normal(size=(count, 4)), image=rng.normal(size=(count, 1, 8, 8)),
            y=np.arange(count) % 3,
        )  # fmt: skip
        inputs = rng.normal(size=(count, 5))
        hidden = np.maximum(inputs @ flat["layers.0.weight"].numpy().T + flat["layers.0.bias"].numpy(), 0)
        wanted = hidden @ flat["layers.2.weight"].numpy().T + 0.05 * rng.normal(size=(count, 1))
        rows = "\n".join(",".join(f"{value:.6f}" for value in row) for row in np.c_[inputs, wanted])
        Path(f"{name}.csv").write_text(f"a,b,c,d,e,price\n{rows}\n")
    return tmp_path / "code" / "mine.py"


def two(name: str) -> str:
    return f"{name}-two.npz?inputs=image,features&labels=y"


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_network_in_a_file_with_keywords_and_two_outputs_goes_all_the_way(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arch = f"{place}:Two"
    run = ["two.safetensors", "--arch", arch, "--data", two("train"), "--eval", two("test"), "--keep", "50%"]
    assert main([*run, "--output-weight", "boxes=3", "--output", "out", "--export", "onnx", *PT2]) == 0
    config = json.loads(Path("out/config.json").read_text())
    assert config["architecture"]["spec"] == "mine.py:Two"
    assert str(place.parent) not in Path("out/config.json").read_text()
    report = json.loads(Path("out/report.json").read_text())
    assert {each["name"]: each["weight"] for each in report["evaluation"]["outputs"]} == {"scores": 1, "boxes": 3}
    capsys.readouterr()
    assert main(["verify", "out", "--arch", arch, "--eval", two("test")]) == 0
    assert main(["evaluate", "out", "--arch", arch, "--eval", two("test")]) == 0
    assert main(["export", "out", "--arch", arch, "--to", "onnx", "--to", "hf"]) == 0
    assert main(["inspect", "out", "--arch", arch, "--data", two("train")]) == 0
    assert main(["out", "--arch", arch, "--data", two("train"), "--keep", "3", "--output", "again"]) == 0
    capsys.readouterr()
    network = compress.load("out/model.onnx")
    assert network.names == ["image", "features"]
    assert set(network(torch.randn(3, 1, 8, 8), torch.randn(3, 4))) == {"scores", "boxes"}


def test_the_place_of_a_file_is_never_taken_from_a_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["flat.safetensors", "--data", "train.csv?target=price", "--keep", "50%", "--output", "out"]
    assert main([*run, "--arch", f"{place}:Regression"]) == 0
    Path("mine.py").write_text("raise SystemExit('this ran')\n")  # what a stranger would lay beside
    for trust in (False, True):
        with pytest.raises(UntrustedCodeError, match=r"--arch PATH/mine\.py:Regression"):
            compress.load("out", trust_code=trust)
    assert main(["verify", "out", "--trust-code"]) == 5
    assert "this ran" not in told(capsys)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere/mine.py:Regression", "there is no file"),
        ("{}:Nothing", "has no 'Nothing'"),
        ("{}:", "is not understood"),
        ("{}:state", "not a class or a function"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], spec: str, said: str
) -> None:
    run = ["flat.safetensors", "--data", "train.csv?target=price", "--keep", "50%", "--dry-run"]
    assert main([*run, "--arch", spec.format(place)]) != 0
    (line,) = [line for line in told(capsys).splitlines() if line.startswith("error:")]
    assert said in line


def test_a_measure_of_outputs_and_targets_searches_on_held_back_samples_and_gates_on_eval(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["flat.safetensors", "--arch", f"{place}:Regression", "--data", "train.csv?target=price"]
    run += ["--eval", "test.csv?target=price", "--metric", f"{place}:largest_error", "--lower-is-better"]
    assert main([*run, "--max-drop", "0.3", "--output", "out"]) == 0
    report = json.loads(Path("out/report.json").read_text())
    before, after = (report["metrics"]["metric"][when] for when in (0, 1))
    assert before < after <= before + 0.3
    assert report["cost"]["parameters"][1] < report["cost"]["parameters"][0]
    capsys.readouterr()
    assert main([*run, "--max-drop", "1e-6%", "--keep", "2", "--output", "worse"]) == 3
    assert "worsens by" in told(capsys)
    assert not Path("worse").exists()


def test_a_measure_of_the_network_needs_no_evaluation_data(place: Path) -> None:
    run = ["flat.safetensors", "--arch", f"{place}:Regression", "--data", "train.csv?target=price"]
    assert main([*run, "--metric", f"{place}:size", "--max-drop", "50%", "--output", "out"]) == 0
    report = json.loads(Path("out/report.json").read_text())
    before, after = report["metrics"]["size"]
    assert before / 2 <= after < before
    assert report["metrics"]["one"] == [1, 1]
    assert any("chose the widths" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("metric", "options", "code", "said"),
    [
        ("{}:wrong", [], 2, "it takes 3 arguments"),
        ("{}:fails", [], 1, "no such luck"),
        ("{}:state", [], 2, "is no function"),
        ("{}:largest_error", [], 1, "give --eval data with labels or targets"),
        ("nonsense", [], 2, "one of top1"),
        ("f1", ["--eval", "test.csv?target=price"], 1, "the figures of these data are squared-error, absolute-error"),
        ("absolute-error", ["--confidence", "0.9"], 2, "eval"),
        ("{}:size", ["--confidence", "0.9"], 2, "one answer a sample"),
    ],
)
def test_what_is_wrong_with_a_measure_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], metric: str, options: list[str], code: int, said: str
) -> None:
    run = ["flat.safetensors", "--arch", f"{place}:Regression", "--data", "train.csv?target=price"]
    assert main([*run, "--metric", metric.format(place), "--max-drop", "1", "--dry-run", *options]) == code
    (line,) = [line for line in told(capsys).splitlines() if line.startswith("error:")]
    assert said in line


@pytest.mark.parametrize(("bound", "code"), [("0.5", 0), ("1000%", 0), ("1e-9", 3)])
def test_an_error_has_a_bound_in_its_own_unit(place: Path, bound: str, code: int) -> None:
    run = ["flat.safetensors", "--arch", f"{place}:Regression", "--data", "train.csv?target=price", "--dry-run"]
    run += ["--eval", "test.csv?target=price", "--metric", "absolute-error"]
    assert main([*run, "--max-drop", bound]) == code

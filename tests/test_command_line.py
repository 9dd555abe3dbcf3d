"""The command line as a user meets it: exit codes, one line per fault, no partial output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import compress
from compress.cli import main
from compress.demo import DEMO_OPTIONS

CHECKPOINT = str(DEMO_OPTIONS["checkpoint"])
QUICK = ["--data", "digits", "--calibration-samples", "300", "--keep", "0.5"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`compress` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "compress", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact of the packaged network, every layer at half its units."""
    folder = tmp_path_factory.mktemp("written") / "out"
    assert main([CHECKPOINT, *QUICK, "--eval", "digits?train=false", "--output", str(folder)]) == 0
    return folder


def test_a_run_leaves_everything_that_is_needed(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    reports = {"report.json", "report.md", "report.html"}
    assert names == {"model.safetensors", "config.json", "recipe.yaml", "SHA256SUMS", *reports}
    assert (written / "model.safetensors").stat().st_size < 0.7 * Path(CHECKPOINT).stat().st_size


def test_the_written_model_loads_in_python_and_computes_what_the_report_says(written: Path) -> None:
    found = json.loads((written / "report.json").read_text())
    again = compress.evaluate(written, "digits?train=false")
    assert again["top1"] == pytest.approx(found["evaluation"]["compressed"]["top1"])
    assert again["loss"] == pytest.approx(found["evaluation"]["compressed"]["loss"])


def test_the_written_keys_are_the_checkpoints_own(written: Path) -> None:
    module = compress.load(written)
    assert set(load_file(written / "model.safetensors")) == set(module.state_dict())


def test_the_resolved_recipe_gives_the_same_bytes_and_the_same_report(written: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["--recipe", str(written / "recipe.yaml"), "--output", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()
    first, second = (without_times(json.loads((folder / "report.json").read_text())) for folder in (written, again))
    assert first == second


def without_times(value: object) -> object:
    """A report without what a clock wrote."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in ("seconds", "latency")}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def test_json_is_pure_and_progress_goes_to_stderr(tmp_path: Path) -> None:
    done = run(CHECKPOINT, *QUICK, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.pt", "--data", "digits"], 1, "missing.pt"),
        ([CHECKPOINT], 1, "--data"),
        ([CHECKPOINT, "--data", "digits", "--layer", "nowhere"], 2, "nowhere"),
        ([CHECKPOINT, "--data", "digits", "--keep", "-3"], 2, "keep"),
        ([CHECKPOINT, "--data", "digits", "--keep", "4", "--error", "0.1"], 2, "keep"),
        ([CHECKPOINT, "--data", "digits", "--nonsense"], 2, "nonsense"),
        ([CHECKPOINT, "--data", "digits", "--mean", "a,b"], 2, "mean"),
        ([CHECKPOINT, "--data", "digits", "--arch", "torchvision:vgg11"], 1, ""),
        ([CHECKPOINT, "--data", "digits", "--arch", "no_such_package:net"], 5, "no_such_package"),
        ([CHECKPOINT, "--data", "digits", "--keep", "100000"], 4, "keeps every unit"),
        ([CHECKPOINT, "--data", "digits", "--max-drop", "1"], 2, "eval"),
        ([CHECKPOINT, "--data", "digits", "--eval", "digits", "--max-drop", "1"], 1, "disjoint"),
        ([CHECKPOINT, "--data", "digits", "--device", "warp"], 2, "warp"),
        ([CHECKPOINT, "--data", "empty"], 1, "empty"),
    ],
)
def test_every_fault_is_one_line_with_its_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main([*arguments, "--calibration-samples", "100", "--output", "out"]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert words in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """The packaged network's tensors, to be damaged."""
    return load_file(CHECKPOINT)


def test_nan_weights_name_the_tensor(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[name][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    assert main([str(tmp_path / "nan.safetensors"), *QUICK, "--output", str(tmp_path / "out")]) == 1
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def damaged_files(folder: Path) -> dict[str, tuple[Path, int]]:
    """Files that are no usable checkpoint, with the exit codes they must end in."""
    whole = Path(CHECKPOINT).read_bytes()
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    files = {
        "truncated.safetensors": (whole[: len(whole) // 2], 1),
        "text.pt": (b"these are not weights\n", 1),
        "empty.pth": (b"", 1),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    torch.save({"weight": torch.zeros(3, 4)}, folder / "whole.pt")
    (folder / "truncated.pt").write_bytes((folder / "whole.pt").read_bytes()[:300])
    torch.save(module, folder / "module.pt")
    wrong = load_file(CHECKPOINT)
    wrong["classifier.0.weight"] = wrong["classifier.0.weight"][:, :-1].contiguous()
    save_file(wrong, folder / "wrong-shapes.safetensors")
    codes = {name: code for name, (_, code) in files.items()}
    codes |= {"truncated.pt": 1, "module.pt": 5, "whole.pt": 5, "wrong-shapes.safetensors": 5}
    return {name: (folder / name, code) for name, code in codes.items()}


def test_a_file_that_is_no_usable_checkpoint_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (path, code) in damaged_files(tmp_path).items():
        assert main([str(path), *QUICK, "--quiet", "--output", str(tmp_path / "out")]) == code, name
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1, name
        assert errors[0].startswith("error: "), name
        assert not (tmp_path / "out").exists(), name


def test_named_architecture_with_wrong_shapes_names_the_first_mismatches(
    state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state["classifier.0.weight"] = state["classifier.0.weight"][:, :-1].contiguous()
    save_file(state, tmp_path / "wrong.safetensors")
    assert main([str(tmp_path / "wrong.safetensors"), *QUICK, "--arch", "compress:digits_net"]) == 1
    assert "classifier.0.weight" in capsys.readouterr().err


def test_labels_out_of_range_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "bad.npz", images=images, labels=np.full(40, 10))
    arguments = [CHECKPOINT, *QUICK, "--eval", str(tmp_path / "bad.npz"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "10 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CHECKPOINT, *QUICK, "--output", "/proc/nowhere/out"]) == 1
    assert "error: Cannot write" in capsys.readouterr().err


def test_a_failed_gate_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [CHECKPOINT, "--data", "digits", "--eval", "digits?train=false", "--keep", "1", "--max-drop", "0.1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 3
    assert "points" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["steps.widths.sweep", "steps.cutting.evaluate_pair", "writing.check_reload"])
def test_ctrl_c_in_the_middle_leaves_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(f"compress.api.{stage}", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born ignoring it
    try:
        assert main([CHECKPOINT, *QUICK, "--output", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_that_compiled_code_turned_into_another_fault_is_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def garbled(*_: object, **__: object) -> None:
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    monkeypatch.setattr("compress.api.running.prepare", garbled)
    arguments = [CHECKPOINT, *QUICK, "--output", str(tmp_path / "out")]
    assert main(arguments, interrupted=lambda: True) == 130
    assert capsys.readouterr().err.splitlines() == ["error: interrupted; nothing was written."]
    with pytest.raises(ValueError, match="UntypedStorage"):
        main(arguments)


@pytest.mark.parametrize("early", ["typer", "compress.cli.app", "compress.recipe"])
def test_ctrl_c_while_modules_are_imported_is_an_interruption(early: str) -> None:
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {early!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['compress', 'inspect', 'absent.pt']\n"
        "from compress.cli import entry\n"
        "entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was written.\n")


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    command = f"{sys.executable} -m compress --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_with_brackets_and_control_characters_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "[red]x[/bold]\x1b[2J.pt")]) == 1
    shown = capsys.readouterr().err
    assert "[red]x[/bold]" in shown
    assert "\x1b" not in shown


def test_inspect_solves_nothing_and_names_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", CHECKPOINT, "--data", "digits", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    usable = [layer for layer in layers if layer["skipped"] is None]
    assert [layer["units"] for layer in usable] == [24, 48, 128, 64]
    assert all(layer["bound"] >= 1 and layer["balance"] > 0 for layer in usable)
    assert [layer["skipped"] for layer in layers if layer not in usable] == ["it is an output of the network"]
    assert main(["inspect", CHECKPOINT, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == len(layers)


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "inspect", "evaluate", "demo", "train", "finetune"):
        assert main([command, "--help"]) == 0
        assert f"compress {command if command != 'run' else 'vgg19.pt'}" in capsys.readouterr().out


def test_a_recipe_file_with_faults_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"checkpoint": CHECKPOINT, "keep": -1, "colour": "red"}))
    assert main(["--recipe", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

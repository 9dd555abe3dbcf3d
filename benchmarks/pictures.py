"""ImageNet networks without fine-tuning: ours and peers at a share of the MACs, and what calibration data are worth.

    python -m benchmarks.pictures --checkpoints FOLDER --images pictures500.npz --eval imagenet500.npz
                                  [--photos photos750.npz] [--cifar cifar10-train.npz] [--parts peers,data]
                                  [--networks …] [--levels .9,.8,.7] [--methods …] [--device cuda] [--quick]

peers: every method gets the same pictures and the same share of the multiply-accumulates, is cut by the same surgery
and scored on the same labelled pictures; "+ LS" is followed by our front-to-back refit. data: the first network at .8,
calibrated on the pictures, on photographs of another kind, on 64 of the pictures, on noise of their mean and spread and
on CIFAR-10 scaled up. Images are npz files of uint8 `images` (N, 224, 224, 3), those to evaluate on with `labels`.
`--quick`: the data part with 64 pictures alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import Bench, bench_of_recipe, run_cell
from benchmarks.reporting import Run, start
from compress.recipe import make_recipe

NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenet-v2": {
        "checkpoint": "mobilenet_v2-imagenet.pth",
        "arch": "real_nets:mobilenet_v2",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    },
    "efficientnet-lite0": {"checkpoint": "efficientnet_lite0-imagenet.pth", "arch": "timm:tf_efficientnet_lite0"},
}
METHODS = (
    "ours",
    "ours, one sweep",
    "uniform, our selection",
    "ThiNet greedy + LS",
    "pivoted QR + LS",
    "TP magnitude + LS",
)
WANTED = {("mobilenet-v2", 0.8, "pictures"): 3.0, ("mobilenet-v2", 0.8, "photographs"): 7.0}  # points lost at most
FEW = 64


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path, help="pictures to calibrate on")
    parser.add_argument("--eval", required=True, type=Path, help="labelled pictures")
    parser.add_argument("--photos", type=Path, help="photographs of another kind")
    parser.add_argument("--cifar", type=Path, help="small images to scale up")
    parser.add_argument("--parts", default="peers,data")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--levels", default=".9,.8,.7")
    parser.add_argument("--methods", default=",".join(method.replace(", ", "; ") for method in METHODS))
    parser.add_argument("--couple", action="store_true", help="residual streams are narrowed too")
    parser.add_argument("--device", default="cpu")


def make_pictures_bench(found: Run, name: str, images: Path) -> Bench:
    """One network calibrated on the given images."""
    given = found.options
    spec = {**NETWORKS[name], "checkpoint": str(given.checkpoints / NETWORKS[name]["checkpoint"])}
    spec |= {"data": str(images), "eval": str(given.eval), "batch_size": 32, "device": given.device}
    if given.couple:
        spec["couple"] = True
    return bench_of_recipe(name, make_recipe(spec), 10**9)


def peers(found: Run) -> None:
    """Top-1 of every method at every level."""
    given = found.options
    levels = [float(part) for part in given.levels.split(",")]
    methods = [part.replace("; ", ", ") for part in given.methods.split(",")]
    for name in given.networks.split(","):
        began = time.perf_counter()
        bench = make_pictures_bench(found, name, given.images)
        found.say(f"{name}: recorded, selected and measured in {time.perf_counter() - began:.0f} s")
        cells = {}
        for level in levels:
            for method in methods:
                cells[method, level] = cell = run_cell(bench, method, level)
                words = f"{name} {method} {level:g}: {in_short(cell)}"
                found.say(f"{words}, {cell['macs']:.3f} MACs, {cell['seconds']:.0f} s")
        original = next(iter(cells.values()))["original"]
        rows = [(method, *(in_short(cells[method, level]) for level in levels)) for method in methods]
        header = ("method", *(f"{level:g} of the MACs" for level in levels))
        found.table(f"{name}: top-1 % and loss without fine-tuning (original {original:.1f})", header, rows)
        for level in levels:
            others = [cells[method, level] for method in methods if not method.startswith("ours")]
            if ("ours", level) in cells and others:
                ours = cells["ours", level]
                lead = ours["top1"] - max(each["top1"] for each in others)
                found.goal(f"{name}-lead-at-{level:g}", lead, 0.0, at_least=True, unit=" points")
                lead = min(each["loss"] for each in others) - ours["loss"]
                found.goal(f"{name}-lead-in-loss-at-{level:g}", lead, 0.0, at_least=True, unit=" nats")
            judge(found, name, level, "pictures", cells.get(("ours", level)))


def in_short(cell: dict[str, Any]) -> str:
    """Top-1 in %, and the loss on the labelled pictures, which tells more: a picture more or less is .2 points."""
    return f"{cell['top1']:.1f} ({cell['loss']:.3f})"


def judge(found: Run, name: str, level: float, data: str, cell: dict[str, Any] | None) -> None:
    """The goal of a network at a level on one kind of data, where there is one."""
    if cell is not None and (name, level, data) in WANTED:
        lost = cell["original"] - cell["top1"]
        found.goal(f"{name}-{level:g}-points-lost-with-{data}", lost, WANTED[name, level, data], unit=" points")


def data_worth(found: Run) -> None:
    """The first network at .8 of the MACs, calibrated on images of several kinds."""
    given = found.options
    name, level = given.networks.split(",")[0], 0.8
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for label, make in kinds_of_images(given, quick=found.quick).items():
            path = Path(folder) / "images.npz"
            images = make()
            np.savez(path, images=images)
            bench = make_pictures_bench(found, name, path)
            cells = [run_cell(bench, method, level) for method in ("ours, one sweep", "ours")]
            rows.append((label, len(images), *(cell["top1"] - cell["original"] for cell in cells), cells[-1]["loss"]))
            found.say(f"{label}: {rows[-1]}")
            judge(found, name, level, label, cells[-1])
    header = ("calibrated on", "images", "points, one sweep", "points, all sweeps", "loss on the labelled pictures")
    found.table(f"{name} at {level:g} of the MACs", header, rows)


def kinds_of_images(given: argparse.Namespace, *, quick: bool) -> dict[str, Callable[[], np.ndarray]]:
    """Label -> images (N, 224, 224, 3) uint8."""
    pictures = np.load(given.images)["images"]

    def noise() -> np.ndarray:
        draw = np.random.default_rng(0).normal(pictures.mean(), pictures.std(), pictures.shape).round()
        return draw.clip(0, 255).astype(np.uint8)

    def scaled() -> np.ndarray:
        small = torch.from_numpy(np.load(given.cifar)["images"][: len(pictures)]).permute(0, 3, 1, 2)
        large = torch.nn.functional.interpolate(small.float(), pictures.shape[1:3], mode="bilinear")
        return large.round().byte().permute(0, 2, 3, 1).numpy()

    kinds: dict[str, Callable[[], np.ndarray]] = {f"{FEW} pictures": lambda: pictures[:FEW]}
    if quick:
        return kinds
    kinds |= {"pictures": lambda: pictures, "noise": noise}
    if given.photos:
        kinds["photographs"] = lambda: np.load(given.photos)["images"]
    if given.cifar:
        kinds["CIFAR-10 scaled up"] = scaled
    return kinds


def main() -> int:
    found = start("pictures", __doc__, add_options=options)
    parts = ["data"] if found.quick else found.options.parts.split(",")
    for part in parts:
        {"peers": peers, "data": data_worth}[part](found)
    return found.finish()


if __name__ == "__main__":
    raise SystemExit(main())

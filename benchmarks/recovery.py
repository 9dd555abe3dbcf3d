"""Recovery without labels: ResNet-20 at half of the MACs, cut alone and recovered, by how many images there are.

    python -m benchmarks.recovery --checkpoints FOLDER --data FOLDER [--images 2000,10000,50000] [--seeds 0,1]
                                  [--device cuda] [--share .5] [--network resnet20] [--cuts FOLDER] [--quick]

FOLDER of the data holds cifar10-{train,test}.npz; a tenth of the images is held back; nothing learns labels; those
of that tenth say only whether accuracy fell. The cut is fitted to the first 10 000 at most, the recovery to all. Scored
are all test images. Seconds are of the processor's time, on a GPU of the wall's. Each row is printed to stderr as soon
as it is there. `--cuts` keeps the cut networks for another run. Where the search fails on the device it is done on the
processor, and said. `--quick`: 300 images, 40 steps, one seed, 1 000 test images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality import network_recipe, plain
from benchmarks.reporting import Run, start
from compress.api.steps.cutting import cut_network
from compress.api.steps.tuning import recover_module
from compress.api.steps.widths import make_problem
from compress.arithmetic import reproducible
from compress.compression.layers.layer import LayerOptions
from compress.compression.problem import Problem, SampleStream
from compress.compression.searching.curves import prepare_search
from compress.compression.searching.search import search_widths
from compress.errors import CompressError, first_line
from compress.preparation import Prepared, prepare
from compress.progress import SilentProgress
from compress.recipe import Recipe

WANTED = {2000: (88.0, 89.0), 10_000: (None, 90.5), 50_000: (None, 91.5)}  # images -> cut alone, recovered
MOST_TO_CUT = 10_000  # images that the cut is fitted to
MOST_PASSES = 40.0  # forward passes over the calibration images, search and recovery, with 2 000 images


@dataclass(frozen=True, eq=False)
class Bench:
    """One network on a number of images.

    Attributes:
        forward: seconds of one plain pass over the images, as `clock` counts them.
    """

    recipe: Recipe
    prepared: Prepared
    problem: Problem
    forward: float


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of a network and its weights in the original shapes.

    Attributes:
        seconds: that it took, as `clock` counts them; passes: as many plain passes over its images took as long.
    """

    kept: dict[str, Tensor]
    weights: dict[str, Tensor]
    seconds: float
    passes: float | None = None


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--images", default="2000,10000,50000")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cuts", type=Path, help="folder of cut networks; those that are there are not made again")
    parser.add_argument("--only-cut", action="store_true", help="fill the folder, recover nothing")
    parser.add_argument("--recover", default="auto", help="auto or a number of steps")


def main() -> int:
    found = start("recovery", __doc__, add_options=options)
    given = found.options
    counts = [300] if found.quick else [int(part) for part in given.images.split(",")]
    seeds = [0] if found.quick else [int(part) for part in given.seeds.split(",")]
    found.say(f"{given.network} at {given.share:g} of the MACs on {given.device}; a tenth of the images held back")
    if given.only_cut:
        for images, seed in ((images, seed) for seed in seeds for images in counts):
            cut = made_cut(found, min(images, MOST_TO_CUT), seed)
            print(f"{images} images, seed {seed}: cut in {cut.seconds:.0f} s", file=sys.stderr, flush=True)
        return 0
    rows = [run_cell(found, images, seed) for seed in seeds for images in counts]
    report(found, rows, counts)
    return found.finish()


@reproducible()
def run_cell(found: Run, images: int, seed: int) -> dict[str, Any]:
    """One cut and its recovery, scored."""
    given, test = found.options, 1000 if found.quick else 10_000
    cut = made_cut(found, min(images, MOST_TO_CUT), seed)
    bench = make_bench(given, images, seed, given.device)
    device = bench.problem.device
    try:
        module = narrowed(bench, cut)
    except (CompressError, RuntimeError) as fault:
        if given.device == "cpu":
            raise
        found.say(f"narrowing failed on {given.device} ({first_line(fault)}) and is done on the processor")
        module = narrowed(make_bench(given, images, seed, "cpu"), cut).to(device)
    began, progress = clock(device), SilentProgress()
    recovered = recover_module(bench.prepared, bench.problem, module, list(cut.kept.values()), bench.recipe, progress)
    spent = clock(device) - began
    tuning = None if recovered is None else recovered[1].report(None)
    row = {
        "images": images,
        "seed": seed,
        "original": top1(bench.prepared.network.module, bench.prepared, test),
        "cut": top1(module, bench.prepared, test),
        "recovered": top1(module if recovered is None else recovered[0], bench.prepared, test),
        "steps": None if tuning is None else tuning.length,
        "kept step": None if tuning is None else tuning.kept,
        "cutting s": cut.seconds,
        "recovery s": spent,
        "passes": None if cut.passes is None else cut.passes + spent / bench.forward,
        "notes": "; ".join(progress.notes),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def narrowed(bench: Bench, cut: Cut) -> nn.Module:
    """The network with smaller tensors, compared with the masked original."""
    weights = dict(bench.prepared.network.state)
    weights.update({name: tensor.to(bench.problem.device) for name, tensor in cut.weights.items()})
    return cut_network(bench.prepared, bench.problem, cut.kept, weights)[0].module


def make_bench(given: argparse.Namespace, images: int, seed: int, device: str) -> Bench:
    """Load and trace the network."""
    recipe = network_recipe(given.network, given.checkpoints, given.data, images, seed)
    asked = "40" if given.quick else given.recover
    steps = asked if asked == "auto" else int(asked)
    recipe = recipe.model_copy(update={"device": device, "macs": given.share, "recover": steps})
    torch.manual_seed(seed)
    prepared = prepare(recipe, SilentProgress(), needs_data=True)
    problem = make_problem(prepared, recipe)
    return Bench(recipe, prepared, problem, forward_seconds(prepared, problem))


def made_cut(found: Run, images: int, seed: int) -> Cut:
    """A cut from the folder of those, or made; on the processor where the device's search fails."""
    given = found.options
    name = f"{given.network}-{given.share:g}-{images}-{seed}.pt"
    path = None if given.cuts is None else given.cuts / name
    if path is not None and path.exists():
        return Cut(**torch.load(path, weights_only=True))
    try:
        cut = make_cut(make_bench(given, images, seed, given.device), given.share)
    except (CompressError, RuntimeError) as fault:
        if given.device == "cpu":
            raise
        found.say(f"the search failed on {given.device} ({first_line(fault)}) and is done on the processor")
        print(f"the search failed on {given.device}: {fault}", file=sys.stderr, flush=True)
        cut = make_cut(make_bench(given, images, seed, "cpu"), given.share)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({each.name: getattr(cut, each.name) for each in fields(cut)}, path)
    return cut


def make_cut(bench: Bench, share: float) -> Cut:
    """Search widths at a share of the MACs."""
    device = bench.problem.device
    began = clock(device)
    layers, progress = plain(LayerOptions.of(bench.recipe)), SilentProgress()
    search = prepare_search(bench.problem, layers, progress)
    compressed = search_widths(
        search, layers, progress, budgets={"macs": share}, wanted=None, sweeps=bench.recipe.refine
    ).compressed
    kept = {result.name: result.kept.cpu() for result in compressed.results if result.is_cut}
    original = bench.prepared.network.state
    weights = {name: value.cpu() for name, value in compressed.state.items() if value is not original[name]}
    seconds = clock(device) - began
    return Cut(kept, weights, seconds, seconds / bench.forward)


def forward_seconds(prepared: Prepared, problem: Problem) -> float:
    """Seconds of one plain pass over the calibration images, read included."""
    device = problem.device

    def run(stream: SampleStream, number: int) -> None:
        prepared.network.module(*(tensor.to(device) for tensor in stream.read(number)))

    with torch.inference_mode():
        run(problem.fitting, 0)
        began = clock(device)
        for stream in (problem.fitting, problem.held_back):
            for number in range(len(stream.sizes())):
                run(stream, number)
        return clock(device) - began


def clock(device: torch.device) -> float:
    """Seconds of this process on processors, which other jobs do not stretch; of wall time once a GPU is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def top1(module: nn.Module, prepared: Prepared, test: int) -> float:
    """Points on the first test images."""
    assert prepared.evaluation is not None, "the recipe names test images"
    device, right, seen = prepared.network.device, 0, 0
    with torch.inference_mode():
        for batch in prepared.evaluation.batches(250, torch.arange(min(test, prepared.evaluation.sample_count))):
            answers = module(batch.inputs.to(device)).argmax(1).cpu()
            right, seen = right + int((answers == batch.labels).sum()), seen + len(answers)
    return 100 * right / seen


def report(found: Run, rows: list[dict[str, Any]], counts: list[int]) -> None:
    """The table and the goals."""
    header = ("images", "seed", "cut", "recovered", "steps", "kept step", "cutting s", "recovery s", "passes")
    found.table(
        f"test top-1 % (original {rows[0]['original']:.2f})",
        header,
        [[f"{row[key]:.2f}" if key in ("cut", "recovered") else row[key] for key in header] for row in rows],
    )
    for row in rows:
        if row["notes"]:
            found.say(f"{row['images']} images, seed {row['seed']}: {row['notes']}")
    for images in counts:
        cells = [row for row in rows if row["images"] == images]
        for kind, wanted in zip(("cut", "recovered"), WANTED.get(images, (None, None)), strict=True):
            if wanted is not None and not found.quick:
                name = f"{found.options.network}-{images}-images-{kind}"
                found.goal(name, statistics.mean(row[kind] for row in cells), wanted, at_least=True, unit=" %")
        if images == 2000:
            passes = [row["passes"] for row in cells if row["passes"] is not None]
            found.goal("forward-passes-with-2000-images", statistics.median(passes) if passes else None, MOST_PASSES)
        if images == 50_000:
            spent = statistics.median(row["recovery s"] for row in cells)
            found.goal("seconds-of-recovery-with-50000-images", spent, "told", met=True)


if __name__ == "__main__":
    raise SystemExit(main())

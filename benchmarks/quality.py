"""Accuracy without fine-tuning at a share of the MACs: ours against every other way of cutting, on strangers' networks.

    python -m benchmarks.quality --checkpoints FOLDER --data FOLDER [--networks resnet20,cnn,smallvgg,vgg19]
                                 [--methods …] [--levels .75,.5,.35,.25] [--journal FILE] [--quick]

All methods get the same calibration images and the same share of the multiply-accumulates, are cut by the same surgery
and scored on the same test images; "+ LS" is followed by our front-to-back least-squares refit. FOLDER of the data
holds cifar10-{train,test}.npz and mnist-{train,test}.npz. `--quick`: one network, one level, five methods, 500
calibration and 1 000 test images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import onnx_peer
from benchmarks.quality_methods import (
    Kept,
    bisect_to_macs,
    equal_errors,
    orders_by_magnitude,
    orders_by_selection,
    orders_by_thinet,
    share_of_macs,
    torch_pruning,
    uniform,
)
from benchmarks.reporting import Run, start
from compress.api.steps.cutting import cut_network
from compress.api.steps.widths import make_problem
from compress.compression.layers.decisions import Given
from compress.compression.layers.layer import LayerOptions
from compress.compression.layers.refit import refit_layer
from compress.compression.pricing.allocate import allocate
from compress.compression.problem import Problem
from compress.compression.searching.curves import Search, prepare_search
from compress.compression.searching.search import plan_widths, search_widths
from compress.compression.sweep import refine, sweep
from compress.errors import GateError
from compress.preparation import Prepared, prepare
from compress.progress import SilentProgress
from compress.recipe import Recipe, make_recipe

CIFAR = {"mean": (0.4914, 0.4822, 0.4465)}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet20": {"checkpoint": "resnet20-cifar10-wrapped.pth", **CIFAR, "std": (0.2023, 0.1994, 0.2010)},
    "cnn": {
        "checkpoint": "cnn-cifar10-sequential.pth",
        "arch": "tests.strangers:SequentialCnn",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    },
    "smallvgg": {
        "checkpoint": "smallvgg-mnist.pt",
        "arch": "tests.strangers:SmallVgg",
        "mean": (0.1307,),
        "std": (0.3081,),
    },
    "vgg19": {"checkpoint": "vgg19-cifar10.pt", **CIFAR, "std": (0.2470, 0.2435, 0.2616)},
}
DATA = {"smallvgg": "mnist"}
NORMALISED = ("resnet20", "vgg19")  # with BatchNorm or residuals
LINEAR = "ours, one sweep"  # without those that look behind the next ReLU, which no peer has
GRAIL = "L1, ridge on the original's features"  # GRAIL's idea (CPAL 2026)
BLOCKS = "blocks alone + LS"  # PRACTISE's idea (Wang, Guo and Wu, CVPR 2023): whole blocks go, what is around makes up
LEVELS = (0.75, 0.5, 0.35, 0.25)
METHODS = (
    "ours",
    LINEAR,
    "uniform, our selection",
    "plain lasso + LS",
    "ThiNet greedy + LS",
    "pivoted QR + LS",
    "TP magnitude",
    "TP magnitude + LS",
    "TP BN scale",
    "TP BN scale + LS",
    "TP Taylor",
    "TP Taylor + LS",
    GRAIL,
    BLOCKS,
    onnx_peer.METHOD,
)


@dataclass(eq=False)
class Bench:
    """One prepared network with everything that the methods share.

    Attributes:
        search: moments, curves and sensitivities of the original network.
    """

    name: str
    recipe: Recipe
    prepared: Prepared
    problem: Problem
    search: Search
    evaluation: Any
    choices: dict[str, Callable[[float], Kept]]
    original: list[float] = field(default_factory=list)

    def choose(self, method: str, share: float) -> Kept:
        """The units that a peer's method keeps within a share of the MACs."""
        own = method.removesuffix(" + LS")
        if own not in self.choices:
            self.choices[own] = self._chooser(own)
        return bisect_to_macs(self.search.model, self.choices[own], share)

    def _chooser(self, method: str) -> Callable[[float], Kept]:
        moments, problem = self.search.moments, self.problem
        if method == "pivoted QR":
            return equal_errors(problem, moments, "pivoted")
        if method == "plain lasso":
            return uniform(orders_by_selection(problem, moments, "lasso"), problem)
        if method == "ThiNet greedy":
            return uniform(orders_by_thinet(problem, moments), problem)
        if method == "uniform, our selection":
            return uniform({name: curve.units for name, curve in self.search.curves.items()}, problem)
        if method == GRAIL:
            return uniform(orders_by_magnitude(problem), problem)
        kind = {"TP magnitude": "magnitude", "TP BN scale": "bnscale", "TP Taylor": "taylor"}[method]
        batches = []
        if kind == "taylor":
            for number in range(min(len(problem.fitting.sizes()), 8)):
                batch = problem.fitting.batch(number)
                batches.append((batch.inputs.to(problem.device), batch.labels.to(problem.device)))
        return torch_pruning(self.prepared.network.module, self.prepared.network.examples[0], problem, kind, batches)

    def cut(self, kept: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> nn.Module:
        """The narrowed network with the given weights."""
        fewer = {g.name: kept[g.name] for g in self.problem.groups if len(kept[g.name]) < g.unit_count}
        return cut_network(self.prepared, self.problem, fewer, state)[0].module

    def refit(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights after our front-to-back least squares for given units."""
        options = LayerOptions.of(self.recipe)
        plan = {name: Given(units) for name, units in kept.items()}
        return sweep(self.problem, plan, plain(options), SilentProgress(), facts=self.search.facts).state

    def refit_on_original(self, kept: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights after least squares on the original network's features, blind to what earlier cuts changed."""
        state = dict(self.problem.state)
        for name, units in kept.items():
            found = refit_layer(self.search.moments[name], units, self.recipe.ridge, self.problem.state, state)
            state.update(found.weights)
        return state

    def without_blocks(self, share: float) -> tuple[Kept, Mapping[str, Tensor]]:
        """Whole blocks go, those of least damage; all else keeps its width. Nothing goes where that is not enough."""
        options, search = plain(LayerOptions.of(self.recipe)), self.search
        whole = {name: replace(curve, legal=curve.legal[-1:]) for name, curve in search.choices.curves.items()}
        try:
            widths = allocate(replace(search.choices, curves=whole), {"macs": share}).widths
        except GateError:
            return {group.name: torch.arange(group.unit_count) for group in self.problem.groups}, self.problem.state
        plan = plan_widths(search, widths)
        done = sweep(self.problem, plan, options, SilentProgress(), facts=search.facts, curves=search.curves)
        done = refine(self.problem, done, options, SilentProgress(), sweeps=self.recipe.refine)
        return {result.name: result.kept for result in done.results}, done.state

    def ours(self, share: float, *, refined: bool = True) -> tuple[Kept, Mapping[str, Tensor]]:
        """The product's own search under a MACs budget."""
        options = LayerOptions.of(self.recipe)
        found = search_widths(
            self.search,
            options,
            SilentProgress(),
            budgets={"macs": share},
            wanted=None,
            sweeps=self.recipe.refine if refined else 0,
        )
        return {result.name: result.kept for result in found.compressed.results}, found.compressed.state

    def score(self, module: nn.Module) -> dict[str, float]:
        """Top-1 points of both networks on the test images and the cut one's loss."""
        if not self.original:
            self.original.append(self._top1(self.prepared.network.module)[0])
        top1, loss = self._top1(module)
        return {"original": self.original[0], "top1": top1, "loss": loss}

    def _top1(self, module: nn.Module) -> tuple[float, float]:
        right, loss, seen = 0, 0.0, 0
        device = self.prepared.network.device
        with torch.inference_mode():
            for batch in self.evaluation.batches(min(250, self.recipe.batch_size)):
                scores, labels = module(batch.inputs.to(device)), batch.labels.to(device)
                right += int((scores.argmax(1) == labels).sum())
                loss += float(nn.functional.cross_entropy(scores.double(), labels, reduction="sum"))
                seen += len(scores)
        return 100 * right / seen, loss / seen


def plain(options: Any) -> Any:
    """The same options without certificates, which no method here needs."""
    return replace(options, certify=False)


def network_recipe(name: str, folder: Path, data: Path, calibration: int, seed: int) -> Recipe:
    """The recipe of one of `NETWORKS`."""
    spec = {**NETWORKS[name], "checkpoint": str(folder / NETWORKS[name]["checkpoint"])}
    images = DATA.get(name, "cifar10")
    spec |= {"data": str(data / f"{images}-train.npz"), "eval": str(data / f"{images}-test.npz")}
    return make_recipe({**spec, "calibration_samples": calibration, "seed": seed})


def make_bench(name: str, folder: Path, data: Path, calibration: int, test: int, seed: int = 0) -> Bench:
    """Prepare one of `NETWORKS`."""
    return bench_of_recipe(name, network_recipe(name, folder, data, calibration, seed), test)


def bench_of_recipe(name: str, recipe: Recipe, test: int) -> Bench:
    """Prepare one network: load, trace, record, select, measure sensitivities."""
    torch.manual_seed(recipe.seed)
    prepared = prepare(recipe, SilentProgress(), needs_data=True)
    problem = make_problem(prepared, recipe.model_copy(update={"macs": 0.5}))  # as under a budget: blocks may go
    search = prepare_search(problem, LayerOptions.of(recipe), SilentProgress())
    evaluation = prepared.evaluation
    if test < evaluation.sample_count:
        evaluation = First(evaluation, test)
    return Bench(name, recipe, prepared, problem, search, evaluation, {})


@dataclass(frozen=True, eq=False)
class First:
    """The first samples of a source."""

    source: Any
    count: int

    def batches(self, size: int) -> Any:
        """Batches of the first `count` samples."""
        return self.source.batches(size, torch.arange(self.count))


def run_cell(bench: Bench, method: str, share: float) -> dict[str, Any]:
    """One method at one share of the MACs."""
    began = time.perf_counter()
    if method == onnx_peer.METHOD:
        cell = onnx_peer.run(bench, share)
        original = bench.score(bench.prepared.network.module)["original"]
        spent = time.perf_counter() - began
        return {**cell, "network": bench.name, "method": method, "share": share, "seconds": spent, "original": original}
    if method.startswith("ours"):
        kept, state = bench.ours(share, refined=method == "ours")
    elif method == BLOCKS:
        kept, state = bench.without_blocks(share)
    elif method == GRAIL:
        kept = bench.choose(method, share)
        state = bench.refit_on_original(kept)
    else:
        kept = bench.choose(method, share)
        refitted = method.endswith("+ LS") or method.startswith("uniform")
        state = bench.refit(kept) if refitted else bench.problem.state
    model = bench.search.model
    widths = {name: len(units) for name, units in kept.items()}
    spent = time.perf_counter() - began
    return {
        "network": bench.name,
        "method": method,
        "share": share,
        "macs": share_of_macs(model, kept),
        "params": model.parameters(widths) / model.parameters({}),
        "seconds": spent,
        "widths": widths,
        **bench.score(bench.cut(kept, state)),
    }


QUICK = ("ours", "uniform, our selection", "pivoted QR + LS", "TP magnitude", "TP magnitude + LS")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default=",".join(method.replace(", ", "; ") for method in METHODS))
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)))
    parser.add_argument("--calibration", type=int, default=5000)
    parser.add_argument("--journal", type=Path, help="JSONL of finished cells; they are not run again")
    parser.add_argument("--show", action="store_true", help="print what the journal holds, run nothing")


def main() -> int:
    found = start("quality", __doc__, add_options=options)
    given = found.options
    networks = ["cnn"] if found.quick else given.networks.split(",")
    levels = [0.5] if found.quick else [float(part) for part in given.levels.split(",")]
    methods = list(QUICK) if found.quick else [part.replace("; ", ", ") for part in given.methods.split(",")]
    calibration, test = (500, 1000) if found.quick else (given.calibration, 10_000)
    found.say(f"{calibration} calibration images (a tenth held back), {test} test images, all of the same run")
    cells: list[dict[str, Any]] = []
    if given.journal is not None and given.journal.exists():
        cells = [json.loads(line) for line in given.journal.read_text().splitlines()]
    for name in networks:
        have = {(cell["method"], cell["share"]) for cell in cells if cell["network"] == name}
        missing = [(method, level) for level in levels for method in methods if (method, level) not in have]
        if missing and not given.show:
            bench = make_bench(name, given.checkpoints, given.data, calibration, test)
            for method, level in missing:
                cells.append(run_cell(bench, method, level))
                if given.journal is not None:
                    with given.journal.open("a") as file:
                        file.write(json.dumps(cells[-1]) + "\n")
        report(found, name, methods, levels, [cell for cell in cells if cell["network"] == name])
    return found.finish()


def report(found: Run, name: str, methods: list[str], levels: list[float], cells: list[dict[str, Any]]) -> None:
    """The table of one network and its goals."""
    by = {(cell["method"], cell["share"]): cell for cell in cells if cell["macs"] <= cell["share"] + 1e-9}
    rows = [
        (method, *(f"{by[method, level]['top1']:.2f}" if (method, level) in by else None for level in levels))
        for method in methods
    ]
    found.table(
        f"{name}: test top-1 % without fine-tuning (original {cells[0]['original']:.2f})",
        ("method", *(f"{level:g} of the MACs" for level in levels)),
        rows,
    )
    for level in levels:
        others = [by[method, level]["top1"] for method in methods if method[:4] != "ours" and (method, level) in by]
        if ("ours", level) in by and others:
            ours, best = by["ours", level]["top1"], max(others)
            clear = level in (0.5, 0.35) and name in NORMALISED
            noise = standard_error(ours, best, 1000 if found.quick else 10_000)
            found.goal(
                f"{name}-lead-at-{level:g}", ours - best, round(noise if clear else -noise, 2), at_least=True,
                unit=" points", note="one standard error of a difference",
            )  # fmt: skip


def standard_error(first: float, second: float, samples: int) -> float:
    """Points; of the difference of two accuracies in points, as if on independent samples."""
    return (sum(each * (100 - each) for each in (first, second)) / samples) ** 0.5


if __name__ == "__main__":
    raise SystemExit(main())

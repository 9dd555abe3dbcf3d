"""Layers of a low rank: networks whose pruning is refused, at equal multiplications with and without `--low-rank`.

    python -m benchmarks.low_rank [--data FOLDER] [--checkpoints FOLDER] [--shares .7,.5,.35] [--seeds 0,1] [--quick]

Three networks. `streams`: four layers that each add into the stream they read, so that no unit can go. `blocks`: four
blocks with an inner width, so that widths reach a part of the budgets. Both are trained here, on MNIST where FOLDER of
the data holds mnist-{train,test}.npz, else on the packaged digits. `resnet20`: resnet20-cifar10-wrapped.pth of the
checkpoints, with cifar10-{train,test}.npz; left out without these. Nothing is recovered. Times are of the whole
network, eager, batches of 64, one thread, the fastest pass as a share of the original's. The peer is the truncated
singular value decomposition of the same weights at the same ranks in the same cut network. `--quick`: digits, one seed,
two shares, no ResNet-20.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality import network_recipe
from benchmarks.reporting import Run, start
from compress.api.live import prepare_live
from compress.api.steps.cutting import cut_network
from compress.api.steps.widths import make_problem
from compress.arithmetic import reproducible
from compress.compression.layers.layer import LayerOptions
from compress.compression.searching.curves import prepare_search
from compress.compression.searching.search import SearchResult, search_widths
from compress.convex.low_rank import balanced_factors
from compress.data import DataSource, open_data
from compress.errors import GateError, NothingToCompressError
from compress.graph.cost import batch_of, count_macs, measure_latency
from compress.preparation import Prepared, prepare
from compress.progress import SilentProgress
from compress.recipe import Recipe

BATCH, CALIBRATION, WIDTH = 64, 1000, 256
METHODS = ("widths", "widths and ranks", "plain SVD at these ranks")


class Streams(nn.Module):
    """Layers that add into the stream that they read: no unit of it can go."""

    def __init__(self, inputs: int, inner: int | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(self.block(inner) for _ in range(4))

    @staticmethod
    def block(inner: int | None) -> nn.Module:
        if inner is None:
            return nn.Linear(WIDTH, WIDTH)
        return nn.Sequential(nn.Linear(WIDTH, inner), nn.ReLU(), nn.Linear(inner, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with its data, prepared under given options, and what its test samples are."""

    name: str
    prepare: Callable[[dict[str, Any]], tuple[Prepared, Recipe]]
    test: DataSource


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--shares", default=".7,.5,.35")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", default="", help="part of a network's name")


def main() -> int:
    found = start("low_rank", __doc__, add_options=options)
    torch.set_num_threads(1)
    shares = [float(text) for text in (".5,.35" if found.quick else found.options.shares).split(",")]
    seeds = [int(text) for text in ("0" if found.quick else found.options.seeds).split(",")]
    rows: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for seed in seeds:
        for subject in subjects(found, seed):
            for share in shares:
                for method, row in cells(subject, share, seed):
                    rows.setdefault((subject.name, share, method), []).append(row)
                    print(subject.name, share, seed, method, row, file=sys.stderr, flush=True)
    found.table(
        f"Medians of {len(seeds)} seeds; {CALIBRATION} samples to calibrate on",
        ("network", "share", "method", "MACs left", "time left", "top-1 %", "before", "layers of low rank"),
        [
            (*key, *(median(many, name) for name in ("macs", "time", "top1", "before", "layers")))
            for key, many in rows.items()
        ],
    )
    tell_goals(found, rows, shares)
    return found.finish()


def median(many: list[dict[str, float]], name: str) -> float | None:
    known = [row[name] for row in many if name in row]
    return round(statistics.median(known), 3) if known else None


def tell_goals(found: Run, rows: dict[tuple[str, float, str], list[dict[str, float]]], shares: list[float]) -> None:
    """Where ranks reach a budget, what they win over widths, and regression over plain decomposition."""
    names = dict.fromkeys(name for name, _, _ in rows)
    for name in names:
        many = {(share, method): rows.get((name, share, method), []) for share in shares for method in METHODS}
        cell = {key: median(few, "top1") for key, few in many.items()}
        reached = sum(cell[share, METHODS[1]] is not None for share in shares)
        alone = sum(cell[share, METHODS[0]] is not None for share in shares)
        found.goal(f"{name}, budgets-kept", reached, len(shares), at_least=True, note=f"{alone} by widths alone")
        for kind, other in (("over-widths", METHODS[0]), ("over-plain-svd", METHODS[2])):
            gains = [
                first - second
                for share in shares
                if (first := cell[share, METHODS[1]]) is not None and (second := cell[share, other]) is not None
            ]
            worst = round(min(gains), 2) if gains else None
            found.goal(f"{name}, {kind}, least-gain", worst, -0.3, at_least=True, unit=" points")


def subjects(found: Run, seed: int) -> Iterator[Subject]:
    """The networks, trained where they are not given."""
    given = found.options
    place = None if given.data is None or found.quick else given.data / "mnist-train.npz"
    train, test = "digits", "digits?train=false"
    if place is not None and place.is_file():
        train, test = str(place), str(given.data / "mnist-test.npz")
    for name, inner in (("streams", None), ("blocks", 128)):
        if given.only in name:
            yield trained(name, inner, open_data(train, None), open_data(test, None), seed)
    if not found.quick and given.checkpoints is not None and given.data is not None and given.only in "resnet20":

        def prepared(more: dict[str, Any]) -> tuple[Prepared, Recipe]:
            recipe = network_recipe("resnet20", given.checkpoints, given.data, CALIBRATION, seed)
            recipe = recipe.model_validate({**recipe.model_dump(), **more})
            return prepare(recipe, SilentProgress(), needs_data=True), recipe

        evaluation = prepared({})[0].evaluation
        assert evaluation is not None, "the recipe names one"
        yield Subject("resnet20", prepared, evaluation)


def trained(name: str, inner: int | None, train: DataSource, test: DataSource, seed: int) -> Subject:
    """A residual network of linear layers, trained with Adam and weight decay."""
    torch.manual_seed(seed)
    first = next(iter(train.batches(1))).inputs
    module = Streams(first[0].numel(), inner)
    epochs = max(2, min(40, 120_000 // train.sample_count))
    descent = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        order = torch.randperm(train.sample_count)
        for batch in train.batches(128, order):
            descent.zero_grad()
            loss = nn.functional.cross_entropy(module(batch.inputs), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            descent.step()
    module.eval()
    images = next(iter(train.batches(CALIBRATION, torch.randperm(train.sample_count)[:CALIBRATION]))).inputs

    def prepared(more: dict[str, Any]) -> tuple[Prepared, Recipe]:
        return prepare_live(module, [images], None, {**more, "seed": seed}, SilentProgress(), "prune")

    return Subject(name, prepared, test)


@reproducible()
def cells(subject: Subject, share: float, seed: int) -> list[tuple[str, dict[str, float]]]:
    """Each method at one share; an empty row where it cannot keep the budget."""
    more = {"macs": share, "recover": "off", "latency_batch": BATCH, "latency_threads": 1, "seed": seed}
    rows: list[tuple[str, dict[str, float]]] = []
    for method in METHODS[:2]:
        prepared, recipe = subject.prepare({**more, "low_rank": method == METHODS[1]})
        try:
            searched = search(prepared, recipe)
        except (GateError, NothingToCompressError):
            rows.append((method, {}))
            continue
        rows.append((method, scored(subject, prepared, searched, searched.compressed.state)))
        if searched.compressed.ranks:
            rows.append((METHODS[2], scored(subject, prepared, searched, decomposed(searched))))
    return rows


def search(prepared: Prepared, recipe: Recipe) -> SearchResult:
    """The widths and ranks under the recipe's budget, refitted."""
    problem, layers = make_problem(prepared, recipe), LayerOptions.of(recipe)
    known = prepare_search(problem, layers, SilentProgress())
    return search_widths(known, layers, SilentProgress(), budgets=recipe.budgets, wanted=None, sweeps=recipe.refine)


def decomposed(searched: SearchResult) -> dict[str, Tensor]:
    """The state with the weights of a low rank made anew: singular values of what they were before, cut off."""
    state = dict(searched.compressed.state)
    for weight, rank in searched.compressed.ranks.items():
        whole = searched.compressed.wholes[weight]
        left, right = balanced_factors(whole[weight].double().flatten(1), rank)
        state.update(whole)
        state[weight] = (left @ right).reshape(whole[weight].shape).to(whole[weight])
    return state


def scored(subject: Subject, prepared: Prepared, searched: SearchResult, state: dict[str, Tensor]) -> dict[str, float]:
    """What is left of multiplications and time, and the accuracy, of a search's network with this state."""
    compressed, original = searched.compressed, prepared.opened.module
    kept = {result.name: result.kept for result in compressed.results if result.is_cut}
    module = cut_network(prepared, searched.search.problem, kept, state, compressed.ranks)[0].module
    examples = prepared.network.examples
    times = measure_latency((original, module), batch_of(examples, BATCH), most=60)
    return {
        "macs": count_macs(module, examples) / count_macs(original, examples),
        "time": times[1].least / times[0].least,
        "top1": accuracy(module, subject.test),
        "before": accuracy(original, subject.test),
        "layers": len(compressed.ranks),
    }


def accuracy(module: nn.Module, source: DataSource) -> float:
    """Percent of the test samples."""
    right, count = 0, 0
    with torch.inference_mode():
        for batch in source.batches(500):
            right += int((module(batch.inputs).argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    return 100 * right / count


if __name__ == "__main__":
    raise SystemExit(main())

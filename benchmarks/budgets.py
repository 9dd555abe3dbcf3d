"""Searching widths under budgets: what it costs, what it saves in time, what each ingredient adds.

    python -m benchmarks.budgets --checkpoints FOLDER --data FOLDER
                                 [--parts point,latency,time,ablation,smallest] [--quick]

point: the VGG-19 within 0.45 of the MACs and 0.15 of the parameters, search time against plain forward passes, and the
same cut with 300 steps of label-free refit. latency: both networks at half of the MACs, eager and compiled. time: a
share of the time asked for, with blocks that may go and without, and MACs alone to the same time. ablation: each
ingredient of the search left out in turn. smallest: the smallest share of the MACs within half a point and one point.
`--quick`: ablation alone, one network, 500 calibration and 1 000 test images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from benchmarks.quality import Bench, First, make_bench, network_recipe, plain, run_cell
from benchmarks.quality_methods import bisect_to_macs, share_of_macs
from benchmarks.reporting import Run, start
from compress.api.steps.forms import choose_form
from compress.api.steps.widths import make_problem
from compress.compression.layers.decisions import Ingredients, Width
from compress.compression.layers.layer import LayerOptions
from compress.compression.pricing.allocate import DamageCurve, allocate
from compress.compression.pricing.costs import cost_model
from compress.compression.pricing.latency import MOST_PASSES, Timing
from compress.compression.searching.curves import prepare_search
from compress.compression.searching.search import search_widths, time_allocation
from compress.compression.sweep import refine, sweep
from compress.graph.cost import measure_latency
from compress.preparation import prepare
from compress.progress import SilentProgress
from compress.recipe import Recipe
from compress.training.recovery import recover
from compress.units.groups import UnitGroup
from compress.units.surgery import narrow

PARTS = ("point", "latency", "time", "ablation", "smallest")
TIME = 0.65  # of the original's
GOING, STAYING, MACS_ALONE = "time, blocks may go", "time, every block stays", "MACs alone, the same time"
VARIANTS_OF_TIME = (GOING, STAYING, MACS_ALONE)
PASSES_OF_TIME = 5  # times that two networks are timed, whose fastest passes count
POINT = {"macs": 0.45, "params": 0.15}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--networks", default="resnet20,cnn", help="of all parts but the first")
    parser.add_argument("--calibration", type=int, default=2000, help="images of those two parts")
    parser.add_argument("--time", type=float, default=TIME, help="share of the time that the part `time` asks for")
    parser.add_argument("--batches", default="1,64", help="of the part `time`")
    parser.add_argument("--recover", default="auto", choices=("auto", "off"), help="of the part `time`")


def main() -> int:
    found = start("budgets", __doc__, add_options=options)
    parts = ["ablation"] if found.quick else found.options.parts.split(",")
    for part in parts:
        {"point": point, "latency": latency, "time": time_budgets, "ablation": ablation, "smallest": smallest}[part](
            found
        )
    return found.finish()


def bench_of(found: Run, name: str, calibration: int, test: int = 10_000) -> Bench:
    given = found.options
    return make_bench(name, given.checkpoints, given.data, calibration, test)


def forward_seconds(bench: Bench, count: int) -> float:
    """Processor seconds of one plain pass over calibration images."""
    source = First(bench.prepared.calibration, count)
    began = time.process_time()
    with torch.inference_mode():
        for batch in source.batches(128):
            bench.prepared.network.module(batch.inputs)
    return time.process_time() - began


def point(found: Run) -> None:
    """One point of the VGG-19 under two budgets, without and with label-free steps."""
    count = 10_000
    began = time.process_time()
    bench = bench_of(found, "vgg19", count)
    preparing = time.process_time() - began
    forward = forward_seconds(bench, count)
    began = time.process_time()
    searched = search_widths(
        bench.search,
        LayerOptions.of(bench.recipe),
        SilentProgress(),
        budgets=POINT,
        wanted=None,
        sweeps=bench.recipe.refine,
    ).compressed
    sweep = time.process_time() - began
    kept = {result.name: result.kept for result in searched.results}
    module = bench.cut(kept, searched.state)
    scores = bench.score(module)
    began = time.process_time()
    prepared, problem = bench.prepared, bench.problem
    tuned, tuning = recover(
        prepared.network.module,
        prepared.network.program,
        module,
        prepared.network.examples,
        problem.fitting,
        problem.held_back,
        problem.outputs,
        SilentProgress(),
        steps=300,
    )
    spent = time.process_time() - began
    after = bench.score(tuned)
    widths = {name: len(units) for name, units in kept.items()}
    model = bench.search.model
    costs = [model.total(cost, widths) / model.total(cost, {}) for cost in ("macs", "params")]
    found.table(
        f"VGG-19, {count} calibration images",
        ("", "test top-1 %", "MACs", "parameters", "processor seconds", "forward passes"),
        [
            ("original", scores["original"], 1.0, 1.0, forward, 1.0),
            ("cut, no fine-tuning", scores["top1"], *costs, preparing + sweep, (preparing + sweep) / forward),
            (f"and {tuning.steps} label-free steps", after["top1"], *costs, spent, spent / forward),
        ],
    )
    found.goal("vgg19-points-lost", scores["original"] - scores["top1"], 0.5)
    found.goal("vgg19-points-lost-after-300-steps", scores["original"] - after["top1"], 0.5)
    found.goal("search-in-forward-passes", (preparing + sweep) / forward, 12.0)


def latency(found: Run) -> None:
    """Latency at half of the MACs against the original's, interleaved passes."""
    rows = []
    for name in found.options.networks.split(","):
        spec = network_recipe(name, found.options.checkpoints, found.options.data, 200, 0)
        prepared = prepare(spec, SilentProgress(), needs_data=True)
        problem = make_problem(prepared, spec)
        model = cost_model(
            problem.program, problem.groups, dict(prepared.network.module.named_parameters()), problem.forward_macs
        )
        kept = bisect_to_macs(model, lambda fraction, own=problem.groups: eighths(own, fraction), 0.5)
        fewer = {g.name: kept[g.name] for g in problem.groups if len(kept[g.name]) < g.unit_count}
        pair = (prepared.network.module, narrow(prepared.network.module, fewer, problem.groups).module)
        for mode in ("eager", "torch.compile"):
            for size in (1, 64):
                inputs = (
                    prepared.network.examples[0][:1].expand(size, *prepared.network.examples[0].shape[1:]).contiguous()
                )
                runs: list[Callable[[Tensor], Any]] = list(pair)
                if mode == "torch.compile":
                    torch._dynamo.reset()
                    runs = [torch.compile(module, dynamic=False) for module in pair]
                ratio, before, after = interleaved(runs, inputs)
                rows.append((name, mode, size, before, after, ratio, share_of_macs(model, kept)))
    header = ("network", "", "batch", "before, ms", "after, ms", "ratio", "MACs")
    found.table("Latency at half of the MACs, uniform widths in multiples of 8", header, rows)
    for name, mode, size, *_, ratio, _ in rows:
        found.goal(f"latency-{name}-{mode}-{size}", ratio, 0.65)


def time_budgets(found: Run) -> None:
    """What a budget of time comes to in measured time and in accuracy, and what MACs alone do in the same time."""
    asked, rows = found.options.time, []
    for name in found.options.networks.split(","):
        for batch in (int(part) for part in found.options.batches.split(",")):
            spec = network_recipe(name, found.options.checkpoints, found.options.data, found.options.calibration, 0)
            spec = spec.model_copy(
                update={"latency_batch": batch, "latency_threads": 1, "recover": found.options.recover}
            )
            for label in VARIANTS_OF_TIME:
                budget = macs_within_time(spec, asked) if label == MACS_ALONE else {"latency": asked}
                row = (name, batch, label, *run_budget(spec.model_copy(update=budget), depth=label != STAYING))
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
    header = ("network", "batch", "asked for", "time", "MACs", "cut", "recovered", "blocks removed")
    found.table("A budget of time, one thread, fastest passes after the cut; test top-1 %", header, rows)
    for name, batch, label, share, *_ in rows:
        if label == GOING:
            found.goal(f"time-{name}-batch-{batch}", share, asked)
            of = {row[2]: row[6] for row in rows if row[:2] == (name, batch)}
            for other in (STAYING, MACS_ALONE):
                lead = of[GOING] - of[other]
                found.goal(f"time-{name}-batch-{batch}-points-over-{other.split(',')[-1].strip().replace(' ', '-')}",
                           lead, 0.0, at_least=True)  # fmt: skip


def run_budget(spec: Recipe, *, depth: bool) -> tuple[float, float, float, float, int]:
    """Shares of time and MACs that stay, test top-1 % cut alone and recovered, and how many blocks went."""
    result = compress.run(spec.model_copy(update={"depth": depth}), dry_run=True)
    report = result.report
    assert report is not None
    assert report.evaluation is not None
    tuning = report.finetune
    before = report.evaluation if tuning is None or tuning.evaluation_before is None else tuning.evaluation_before
    assert report.evaluation.top1 is not None
    assert before.top1 is not None
    original = prepare(spec, SilentProgress(), needs_data=True).network
    times: list[list[float]] = [[], []]
    timing = Timing(spec.latency_batch, spec.latency_threads)
    with timing.running():
        for _ in range(PASSES_OF_TIME):
            pair = measure_latency((original.module, result.module), timing.inputs(original), most=MOST_PASSES)
            for own, each in zip(times, pair, strict=True):
                own.append(each.least)
    share = min(times[1]) / min(times[0])
    points = (100 * before.top1.after, 100 * report.evaluation.top1.after)
    return share, 1 / report.cost.macs.factor, *points, len(report.removed)


def macs_within_time(spec: Recipe, wanted: float) -> dict[str, Any]:
    """Options of the largest share of the MACs, by halving, at which widths by MACs alone take `wanted` of the time.

    The network has the form that a budget of that time gives it.
    """
    prepared = prepare(spec, SilentProgress(), needs_data=True)
    problem = make_problem(prepared, spec.model_copy(update={"macs": wanted}))
    problem, _ = choose_form(problem, spec.model_copy(update={"latency": wanted}), SilentProgress())
    search = prepare_search(problem, LayerOptions.of(spec), SilentProgress())
    low, high = 0.1, 1.0
    for _ in range(7):
        share = (low + high) / 2
        widths = allocate(search.choices, {"macs": share}).widths
        if min(time_allocation(search, widths) for _ in range(3)) <= wanted:
            low = share
        else:
            high = share
    return {
        "macs": low,
        "fold": "on" if problem.form.folds else "off",
        "in_place": "on" if problem.form.execution.in_place else "off",
        "memory_format": "channels_last" if problem.form.channels_last else "keep",
    }


def eighths(groups: Sequence[UnitGroup], fraction: float) -> dict[str, Tensor]:
    """The first units of every group: a fraction, rounded to a multiple of 8."""
    return {
        group.name: torch.arange(min(group.unit_count, max(8, 8 * round(fraction * group.unit_count / 8))))
        for group in groups
    }


def interleaved(runs: list[Callable[[Tensor], Any]], inputs: Tensor) -> tuple[float, float, float]:
    """Median of the ratios of neighbouring passes, and both medians in milliseconds."""
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        for repeat in range(2 + 15):
            for run, own in zip(runs, times, strict=True):
                began = time.perf_counter()
                run(inputs)
                if repeat >= 2:
                    own.append(1e3 * (time.perf_counter() - began))
    ratios = [after / before for before, after in zip(*times, strict=True)]
    return statistics.median(ratios), statistics.median(times[0]), statistics.median(times[1])


def ablation(found: Run) -> None:
    """The search with one ingredient left out at a time."""
    networks = ["cnn"] if found.quick else found.options.networks.split(",")
    calibration, test = (500, 1000) if found.quick else (found.options.calibration, 10_000)
    found.say(f"ablation: {calibration} calibration images, {test} test images")
    columns: list[str] = []
    table: dict[str, list[float]] = {}
    for name in networks:
        bench = bench_of(found, name, calibration, test)
        for share in (0.5,) if found.quick else (0.5, 0.35):
            columns.append(f"{name}, {share:g} of the MACs")
            for label, variant in VARIANTS.items():
                table.setdefault(label, []).append(variant(bench, share))
    found.table("Test top-1 % with one ingredient left out", ("", *columns), [(k, *v) for k, v in table.items()])
    for number, column in enumerate(columns):
        others = [values[number] for label, values in table.items() if label != "everything"]
        lead = table["everything"][number] - max(others)
        found.goal(f"everything-against-best-without-one, {column}", lead, -0.3, at_least=True, unit=" points")


def score_widths(
    bench: Bench,
    widths: Mapping[str, int],
    *,
    sweeps: int | None = None,
    ingredients: Ingredients | None = None,
    selection: str | None = None,
) -> float:
    """Test top-1 after a front-to-back sweep at the given widths, and the further ones."""
    problem = bench.problem if ingredients is None else replace(bench.problem, ingredients=ingredients)
    layer = plain(LayerOptions.of(bench.recipe))
    layer = layer if selection is None else replace(layer, selection=selection)
    plan = {name: Width(width) for name, width in widths.items()}
    search = bench.search
    result = sweep(problem, plan, layer, SilentProgress(), facts=search.facts, curves=search.curves)
    result = refine(problem, result, layer, SilentProgress(), sweeps=bench.recipe.refine if sweeps is None else sweeps)
    return bench.score(bench.cut({each.name: each.kept for each in result.results}, result.state))["top1"]


def widths_of(bench: Bench, share: float, damages: Mapping[str, DamageCurve] | None = None) -> dict[str, int]:
    choices = replace(bench.search.choices, curves=damages or bench.search.damages)
    return allocate(choices, {"macs": share}).widths


def without(**left_out: bool) -> Callable[[Bench, float], float]:
    """The variant that leaves ingredients of the sweep out."""
    return lambda bench, share: score_widths(bench, widths_of(bench, share), ingredients=Ingredients(**left_out))


def equal_sensitivities(bench: Bench, share: float) -> float:
    """Damage is the squared relative error in every layer, as if all were alike."""
    damages = {
        name: DamageCurve(curve.errors.double().square(), curve.legal, curve.errors)
        for name, curve in bench.search.damages.items()
    }
    return score_widths(bench, widths_of(bench, share, damages))


def original_features(bench: Bench, share: float) -> float:
    """Each layer refitted on the original network's features, blind to what earlier cuts changed."""
    kept = {name: bench.search.curves[name].units(width) for name, width in widths_of(bench, share).items()}
    return bench.score(bench.cut(kept, bench.refit_on_original(kept)))["top1"]


def no_refit(bench: Bench, share: float) -> float:
    kept = {name: bench.search.curves[name].units(width) for name, width in widths_of(bench, share).items()}
    return bench.score(bench.cut(kept, bench.problem.state))["top1"]


def lasso_alone(bench: Bench, share: float) -> float:
    return score_widths(bench, widths_of(bench, share), selection="lasso")


VARIANTS: dict[str, Callable[[Bench, float], float]] = {
    "everything": without(),
    "one sweep, nothing refitted behind the next ReLU": lambda b, share: score_widths(b, widths_of(b, share), sweeps=0),
    "shortcuts' errors not taken back": without(shortcuts=False),
    "consumers whose input moved not refitted": without(readers=False),
    "all layers equally sensitive": equal_sensitivities,
    "features of the original network": original_features,
    "lasso instead of elimination": lasso_alone,
    "no swaps": without(swaps=False),
    "no refit": no_refit,
}


def smallest(found: Run) -> None:
    """Smallest share of the MACs within half a point and one point of the original, by bisection on test images."""
    rows = []
    for name in found.options.networks.split(","):
        bench = bench_of(found, name, found.options.calibration)
        for method in ("ours", "uniform, our selection", "pivoted QR + LS"):
            row: list[Any] = [name, method]
            cells: dict[float, dict[str, Any]] = {}
            for points in (0.5, 1.0):
                row += smallest_within(bench, method, points, cells)
            rows.append(row)
    found.table(
        "Smallest network within so many points (bisection, steps of 2 % of the MACs)",
        ("network", "method", "MACs, 0.5", "parameters, 0.5", "MACs, 1", "parameters, 1"),
        rows,
    )
    for name in found.options.networks.split(","):
        of = {row[1]: row for row in rows if row[0] == name}
        for points, column in ((0.5, 2), (1, 4)):
            ours, *others = (row[column] or 1.0 for row in of.values())
            found.goal(f"smallest-{name}-within-{points:g}", ours, min(others) + 0.02, note="MACs; one step")


def smallest_within(
    bench: Bench, method: str, points: float, cells: dict[float, dict[str, Any]]
) -> tuple[float | None, float | None]:
    """Shares of MACs and parameters of the smallest cut that loses at most `points`; `cells` keeps what was run."""
    low, high, best = 0.1, 1.0, (None, None)
    while high - low > 0.02:
        share = (low + high) / 2
        cell = cells[share] if share in cells else cells.setdefault(share, run_cell(bench, method, share))
        if cell["original"] - cell["top1"] <= points:
            high, best = share, (cell["macs"], cell["params"])
        else:
            low = share
    return best


if __name__ == "__main__":
    raise SystemExit(main())

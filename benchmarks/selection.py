"""Units kept at equal relative reconstruction error (.1, .03, .01), for every selection method; fewer is better.

dig2: the 512 → 10 head of an MLP on scikit-learn's 8×8 digits; dig1: its 512 → 512 layer; VGG-19: inputs of the
layers named, from recorded moments. Least-squares refit with bias after each unless noted; error on the calibration
moments, over the centred energy of the outputs. "lasso support" reads the support off a path of 60 λ.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.osscar import osscar_search
from benchmarks.recorded import digits_moments, load_moments, save_moments, vgg_moments
from benchmarks.reporting import Cell, Run, start
from compress.convex import (
    METHODS,
    Moments,
    nested_errors,
    penalty_grid,
    refit,
    select_units,
    solve_path,
)
from compress.convex.selecting.elimination import Factorised
from compress.convex.selecting.swaps import Polisher

LEVELS = (0.1, 0.03, 0.01)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--moments", type=Path, help="moments of VGG-19 layers (.pt); written if --checkpoint is given")
    parser.add_argument("--checkpoint", type=Path, help="the shared vgg19-cifar10.pt, to record the moments")
    parser.add_argument("--images", type=Path, help="CIFAR-10 training images, .npz with `images`")
    parser.add_argument("--only", default="", help="layers, by comma, or `widths` for their seconds; empty for all")
    parser.add_argument("--methods", default="", help="single methods to compare with, by comma; empty for all")


def main() -> int:
    run = start("selection", __doc__, add_options=add_options)
    hidden = 96 if run.quick else 512
    if run.quick:
        run.say("quick: hidden width 96 instead of 512, 15 epochs, no VGG-19 layers above K·s = 512, path of 20 λ")
    layers = digits_moments(hidden=hidden, epochs=15 if run.quick else 60)
    options = run.options
    if options.moments and options.moments.exists():
        layers |= {f"VGG-19 {name}": own for name, own in load_moments(options.moments).items()}
    elif options.checkpoint and options.images:
        recorded = vgg_moments(options.checkpoint, options.images)
        if options.moments:
            save_moments(options.moments, recorded)
        layers |= {f"VGG-19 {name}": own for name, own in recorded.items()}
    else:
        run.goal("vgg-fewest-units", None, "all levels", note="needs --moments, or --checkpoint and --images")
    for name, moments in layers.items():
        if options.only and name not in options.only.split(","):
            continue
        if moments.gram.shape[0] > 2304:
            continue  # its order is timed below, on a problem of the same size
        if run.quick and (moments.gram.shape[0] > 512 or (name.startswith("VGG") and moments.output_count > 64)):
            continue
        layer(run, name, moments)
    if not options.only:
        speed(run)
    if not options.only or "widths" in options.only.split(","):
        widths(run)
    return run.finish()


def layer(run: Run, name: str, moments: Moments) -> None:
    large = moments.gram.shape[0] > 1024
    methods = ("backward", "forward", "magnitude") if large else tuple(METHODS)
    if run.options.methods:
        methods = tuple(name for name in run.options.methods.split(",") if name in METHODS)
    rows: list[list[Cell]] = []
    least = [moments.unit_count] * len(LEVELS)
    for method in methods:
        begin = time.perf_counter()
        curve = select_units(moments, method=method)
        seconds = time.perf_counter() - begin
        counts = [curve.width_for(level) for level in LEVELS]
        least = [min(pair) for pair in zip(least, counts, strict=True)]
        rows.append([method if method not in ("lasso", "adaptive") else f"{method} path order", *counts, seconds])
    if not large and not run.options.methods:
        for title, counts, seconds in lasso_rows(run, moments):
            rows.append([title, *counts, seconds])
            least = [min(pair) for pair in zip(least, counts, strict=True)]
    begin = time.perf_counter()
    curve = select_units(moments, errors=LEVELS)
    seconds = time.perf_counter() - begin
    ours = [curve.width_for(level) for level in LEVELS]
    reached = [refit(moments, curve.units(width)).error for width in ours]
    rows.append(["**ours** (best + swaps)", *ours, seconds])
    size = f"K {moments.unit_count}, s {moments.group_size}, D {moments.output_count}"
    run.table(f"{name}: {size}", ("method", *(f"error {level:g}" for level in LEVELS), "seconds"), rows)
    short = sum(mine > best for mine, best in zip(ours, least, strict=True))
    fewer = sum(best - mine for mine, best in zip(ours, least, strict=True))
    key = name.replace(" ", "-").replace(".", "")
    run.goal(
        f"{key}-levels-with-more-units-than-the-best-single", short, 0, note=f"{fewer} units fewer over all levels"
    )
    honest = sum(error > level * (1 + 1e-9) for error, level in zip(reached, LEVELS, strict=True))
    run.goal(f"{key}-levels-whose-refit-misses-its-error", honest, 0)
    swaps(run, name, moments)


def lasso_rows(run: Run, moments: Moments) -> list[tuple[str, list[int], float]]:
    centred = moments.centred()
    feature = centred.gram.diagonal().reshape(-1, moments.group_size).sum(1)
    feature = feature.clamp_min(1e-12 * float(feature.max())).sqrt()
    found = []
    for title, costs in (("lasso support, c = 1", None), ("lasso support, c = feature norm", feature)):
        begin = time.perf_counter()
        grid = penalty_grid(centred, 20 if run.quick else 60, 1e-4, costs)
        solutions = solve_path(centred, grid, costs, tolerance=1e-5)
        with_refit = [moments.unit_count] * len(LEVELS)
        without = list(with_refit)
        for solution in solutions:
            units = solution.active
            error = refit(moments, units).error
            for i, level in enumerate(LEVELS):
                if error <= level:
                    with_refit[i] = min(with_refit[i], units.numel())
                if solution.error <= level:
                    without[i] = min(without[i], units.numel())
        seconds = time.perf_counter() - begin
        found.append((title, with_refit, seconds))
        if costs is None:
            found.append(("lasso, c = 1, no refit", without, seconds))
    return found


def swaps(run: Run, name: str, moments: Moments) -> None:
    """At equal widths: elimination, OSSCAR, ours, and what more seconds of swaps from random selections find."""
    polisher = Polisher(Factorised.of(moments))
    order = select_units(moments, method="backward")
    seconds = 1.0 if run.quick else 10.0
    rows: list[list[Cell]] = []
    worst, peers = 0.0, 0
    for width in sorted({order.width_for(level) for level in LEVELS}):
        eliminated = order.units(width)
        begin = time.perf_counter()
        searched = osscar_search(polisher.equations.gram, polisher.targets, eliminated, moments.group_size)
        middle = time.perf_counter()
        curve = select_units(moments, widths=[width])
        took = time.perf_counter() - middle
        errors = [refit(moments, units).error for units in (eliminated, searched, curve.units(width))]
        restarted = restarts(polisher, curve.units(width), seconds)
        left = max(0.0, 1 - restarted / float(curve.errors[width]))
        peers += errors[2] > errors[1] * (1 + 1e-6)
        worst = max(worst, left)
        rows.append([width, *errors[:2], middle - begin, errors[2], took, f"{100 * left:.2f} %"])
    header = ("units", "backward, error", "OSSCAR, error", "its swaps, s", "ours, error", "ours, s, orders and all")
    run.table(f"{name}: swaps at equal widths", (*header, f"{seconds:g} s of restarts take off"), rows)
    key = name.replace(" ", "-").replace(".", "")
    run.goal(f"{key}-left-for-restarts", 100 * worst, 1.0, unit=" %")
    run.goal(f"{key}-widths-where-OSSCAR-is-better", peers, 0)


def restarts(polisher: Polisher, units: Tensor, seconds: float) -> float:
    """The least error of best-swap descents from random selections, and from `units` with a quarter exchanged."""
    generator = torch.Generator().manual_seed(1)
    width, best, begin, number = units.numel(), 1.0, time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        start = torch.randperm(polisher.unit_count, generator=generator)
        if number % 2:
            kept = units[torch.randperm(width, generator=generator)[: width - max(1, width // 4)]]
            start = torch.cat([kept, start[~torch.isin(start, kept)]])
        best = min(best, polisher.polish([start[:width]], effort=0.0)[1])
        number += 1
    return best


def widths(run: Run) -> None:
    """Seconds of one width, orders, curves, exchanges and all."""
    from benchmarks.problems import problem_moments

    rows: list[list[Cell]] = []
    for units, seconds in ((512, 3.0),) if run.quick else ((512, 3.0), (4096, 60.0)):
        moments = problem_moments("E", scale=units / 4096)
        width = round(0.23 * units)
        processor, begin = time.process_time(), time.perf_counter()
        curve = select_units(moments, widths=[width])
        processor, wall = time.process_time() - processor, time.perf_counter() - begin
        nested = min(float(nested_errors(moments, order[:width])[-1]) for order in curve.orders.values())
        title = f"K {units}, D {units}"
        rows.append([title, width, nested, float(curve.errors[width]), processor, wall])
        run.goal(f"one-width-at-K-{units}", wall, seconds, unit=" s", note=f"{processor:.1f} s of processor time")
    header = ("size", "units", "best order, error", "with exchanges", "processor, s", "wall, s")
    run.table("One width", header, rows)


def speed(run: Run) -> None:
    """Seconds of the whole nested backward order with its error curve."""
    from benchmarks.problems import conv_moments, problem_moments

    sizes = {"K 512, s 1, D 10": problem_moments("A")}
    if run.quick:
        sizes["K 128, s 9, D 128"] = conv_moments(128, 9, 128)
    else:
        sizes["K 1024, s 1, D 256"] = problem_moments("B")
        sizes["K 512, s 9, D 512"] = conv_moments(512, 9, 512)
    rows: list[list[Cell]] = []
    for title, moments in sizes.items():
        begin = time.perf_counter()
        curve = select_units(moments, method="backward")
        rows.append([title, time.perf_counter() - begin, curve.width_for(0.1)])
        torch.testing.assert_close(nested_errors(moments, curve.order), curve.errors, rtol=1e-6, atol=1e-6)
    run.table("Backward elimination, all widths", ("size", "seconds", "units at error .1"), rows)


if __name__ == "__main__":
    sys.exit(main())

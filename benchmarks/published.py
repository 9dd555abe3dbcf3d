"""The published implementation's synthetic unit counts, from the exact form: median active units, Gaussian Φ and Ψ.

First D = 10, K = 500 for N samples; then rank(Φ) = D = r with K = 200, N = 20. The notebook's numbers come from a
long run of a faithful solver; medians over a few seeds differ by a few units. Then ReLU features of few inputs, full
and deficient in rank, for D from 1 to 10, and the width bound on random rank-deficient problems. With `--vgg` and
`--images` the ranks and the bound of that network's layers on a grid of tolerances, beside the 47 units published.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.recorded import vgg_moments
from benchmarks.reporting import Cell, Run, start
from compress.convex import Moments, reduce_width, select_units, solve_exact, width_bound
from compress.convex.lasso import unit_norms

SAMPLES = {10: 34, 20: 83, 30: 127, 40: 169}
RANKS = {2: 3, 5: 11, 10: 33, 20: 86}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def main() -> int:

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--vgg", type=Path, help="checkpoint of the VGG-19 for CIFAR-10")
        parser.add_argument("--images", type=Path, help="npz of its training images")

    run = start("published", __doc__, add_options=add_options)
    seeds = 3 if run.quick else 15
    run.say(f"{seeds} seeds a case, exact form, certified to 1e-6")
    rows: list[list[Cell]] = []
    apart: list[float] = []
    uncertified = 0
    for count, published in SAMPLES.items():
        uncertified += case(run, rows, apart, f"D = 10, K = 500, N = {count}", published, seeds, count=count)
    for rank, published in RANKS.items():
        uncertified += case(run, rows, apart, f"r = D = {rank}, K = 200, N = 20", published, seeds, rank=rank)
    header = ("case", "published", "median active", "all certified", "largest gap", "seconds each")
    run.table("Active units of the exact problem", header, rows)
    run.goal("counts-largest-relative-difference", max(apart), 0.1, note="10 % or one unit of the published medians")
    run.goal("counts-uncertified", uncertified, 0)
    rectified(run)
    bound(run, 60 if run.quick else 200)
    if run.options.vgg and run.options.images:
        ranks(run, vgg_moments(run.options.vgg, run.options.images, samples=500 if run.quick else 4000))
    return run.finish()


PUBLISHED_UNITS = 47  # of the last hidden layer's 512, kept by the published method on VGG-19


def ranks(run: Run, layers: dict[str, Moments]) -> None:
    """rank(Φ)·rank(Ψ) by tolerance."""
    rows: list[list[Cell]] = []
    for name, moments in layers.items():
        if moments.group_size > 1:
            continue  # a convolution's bound counts columns, not channels
        for each in width_bound(moments).grid():
            error = fitted_error(moments, min(each.bound, each.units))
            rows.append([name, each.units, each.tolerance, each.rank_features, each.rank_outputs, each.bound, error])
    last = width_bound(layers["classifier.6"])
    met = min((each.tolerance for each in last.grid() if each.bound <= PUBLISHED_UNITS), default=float("nan"))
    header = ("layer", "K", "tolerance", "rank(Φ)", "rank(Ψ)", "bound", "error of so many selected units")
    run.table(f"Ranks by tolerance; the bound meets {PUBLISHED_UNITS} units from {met:g}", header, rows)


def fitted_error(moments: Moments, units: int) -> float:
    """Relative error of the selection with that many units."""
    return float(select_units(moments).errors[units])


def case(
    run: Run,
    rows: list[list[Cell]],
    apart: list[float],
    name: str,
    published: int,
    seeds: int,
    *,
    count: int = 20,
    rank: int | None = None,
) -> int:
    found, gaps, failed = [], [], 0
    begin = time.perf_counter()
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        if rank is None:
            features, outputs = normal(generator, count, 500), normal(generator, count, 10)
        else:
            features = normal(generator, count, rank) @ normal(generator, rank, 200)
            outputs = features @ normal(generator, 200, rank)
        solution = solve_exact(Moments.of(features, outputs))
        found.append(solution.active.numel())
        gaps.append(solution.gap)
        failed += not solution.certified
    seconds = (time.perf_counter() - begin) / seeds
    median = statistics.median(found)
    rows.append([name, published, median, f"{seeds - failed} of {seeds}", max(gaps), seconds])
    difference = abs(median - published)
    apart.append(0.0 if difference <= 1 else difference / published)
    return failed


RECTIFIED = ((40, 100), (200, 120), (400, 256), (4000, 512))  # N × K
QUICK = RECTIFIED[:2]


def rectified(run: Run) -> None:
    """ReLU features, whose singular values fall fast, and outputs of them or of nothing: all certified?"""
    rows: list[list[Cell]] = []
    failed = 0
    for count, units in QUICK if run.quick else RECTIFIED:
        for outputs in (1, 2, 3, 10):
            certified, cases, seconds, gap, error = 0, 0, 0.0, 0.0, 0.0
            for inputs in (8, 16, 64):
                for of_features in (True, False):
                    generator = torch.Generator().manual_seed(count + units + outputs)
                    features = (normal(generator, count, inputs) @ normal(generator, inputs, units)).relu()
                    targets = features @ normal(generator, units, outputs)
                    targets = targets if of_features else normal(generator, count, outputs)
                    begin = time.perf_counter()
                    solution = solve_exact(Moments.of(features, targets), time_limit=60)
                    seconds = max(seconds, time.perf_counter() - begin)
                    cases, certified = cases + 1, certified + solution.certified
                    gap, error = max(gap, solution.gap), max(error, solution.error)
            failed += cases - certified
            rows.append([f"N {count}, K {units}, D {outputs}", f"{certified} of {cases}", gap, error, seconds])
    header = ("ReLU features of 8, 16, 64 inputs", "certified", "largest gap", "largest error", "seconds at most")
    run.table("The exact form on ReLU features", header, rows)
    run.goal("relu-uncertified", failed, 0)


def bound(run: Run, problems: int) -> None:
    above, moved, raised = 0, 0.0, 0.0
    begin = time.perf_counter()
    for seed in range(problems):
        generator = torch.Generator().manual_seed(seed)
        rank, q, units, outputs = 1 + seed % 7, 1 + seed % 3, 60 + seed % 50, 1 + seed % 3 + seed % 4
        features = normal(generator, 50, rank) @ normal(generator, rank, units)
        weights = normal(generator, units, outputs) @ normal(generator, outputs, q) @ normal(generator, q, outputs)
        reduced = reduce_width(Moments.of(features, features @ weights), weights)
        norms = unit_norms(reduced, 1)
        above += int((norms > 0).sum()) > rank * min(rank, q)
        moved = max(moved, float((features @ (reduced - weights)).norm() / (features @ weights).norm()))
        raised = max(raised, float(norms.sum() / unit_norms(weights, 1).sum()))
    seconds = (time.perf_counter() - begin) / problems
    run.table(
        f"Carathéodory reduction on {problems} rank-deficient problems",
        ("above the bound", "largest change of ΦV", "largest Σ‖v‖ after / before", "seconds each"),
        [[above, moved, raised, seconds]],
    )
    run.goal("bound-violations", above, 0)
    run.goal("bound-outputs-moved", moved, 1e-8)
    run.goal("bound-objective-raised", raised, 1.0)


if __name__ == "__main__":
    sys.exit(main())

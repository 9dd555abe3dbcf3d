"""The allocation revised once, by what the first sweep measured: damages interact, and a curve knows one layer alone.

Behind layers that are cut already a layer errs more, or less, than on the original network's features. What it erred at
the width that was tried stands for all its widths: its errors are taken that much larger or smaller, and the widths are
chosen again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.compression.layers.layer import LayerOptions
from compress.compression.pricing.allocate import Allocation, DamageCurve, allocate
from compress.compression.searching.curves import Search
from compress.compression.searching.damage import Cut, measure_cuts, solvable_cuts
from compress.compression.sweep import Compressed, damage_ratio
from compress.errors import GateError

LARGEST_CORRECTION = 3.0  # factor of a layer's error
ADDED_UP = 1.2  # measured damage over the predicted one, up to which layers do not interact and the widths stand
FORETOLD = 1.5  # damage of all layers cut at once over that after a sweep, up to which the one stands for the other
SMALLEST_ERROR = 1e-6  # relative, below which a width cuts nothing off


def revised_allocation(
    search: Search, tried: Allocation, compressed: Compressed, budgets: Mapping[str, float]
) -> Allocation | None:
    """Other widths within the budgets that promise less damage now; None where the same ones do, or none is known.

    Where the layers' damages add up to what was measured, nothing is revised: it costs a sweep and gains nothing.

    Args:
        tried: the widths of the sweep that gave `compressed`.
    """
    factors = {} if adds_up(tried, compressed) else error_factors(search, compressed)
    if not factors:
        return None
    curves = {
        name: corrected(curve, factors[name]) if name in factors else curve for name, curve in search.damages.items()
    }
    choices = replace(search.choices, curves=curves)
    try:
        revised = allocate(choices, budgets)
    except GateError:
        return None
    return None if revised.widths == tried.widths or revised.damage >= choices.damage(tried.widths) else revised


def worth_a_sweep(
    search: Search, tried: Allocation, compressed: Compressed, revised: Allocation, options: LayerOptions
) -> bool:
    """Whether the revised widths may do less damage, by what all layers do that are cut at once, without a sweep.

    A sweep costs several passes; both networks refitted on the original's features alone, a part of one. They tell
    where the one at the widths that were tried lost about what the sweep did; where refits behind one another take
    most of it back, or without the moments of the original, the sweep is made.

    Args:
        compressed: what the sweep at the widths `tried` gave.
    """
    if not search.moments or compressed.held_back is None:
        return True
    first, second = damages_together(search, [tried.widths, revised.widths], options)
    return second < first or first > FORETOLD * compressed.held_back.distance


def damages_together(search: Search, choices: Sequence[Mapping[str, int]], options: LayerOptions) -> list[float]:
    """Held-back divergence at each choice of widths, all layers cut at once and refitted on the original's features."""
    problem, state = search.problem, search.problem.state
    asked: dict[str, list[int]] = {}
    for widths in choices:
        for group in problem.groups:
            width = widths[group.name]
            if group.name in search.moments and 0 < width < group.unit_count:
                asked[group.name] = sorted({*asked.get(group.name, ()), width})
    single = {
        (cut.name, cut.width): cut for cut in solvable_cuts(problem, search.moments, search.curves, asked, options)
    }
    cuts = []
    for widths in choices:
        weights: dict[str, Tensor] = {}
        for name, width in widths.items():
            cut = single.get((name, width))
            for tensor, changed in ({} if cut is None else cut.weights).items():
                # groups that share a reader change other columns of it
                weights[tensor] = changed + weights[tensor] - state[tensor] if tensor in weights else changed
        start = problem.program.frontier(set(weights), problem.output_nodes)
        cuts.append(Cut("all", 0, weights, start))
    return measure_cuts(problem, cuts, samples=problem.held_back.count, known=search.known)


def adds_up(tried: Allocation, compressed: Compressed) -> bool:
    """Whether held-back samples lose about what the layers alone were said to."""
    return compressed.held_back is not None and compressed.held_back.distance <= ADDED_UP * tried.damage


def error_factors(search: Search, compressed: Compressed) -> dict[str, float]:
    """By how much each layer erred more on held-back samples than its curve says (below 1: less), around their mean.

    What all layers err more is left out, as it moves no width; a layer that lost nothing told nothing, and is taken to
    be as the mean.
    """
    ratios: dict[str, float] = {}
    for result in compressed.results:
        error, width = result.report.fit.held_back_error, len(result.kept)
        foretold = float(search.damages[result.name].errors[width]) if result.name in search.damages else 0.0
        if result.is_cut and width and error is not None and min(error, foretold) > SMALLEST_ERROR:
            ratios[result.name] = error / foretold
    if len(ratios) < 2:
        return {}
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return {
        name: min(LARGEST_CORRECTION, max(1 / LARGEST_CORRECTION, factor / mean)) for name, factor in ratios.items()
    }


def corrected(curve: DamageCurve, factor: float) -> DamageCurve:
    """The curve of a layer whose error at every width is that many times as large."""
    errors = curve.errors.double()
    lossy = errors > SMALLEST_ERROR
    damage = curve.damage.double().clone()
    if int(lossy.sum()) > 1:
        logs = errors[lossy].log()
        known = damage[lossy].clamp_min(torch.finfo(torch.float64).tiny).log()
        order = logs.argsort(stable=True)
        damage[lossy] = between(logs[order], known[order], logs + math.log(factor)).exp()
    never_rising = torch.cummax(damage.flip(0), 0).values.flip(0)
    return DamageCurve(never_rising, curve.legal, curve.errors * factor, curve.measured)


def between(xs: Tensor, ys: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear through points (n,) in ascending order; with slope 2, as of small errors, outside."""
    right = torch.searchsorted(xs, at).clamp(1, len(xs) - 1)
    left = right - 1
    width = (xs[right] - xs[left]).clamp_min(1e-12)
    inside = ys[left] + (ys[right] - ys[left]) * ((at - xs[left]) / width).clamp(0, 1)
    return inside + 2 * (at - xs[-1]).clamp_min(0) - 2 * (xs[0] - at).clamp_min(0)


def with_less_damage(first: Compressed, second: Compressed) -> bool:
    """Whether calibration samples say that the second network moved its outputs less."""
    return damage_ratio(first, second) < 1

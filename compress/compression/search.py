"""Widths of all layers under budgets or an accuracy bound: allocation, a sweep, verification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.compression.allocate import Allocation, allocate, priced_widths, relative_costs
from compress.compression.certificates import certificate_report, certify_layer
from compress.compression.curves import Search
from compress.compression.decisions import Decision, Leave, Plan, Width
from compress.compression.faults import LAYER_FAULTS, describe_fault
from compress.compression.latency import LatencyModel, one_sample
from compress.compression.layer import POLISHABLE, LayerOptions, layer_unit_costs, legal_units, rounded
from compress.compression.problem import Problem, record_all
from compress.compression.sweep import Compressed, refine, sweep
from compress.convex import MultitaskLasso
from compress.errors import GateError
from compress.graph.cost import measure_latency
from compress.progress import Portion, Progress
from compress.report.model import Certificate, LayerSearch, SearchReport, Step, Trial
from compress.units.surgery import narrow

LATENCY_CHECKS = 3  # cut networks that are timed before the sweep, each correcting the predicted latency
LATENCY_SLACK = 0.02  # of the budget, within which a timed network counts as within it
ACCURACY_SWEEPS = 6
CANDIDATES = 1.5  # units to choose among in a sweep, for each that will stay
BLEND = {"macs": 1.0, "params": 1.0}  # what an accuracy bound alone tries to save


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The chosen widths, how they were found and what came of them.

    Attributes:
        trials: one entry per sweep: predicted damage, costs, held-back score.
    """

    search: Search
    layerwise: Compressed
    allocation: Allocation
    trials: list[Trial]

    def describe_drop(self) -> str:
        """Held-back points lost, with the standard error."""
        score = self.layerwise.held_back
        change = None if score is None else score.change()
        return "unknown" if change is None else f"{change.loss:.2f} ± {change.bound - change.loss:.2f}"


def search_widths(
    search: Search,
    options: LayerOptions,
    progress: Progress,
    *,
    budgets: Mapping[str, float],
    max_drop: float | None,
    sweeps: int = 0,
) -> SearchResult:
    """The widths that keep every budget (and, with `max_drop`, the accuracy) at the least predicted damage.

    With budgets alone one sweep settles it. An accuracy bound alone asks for the largest cut within it: the predicted
    damage is raised and lowered, each time verified by compressing front to back and running the held-back samples.

    Args:
        budgets: "macs", "params", "latency" -> fraction of the original's.
        sweeps: further ones over the network at the chosen widths.

    Raises:
        GateError: a budget cannot be met, or the accuracy bound cannot be kept within the budgets.
    """
    trials: list[Trial] = []

    def attempt(allocation: Allocation) -> SearchResult:
        return _run_trial(search, allocation, options, Portion(progress, 0, 1 / (1 + sweeps)), trials)

    def passes(found: SearchResult) -> bool:
        assert max_drop is not None, "only called with an accuracy bound"
        score = found.layerwise.held_back
        if score is None or score.change() is None:
            raise GateError("--max-drop needs a network with an output of class scores; give a budget.")
        return score.passes(max_drop)

    if budgets:
        if "latency" in budgets:
            search = timed_search(search, budgets, progress)
        found = refined(attempt(allocate(search.model, search.damages, budgets)), options, progress, sweeps)
        if max_drop is not None and not passes(found):
            raise GateError(
                f"Within the budget the held-back accuracy falls by {found.describe_drop()} points, "
                f"at most {max_drop:g} were allowed; nothing was written."
            )
        return found
    assert max_drop is not None, "a search has a budget or an accuracy bound"
    return refined(_largest_cut(search, attempt, passes, max_drop), options, progress, sweeps)


def timed_search(search: Search, budgets: Mapping[str, float], progress: Progress) -> Search:
    """The search with a latency prediction that agrees with a network cut to about the widths that will be chosen."""
    for _ in range(LATENCY_CHECKS):
        progress.stage("timing a cut network")
        allocation = allocate(search.model, search.damages, budgets)
        kept = {
            group.name: legal_units(group, search.curves[group.name], allocation.widths[group.name])
            if allocation.widths[group.name] < group.unit_count
            else torch.arange(group.unit_count)  # where memory was short the curve does not know them all
            for group in search.problem.groups
        }
        measured = time_cut(search.problem, kept)
        latency = search.model.latency
        assert isinstance(latency, LatencyModel), "measured before the widths are searched"
        predicted = allocation.costs["latency"]
        corrected = replace(latency, scale=latency.scale * measured / predicted)
        search = replace(search, model=replace(search.model, latency=corrected))
        if abs(measured - predicted) <= LATENCY_SLACK * predicted:
            break
    return search


def time_cut(problem: Problem, kept: Mapping[str, Tensor]) -> float:
    """Measured latency of the network with these units as a fraction of the original's; the first process measures."""
    module, sample = problem.network.module, one_sample(problem.network)

    def measure() -> float:
        before, after = measure_latency((module, narrow(module, kept, problem.groups).module), sample)
        return after.milliseconds / before.milliseconds

    return problem.share.from_first(measure)


def _run_trial(
    search: Search, allocation: Allocation, options: LayerOptions, progress: Progress, trials: list[Trial]
) -> SearchResult:
    """Compress front to back at the allocated widths and note what the held-back samples say."""
    found = sweep(
        search.problem,
        plan_widths(search, allocation.widths),
        replace(options, certify=False),
        progress,
        facts=search.facts,
        kept_state=search.kept_state,
    )
    note_trial(trials, allocation, found)
    return SearchResult(search, found, allocation, trials)


def plan_widths(search: Search, widths: Mapping[str, int]) -> Plan:
    """The widths as decisions, with the units worth recording again where leaving others out saves much.

    Those that the curves of the original network keep at the width and at `CANDIDATES` times the width.
    """
    plan: dict[str, Decision] = {}
    for group in search.problem.groups:
        if group.name in search.skipped:
            plan[group.name] = Leave(search.skipped[group.name])
            continue
        columns = max(reading.columns for reading in search.problem.readings(group))
        curve, width = search.curves[group.name], widths[group.name]
        wider = math.ceil(CANDIDATES * width)
        plan[group.name] = Width(width)
        if len(curve.order) < group.unit_count:
            continue  # memory is short, and the curve numbers the units that were listed
        if columns > POLISHABLE and group.blocks == 1 and wider < 0.9 * group.unit_count:
            listed = torch.zeros(group.unit_count, dtype=torch.bool)
            listed[curve.units(width)] = listed[curve.units(wider)] = True
            plan[group.name] = Width(width, listed.nonzero().flatten())
    return plan


def refined(found: SearchResult, options: LayerOptions, progress: Progress, sweeps: int) -> SearchResult:
    """The result after further sweeps, noted as a trial; unchanged without any."""
    if not sweeps:
        return found
    search, allocation = found.search, found.allocation
    rest = Portion(progress, 1 / (1 + sweeps), 1)
    layerwise = refine(search.problem, found.layerwise, options, rest, sweeps=sweeps, kept_state=search.kept_state)
    note_trial(found.trials, allocation, layerwise, refined=sweeps)
    return replace(found, layerwise=layerwise)


def note_trial(trials: list[Trial], allocation: Allocation, found: Compressed, refined: int = 0) -> None:
    """What the held-back samples say of a compressed network, for the report."""
    trials.append(
        Trial(
            allocation.damage, allocation.costs, refined, None if found.held_back is None else found.held_back.report()
        )
    )


def milder_search(found: SearchResult, options: LayerOptions, progress: Progress, *, sweeps: int = 0) -> SearchResult:
    """The same search at a third of the predicted damage."""
    allocation = at_damage(found.search, found.allocation.damage / 3)
    return refined(_run_trial(found.search, allocation, options, progress, found.trials), options, progress, sweeps)


def _largest_cut(
    search: Search,
    attempt: Callable[[Allocation], SearchResult],
    passes: Callable[[SearchResult], bool],
    max_drop: float,
) -> SearchResult:
    """Raise and lower the predicted damage until the held-back accuracy just stays within the bound."""
    best: SearchResult | None = None
    low, high = 0.0, math.inf  # predicted damages known to pass and to fail
    target = max(max_drop, 0.02) / 100
    seen: set[tuple[int, ...]] = set()
    for _ in range(ACCURACY_SWEEPS):
        allocation = at_damage(search, target)
        key = tuple(allocation.widths.values())
        if key in seen:
            break
        seen.add(key)
        found = attempt(allocation)
        if passes(found):
            best, low = found, max(low, target)
        else:
            high = min(high, target)
        if high == math.inf:
            target *= 4
        elif low == 0.0:
            target /= 4
        else:
            target = math.sqrt(low * high)
            if high / low < 1.3:
                break
    if best is None:
        raise GateError(
            f"No cut kept the held-back accuracy within {max_drop:g} points; the last one lost "
            f"{found.describe_drop()}. Nothing was written."
        )
    return best


def at_damage(search: Search, target: float) -> Allocation:
    """The allocation whose predicted damage is the largest that stays within `target` nats."""
    low, high = 1e-12, 1e12
    chosen = {name: curve.legal[-1] for name, curve in search.damages.items()}

    def damage(widths: Mapping[str, int]) -> float:
        return sum(
            float(curve.damage[widths[name]])
            for name, curve in search.damages.items()
            if widths[name] < curve.legal[-1]
        )

    for _ in range(60):
        price = math.sqrt(low * high)
        widths = priced_widths(search.model, search.damages, {name: price * each for name, each in BLEND.items()})
        if damage(widths) <= target:
            chosen, low = widths, price
        else:
            high = price
    return Allocation(chosen, damage(chosen), relative_costs(search.model, chosen), low)


def certify_widths(found: SearchResult, options: LayerOptions, progress: Progress) -> dict[str, Certificate]:
    """For every layer that was cut, a certified lasso solution on the original network's moments.

    The moments are recorded again where the curves came from an earlier run.
    """
    search = found.search
    certified: dict[str, Certificate] = {}
    cut = [result for result in found.layerwise.results if len(result.kept) < result.units]
    moments = search.moments
    if cut and not moments:
        moments = record_all(search.problem, progress).moments
    groups = {group.name: group for group in search.problem.groups}
    progress.stage("certifying optimality", len(cut))
    for result in cut:
        own = moments[result.name]
        joint = own.joint()
        costs = layer_unit_costs(options.unit_costs, groups[result.name], own, search.problem.state, joint)
        try:
            solution, form = certify_layer(joint, costs, len(result.kept), None, solver=options.solver, gap=options.gap)
            silencing = MultitaskLasso(joint, 0.0, costs).silencing_penalty
            certified[result.name] = certificate_report(solution, f"{form}; original features", silencing)
        except LAYER_FAULTS as fault:
            progress.note(f"{result.name} has no certificate: {describe_fault(fault)}")
        progress.advance()
    return certified


def search_report(found: SearchResult) -> SearchReport:
    """How the widths were found: trials, and per layer the measured and the predicted damage."""
    return SearchReport(
        trials=tuple(found.trials),
        predicted_costs=found.allocation.costs,
        layers={
            name: LayerSearch(
                width=found.allocation.widths[name],
                predicted_damage=float(curve.damage[found.allocation.widths[name]]),
                measured=tuple(Step(*point) for point in curve.measured),
                error_curve=tuple(rounded(float(error)) for error in curve.errors),
            )
            for name, curve in found.search.damages.items()
            if name not in found.search.skipped
        },
    )

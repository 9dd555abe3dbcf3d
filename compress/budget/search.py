"""Widths of all layers under budgets or an accuracy bound: curves, sensitivities, allocation, verification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.budget.allocation import (
    Allocation,
    DamageCurve,
    allocate,
    damage_curve,
    legal_widths,
    priced_widths,
    relative_costs,
)
from compress.budget.certificates import certificate_report, certify_layer
from compress.budget.costs import CostModel, cost_model
from compress.budget.latency import LatencyModel, measure_latency_model
from compress.budget.layers import POLISHABLE, LayerFacts, LayerOptions, layer_unit_costs
from compress.budget.layerwise import Layerwise, Problem, compress_layers, record_all
from compress.budget.refining import refine_layers
from compress.budget.resume import KnownCurves, RunState
from compress.budget.sensitivity import measure_divergences, probe_widths
from compress.budget.widths import WidthRule
from compress.convex import MultitaskLasso, SelectionCurve, select_units
from compress.errors import GateError
from compress.network.layer_moments import LayerMoments
from compress.progress import Progress

SENSITIVITY_SAMPLES = 512
LATENCY_CHECKS = 3  # cut networks that are timed before the sweep, each correcting the predicted latency
LATENCY_SLACK = 0.02  # of the budget, within which a timed network counts as within it
ACCURACY_SWEEPS = 6
CANDIDATES = 1.5  # units to choose among in a sweep, for each that will stay
BLEND = {"macs": 1.0, "params": 1.0}  # what an accuracy bound alone tries to save


@dataclass(frozen=True, eq=False)
class Search:
    """Everything known before the widths are chosen; one pass over the data, plus the sensitivities.

    Attributes:
        moments: per group, of the original network; empty where the curves came from an earlier run.
        curves: selection curve per group.
        damages: predicted damage per group and width.
        facts: what the moments of all units say, per group.
        kept_state: where what is found is kept for a run that goes on from here.
    """

    problem: Problem
    model: CostModel
    moments: dict[str, LayerMoments]
    curves: dict[str, SelectionCurve]
    damages: dict[str, DamageCurve]
    facts: dict[str, LayerFacts]
    kept_state: RunState | None = None


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The chosen widths, how they were found and what came of them.

    Attributes:
        trials: one entry per sweep: predicted damage, costs, held-back score.
    """

    search: Search
    layerwise: Layerwise
    allocation: Allocation
    trials: list[dict[str, Any]]

    def describe_drop(self) -> str:
        """Held-back points lost, with the standard error."""
        score = self.layerwise.held_back
        return "unknown" if score is None else f"{score.drop:.2f} ± {score.error:.2f}"


def prepare_search(
    problem: Problem,
    options: LayerOptions,
    parameters: Mapping[str, Tensor],
    progress: Progress,
    *,
    milliseconds: float | None = None,
    kept_state: RunState | None = None,
) -> Search:
    """Record all layers once, select along all widths, measure what errors do to the output.

    Args:
        milliseconds: measured latency of the whole network on one sample, where latency is to be predicted.
        kept_state: where curves and sensitivities are kept for a later run, and taken from.
    """
    known = None if kept_state is None else kept_state.read_curves()
    legal = {group.name: legal_widths(group.unit_count, group.blocks, options.round_to) for group in problem.groups}
    moments: dict[str, LayerMoments] = {}
    if known is None or set(known.curves) != set(legal):
        moments = record_all(problem, progress)
        known = find_curves(problem, moments, options, legal, progress)
        if kept_state is not None:
            kept_state.write_curves(known)
    damages = {
        name: damage_curve(known.errors[name], known.measured[name], widths_known(known.curves[name], legal[name]))
        for name in legal
    }
    model = cost_model(problem.program, problem.groups, parameters, problem.forward_macs)
    if milliseconds is not None:
        progress.stage("timing layers at several widths")
        whole = milliseconds
        latency = problem.share.from_first(
            lambda: measure_latency_model(problem.program, model.tensors, problem.state, whole)
        )
        model = replace(model, latency=latency)
    return Search(problem, model, moments, known.curves, damages, known.facts, kept_state)


def find_curves(
    problem: Problem,
    moments: Mapping[str, LayerMoments],
    options: LayerOptions,
    legal: Mapping[str, tuple[int, ...]],
    progress: Progress,
) -> KnownCurves:
    """Selection curves of all groups, and the divergences at a few widths of each."""
    curves: dict[str, SelectionCurve] = {}
    errors: dict[str, Tensor] = {}
    facts: dict[str, LayerFacts] = {}
    progress.stage("selecting units", len(problem.groups))
    for group in problem.groups:
        own = moments[group.name]
        joint = own.for_selection(problem.state)
        costs = layer_unit_costs(options.unit_costs, own, problem.state, joint)
        curve = select_units(joint, method=options.selection, unit_costs=costs, ridge=options.ridge, intercept=False)
        curves[group.name] = curve
        facts[group.name] = LayerFacts.of(own.joint(), options.rank_tolerance)
        errors[group.name] = errors_by_width(curve.errors, group.unit_count)
        progress.advance()
    widths = {name: probe_widths(errors[name], widths_known(curves[name], legal[name])) for name in curves}
    samples = min(SENSITIVITY_SAMPLES, problem.held_back.count)
    progress.stage("measuring sensitivities", samples)
    measured = measure_divergences(problem, moments, curves, widths, options, samples=samples, advance=progress.advance)
    return KnownCurves(curves, errors, measured, facts)


def widths_known(curve: SelectionCurve, legal: Sequence[int]) -> tuple[int, ...]:
    """Legal widths that the curve has units for; the layer as it is, with all units, is always one."""
    listed = len(curve.order)  # fewer than all where memory is short
    return tuple(width for width in legal if width <= listed or width == legal[-1])


def errors_by_width(errors: Tensor, units: int) -> Tensor:
    """Relative errors (K + 1,) where they are known for the first widths only: no fall between, none with all units."""
    missing = units + 1 - len(errors)
    if not missing:
        return errors
    return torch.cat([errors, errors[-1:].expand(missing - 1), errors.new_zeros(1)])


def search_widths(
    search: Search,
    options: LayerOptions,
    progress: Progress,
    *,
    budgets: Mapping[str, float],
    max_drop: float | None,
    timed: Callable[[Mapping[str, Tensor]], float] | None = None,
    refine: int = 0,
) -> SearchResult:
    """The widths that keep every budget (and, with `max_drop`, the accuracy) at the least predicted damage.

    With budgets alone one sweep settles it. An accuracy bound alone asks for the largest cut within it: the predicted
    damage is raised and lowered, each time verified by compressing front to back and running the held-back samples.

    Args:
        budgets: "macs", "params", "latency" -> fraction of the original's.
        timed: group name -> kept units, to the measured latency of that cut as a fraction of the original's; needed for
            a latency budget.
        refine: further sweeps over the network at the chosen widths.

    Raises:
        GateError: a budget cannot be met, or the accuracy bound cannot be kept within the budgets.
    """
    trials: list[dict[str, Any]] = []

    def attempt(allocation: Allocation) -> SearchResult:
        return _run_trial(search, allocation, options, progress, trials)

    def passes(found: SearchResult) -> bool:
        assert max_drop is not None, "only called with an accuracy bound"
        score = found.layerwise.held_back
        if score is None:
            raise GateError("--max-drop needs a network whose output is class scores (batch, classes); give a budget.")
        return score.passes(max_drop)

    if budgets:
        if "latency" in budgets:
            assert timed is not None, "a latency budget is measured"
            search = timed_search(search, budgets, timed, progress)
        found = refined(attempt(allocate(search.model, search.damages, budgets)), options, progress, refine)
        if max_drop is not None and not passes(found):
            raise GateError(
                f"Within the budget the held-back accuracy falls by {found.describe_drop()} points, "
                f"at most {max_drop:g} were allowed; nothing was written."
            )
        return found
    assert max_drop is not None, "a search has a budget or an accuracy bound"
    return refined(_largest_cut(search, attempt, passes, max_drop), options, progress, refine)


def timed_search(
    search: Search, budgets: Mapping[str, float], timed: Callable[[Mapping[str, Tensor]], float], progress: Progress
) -> Search:
    """The search with a latency prediction that agrees with a network cut to about the widths that will be chosen."""
    for _ in range(LATENCY_CHECKS):
        progress.stage("timing a cut network")
        allocation = allocate(search.model, search.damages, budgets)
        kept = {name: search.curves[name].units(width) for name, width in allocation.widths.items()}
        measured = timed(kept)
        latency = search.model.latency
        assert isinstance(latency, LatencyModel), "measured before the widths are searched"
        predicted = allocation.costs["latency"]
        corrected = replace(latency, scale=latency.scale * measured / predicted)
        search = replace(search, model=replace(search.model, latency=corrected))
        if abs(measured - predicted) <= LATENCY_SLACK * predicted:
            break
    return search


def _run_trial(
    search: Search, allocation: Allocation, options: LayerOptions, progress: Progress, trials: list[dict[str, Any]]
) -> SearchResult:
    """Compress front to back at the allocated widths and note what the held-back samples say."""
    found = compress_layers(
        search.problem,
        WidthRule(keep=1),
        replace(options, certify=False),
        progress,
        widths=allocation.widths,
        candidates=list_candidates(search, allocation.widths),
        facts=search.facts,
        kept_state=search.kept_state,
    )
    note_trial(trials, allocation, found)
    return SearchResult(search, found, allocation, trials)


def list_candidates(search: Search, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Units worth recording again in a sweep at known widths, of the layers where leaving others out saves much.

    Those that the curves of the original network keep at the width and at `CANDIDATES` times the width.
    """
    found: dict[str, Tensor] = {}
    for group in search.problem.groups:
        columns = max(reading.columns for reading in search.problem.readings(group))
        curve, width = search.curves[group.name], widths[group.name]
        wider = min(len(curve.order), math.ceil(CANDIDATES * width))
        if columns > POLISHABLE and group.blocks == 1 and wider < 0.9 * group.unit_count:
            listed = torch.zeros(group.unit_count, dtype=torch.bool)
            listed[curve.units(width)] = listed[curve.units(wider)] = True
            found[group.name] = listed.nonzero().flatten()
    return found


def refined(found: SearchResult, options: LayerOptions, progress: Progress, sweeps: int) -> SearchResult:
    """The result after further sweeps, noted as a trial; unchanged without any."""
    if not sweeps:
        return found
    search, allocation = found.search, found.allocation
    layerwise = refine_layers(
        search.problem, found.layerwise, options, progress, sweeps=sweeps, kept_state=search.kept_state
    )
    note_trial(found.trials, allocation, layerwise, refined=sweeps)
    return replace(found, layerwise=layerwise)


def note_trial(trials: list[dict[str, Any]], allocation: Allocation, found: Layerwise, refined: int = 0) -> None:
    """What the held-back samples say of a compressed network, for the report."""
    score = None if found.held_back is None else found.held_back.as_report()
    trials.append(
        {
            "predicted_damage": allocation.damage,
            "costs": allocation.costs,
            "refining_sweeps": refined,
            "held_back": score,
        }
    )


def milder_search(found: SearchResult, options: LayerOptions, progress: Progress, *, refine: int = 0) -> SearchResult:
    """The same search at a third of the predicted damage."""
    allocation = at_damage(found.search, found.allocation.damage / 3)
    return refined(_run_trial(found.search, allocation, options, progress, found.trials), options, progress, refine)


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


def certify_widths(found: SearchResult, options: LayerOptions, progress: Progress) -> dict[str, dict[str, Any]]:
    """For every layer that was cut, a certified lasso solution on the original network's moments, as plain data.

    Empty where the moments are gone, because the curves came from an earlier run.
    """
    search, certified = found.search, {}
    cut = [result for result in found.layerwise.results if result.name in search.moments]
    progress.stage("certifying", len(cut))
    for result in cut:
        width = len(result.kept)
        if width < result.units:
            own = search.moments[result.name]
            joint = own.joint()
            costs = layer_unit_costs(options.unit_costs, own, search.problem.state, joint)
            solution, form = certify_layer(joint, costs, width, None, solver=options.solver, gap=options.gap)
            silencing = MultitaskLasso(joint, 0.0, costs).silencing_penalty
            certified[result.name] = certificate_report(solution, f"{form}; original features", silencing)
        progress.advance()
    return certified


def search_report(found: SearchResult) -> dict[str, Any]:
    """How the widths were found: trials, and per layer the measured and the predicted damage. Plain data."""
    return {
        "trials": found.trials,
        "held_back_evaluations": len(found.trials),
        "predicted_costs": found.allocation.costs,
        "layers": {
            name: {
                "width": found.allocation.widths[name],
                "predicted_damage": float(curve.damage[found.allocation.widths[name]]),
                "measured": [list(point) for point in curve.measured],
                "error_curve": [round(float(error), 6) for error in curve.errors],
            }
            for name, curve in found.search.damages.items()
        },
    }

"""What is known before any width is chosen: per layer the selection, its errors, and what errors do to the output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.compression.faults import LAYER_FAULTS, describe_fault
from compress.compression.known import KnownOriginal, keep_original, know_original
from compress.compression.layers.layer import LayerFacts, LayerOptions, layer_unit_costs, select_along
from compress.compression.pricing.allocate import Choices, DamageCurve, Removal, damage_curve, legal_widths
from compress.compression.pricing.costs import CostModel, cost_model, find_products
from compress.compression.pricing.latency import measure_latency_model
from compress.compression.problem import Problem, Recorded, record_all
from compress.compression.resume import KnownCurves, RunState
from compress.compression.searching.damage import measure_divergences, probe_widths
from compress.compression.searching.lowerings import LEVELS, SLOWER, Lowerings, find_lowerings
from compress.convex import SelectionCurve
from compress.progress import Progress
from compress.recording.layer_moments import LayerMoments
from compress.units.groups import UnitGroup

SENSITIVITY_SAMPLES = 512  # at most
FEWEST_SENSITIVITY_SAMPLES = 32
SENSITIVITY_PASSES = 2.0  # over the fitting samples, that measuring may cost


@dataclass(frozen=True, eq=False)
class Search:
    """Everything known before the widths are chosen; one pass over the data, plus the sensitivities.

    Attributes:
        moments: per group, of the original network; empty where the curves came from an earlier run.
        curves: selection curve per group.
        damages: predicted damage per group and width.
        facts: what the moments of all units say, per group.
        skipped: group name -> why it stays as it is; such a group has no moments, curve or facts.
        removals: the blocks that may go as a whole, with what that does.
        lowerings: the weights that may be given a low rank, likewise, and why others may not.
        known: what was kept of the original network, for sweeps.
        kept_state: where what is found is kept for a run that goes on from here.
    """

    problem: Problem
    model: CostModel
    moments: dict[str, LayerMoments]
    curves: dict[str, SelectionCurve]
    damages: dict[str, DamageCurve]
    facts: dict[str, LayerFacts]
    skipped: dict[str, str] = field(default_factory=dict)
    removals: tuple[Removal, ...] = ()
    lowerings: Lowerings = field(default_factory=Lowerings)
    known: KnownOriginal | None = None
    kept_state: RunState | None = None

    @property
    def choices(self) -> Choices:
        """What the widths are chosen from."""
        refused = "; ".join(f"{path}: {reason}" for path, reason in self.lowerings.refused.items())
        return Choices(self.model, self.damages, self.removals, self.lowerings.usable, refused)

    def ranks(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The weights that have a low rank at these widths, and that rank."""
        return self.model.ranks(widths)

    def without_ranks(self, ranks: Mapping[str, int]) -> Search:
        """The search without these ranks of weights, whose two layers are no faster at the widths in question."""
        usable, refused = [], dict(self.lowerings.refused)
        for lowering in self.lowerings.usable:
            left = lowering.without(ranks[lowering.weight]) if lowering.weight in ranks else lowering
            if left.ranks:
                usable.append(left)
            else:
                refused[lowering.weight.rpartition(".")[0]] = SLOWER
        return replace(self, lowerings=Lowerings(tuple(usable), refused))


def prepare_search(
    problem: Problem,
    options: LayerOptions,
    progress: Progress,
    *,
    timed: bool = False,
    refining: bool = False,
    kept_state: RunState | None = None,
) -> Search:
    """Record all layers once, select along all widths, measure what errors do to the output.

    Args:
        timed: measure what the layers take at several widths, so that latency can be predicted.
        refining: sweeps behind the next ReLU will follow.
        kept_state: where curves and sensitivities are kept for a later run, and taken from.
    """
    known = None if kept_state is None else kept_state.read_curves()
    legal = {group.name: legal_widths(group.unit_count, group.blocks, options.round_to) for group in problem.groups}
    moments: dict[str, LayerMoments] = {}
    original: KnownOriginal | None = None
    if known is None or {*known.curves, *known.skipped} != set(legal):
        original = know_original(problem, rectified=refining)
        recorded = record_all(problem, progress, ((), ()) if original is None else original.keepers)
        moments = recorded.moments
        known = find_curves(problem, recorded, options, legal, progress, original)
        if kept_state is not None:
            kept_state.write_curves(known)
    else:  # the rows that sweeps are fitted to are made as they were, to the last digit
        original = keep_original(problem, progress, rectified=refining)
    damages = {
        name: fixed_width(widths[-1])
        if name in known.skipped
        else damage_curve(known.errors[name], known.measured[name], widths_known(known.curves[name], widths))
        for name, widths in legal.items()
    }
    parameters = dict(problem.network.module.named_parameters())
    lowerings = find_all_lowerings(problem, options, progress, kept_state)
    model = cost_model(
        problem.program,
        problem.groups,
        parameters,
        problem.forward_macs,
        problem.network.biases,
        problem.branches,
        [lowering.weight for lowering in lowerings.usable],
        find_products(problem.network.module, problem.program.network.examples, problem.groups, problem.forward_macs),
    )
    removals = tuple(
        Removal(branch.groups, dict(known.measured[branch.end]).get(0, math.inf))
        for branch in problem.branches
        if not known.skipped.keys() & set(branch.groups)
    )
    if timed:
        progress.stage("timing layers at several widths")
        latency = problem.share.from_first(
            lambda: measure_latency_model(problem.network, problem.groups, model.tensors, problem.timing, problem.form)
        )
        pairs = {each.weight: dict(zip(each.ranks, each.shares, strict=True)) for each in lowerings.usable}
        model = replace(model, latency=latency.with_pairs(pairs))
    return Search(
        problem,
        model,
        moments,
        known.curves,
        damages,
        known.facts,
        known.skipped,
        removals,
        lowerings,
        original,
        kept_state,
    )


def find_all_lowerings(
    problem: Problem, options: LayerOptions, progress: Progress, kept_state: RunState | None
) -> Lowerings:
    """The weights that may be given a low rank, from an earlier run's state where it has them."""
    if not problem.factorables.layers:
        return Lowerings(refused=problem.factorables.refused)
    known = None if kept_state is None else kept_state.read_lowerings()
    if known is not None:
        return Lowerings(*known)
    samples = affordable_samples(problem, len(LEVELS) * len(problem.factorables.layers))
    found = find_lowerings(problem, options, samples, progress)
    if kept_state is not None:
        kept_state.write_lowerings(found.usable, found.refused)
    return found


def find_curves(
    problem: Problem,
    recorded: Recorded,
    options: LayerOptions,
    legal: Mapping[str, tuple[int, ...]],
    progress: Progress,
    original: KnownOriginal | None = None,
) -> KnownCurves:
    """Selection curves of all groups, and the divergences at a few widths of each."""
    curves: dict[str, SelectionCurve] = {}
    errors: dict[str, Tensor] = {}
    facts: dict[str, LayerFacts] = {}
    skipped = dict(recorded.skipped)
    progress.stage("selecting units", len(problem.groups))
    for number, group in enumerate(problem.groups, 1):
        if group.name not in skipped:
            try:
                curve, facts[group.name] = find_curve(problem, group, recorded.moments[group.name], options)
                curves[group.name] = curve
                errors[group.name] = errors_by_width(curve.errors, group.unit_count)
            except LAYER_FAULTS as fault:
                skipped[group.name] = describe_fault(fault)
        progress.advance()
        progress.reach(0.3 + 0.5 * number / len(problem.groups))
    widths = {name: probe_widths(errors[name], widths_known(curves[name], legal[name])) for name in curves}
    for branch in problem.branches:
        if branch.end in widths:
            widths[branch.end] = [0, *widths[branch.end]]
    samples = affordable_samples(problem, sum(map(len, widths.values())))
    progress.stage("measuring sensitivities", samples)
    measured = measure_divergences(
        problem,
        recorded.moments,
        curves,
        widths,
        options,
        samples=samples,
        known=original,
        advance=progress.advance,
    )
    return KnownCurves(curves, errors, measured, facts, skipped)


def find_curve(
    problem: Problem, group: UnitGroup, moments: LayerMoments, options: LayerOptions
) -> tuple[SelectionCurve, LayerFacts]:
    """One group's selection along all widths, and what its moments say. Raises SolverError."""
    joint = moments.for_selection(problem.state)
    costs = layer_unit_costs(options.unit_costs, group, moments, problem.state, joint)
    curve = select_along(joint, costs, options)
    return curve, LayerFacts.of(moments.joint(), options.rank_tolerance)


def affordable_samples(problem: Problem, cuts: int) -> int:
    """Held-back samples that sensitivities are measured on: each cut costs half a pass over them, on the average."""
    passes = SENSITIVITY_PASSES * problem.fitting.count / max(1, cuts / 2)
    return min(SENSITIVITY_SAMPLES, problem.held_back.count, max(FEWEST_SENSITIVITY_SAMPLES, math.ceil(passes)))


def fixed_width(units: int) -> DamageCurve:
    """The curve of a layer that keeps all its units."""
    nothing = torch.zeros(units + 1, dtype=torch.float64)
    return DamageCurve(nothing, (units,), nothing)


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

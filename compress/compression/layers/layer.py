"""One layer: certificate, ranks, width, units, refit, from its moments alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from compress.compression.layers.certificates import certificate_report, certify_layer
from compress.compression.layers.decisions import (
    Decision,
    Given,
    Keep,
    LassoSupport,
    Width,
    Within,
    count_to_keep,
    largest_error,
    round_up,
    smallest_width,
)
from compress.compression.layers.nested import NestedRefits
from compress.compression.layers.refit import held_back_error, nested_refits, refit_layer
from compress.compression.layers.result import (
    NEEDS_MEMORY,
    LayerResult,
    report_facts,
    report_fit,
    report_widths,
)
from compress.convex import (
    Moments,
    MultitaskLasso,
    SelectionCurve,
    Solution,
    WidthBound,
    nested_errors,
    polish_units,
    select_units,
    solve,
    solve_exact,
    width_bound,
)
from compress.diagnostics.balance import input_norms
from compress.recipe import Recipe
from compress.recording.layer_moments import LayerMoments, count_duplicates, dead_units, root_mean_square
from compress.report.model import Facts, Fit, LayerReport
from compress.units.groups import UnitGroup

POLISHABLE = 1024  # columns K·s up to which swaps polish the chosen units
SHAKING = 0.3  # most effort of polishing, about a second a layer on one core


def default_of(option: str) -> Any:
    """What an option of a recipe is where nothing is said."""
    return Recipe.model_fields[option].default


@dataclass(frozen=True)
class LayerOptions:
    """How a layer is solved: the recipe's options of the same names, with their defaults."""

    solver: str = default_of("solver")
    gap: float = default_of("gap")
    unit_costs: str = default_of("unit_costs")
    selection: str = default_of("selection")
    ridge: float = default_of("ridge")
    rank_tolerance: float = default_of("rank_tolerance")
    round_to: int = default_of("round_to")
    certify: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> LayerOptions:
        """Those of a recipe."""
        return cls(**{each.name: getattr(recipe, each.name) for each in fields(cls) if each.name != "certify"})


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What the moments of all units say about a layer, whichever of them stay.

    Attributes:
        dead, duplicates: units that never fire, and that are multiples of an earlier one.
    """

    bound: WidthBound
    dead: int
    duplicates: int

    @classmethod
    def of(cls, joint: Moments, tolerance: float) -> LayerFacts:
        """From the joint moments of all readings; `tolerance` of the numerical ranks."""
        return cls(width_bound(joint, tolerance=tolerance), int(dead_units(joint).sum()), count_duplicates(joint))

    def report(self) -> Facts:
        """As a report holds them."""
        return report_facts(self.bound, self.dead, self.duplicates)


def layer_unit_costs(
    kind: str, group: UnitGroup, moments: LayerMoments, state: Mapping[str, Tensor], joint: Moments
) -> Tensor:
    """Unit costs c (K,), scaled to mean 1 and bounded below: "path" ‖w_k‖, "one", or "feature" sqrt(G_kk)."""
    if kind == "one":
        return joint.gram.new_ones(joint.unit_count)
    if kind == "feature":
        costs = joint.gram.diagonal().reshape(-1, joint.group_size).sum(1).clamp_min(0).sqrt()
    else:
        costs = input_norms(group, state)[moments.units].to(joint.gram)
    scale = float(costs.mean())
    return (costs / scale).clamp_min(1e-6) if scale > 0 else torch.ones_like(costs)


@dataclass(frozen=True, eq=False)
class Certified:
    """A certified solution of a convex problem, and in words which problem it solves.

    Attributes:
        selected: a smaller width at which selected units do the same; None: the width is that of its support.
        support: whether the units of its support are those to keep.
    """

    solution: Solution
    form: str
    selected: int | None = None
    support: bool = False

    @property
    def width(self) -> int:
        """Units of its support, or fewer that were selected; at least one."""
        return max(1, len(self.solution.active) if self.selected is None else self.selected)


@dataclass(frozen=True, eq=False)
class Weighing:
    """What the moments of one layer give before anything is decided.

    Attributes:
        joint: moments of all readings as one problem; `selecting`: the same, shrunk where rows are few.
        costs: unit costs (K,).
    """

    joint: Moments
    selecting: Moments
    costs: Tensor

    @classmethod
    def of(cls, group: UnitGroup, moments: LayerMoments, kind: str, original: Mapping[str, Tensor]) -> Weighing:
        """From recorded moments; `kind` of the unit costs, `original`: state of the original network."""
        joint = moments.joint()
        costs = layer_unit_costs(kind, group, moments, original, joint)
        return cls(joint, moments.for_selection(original), costs)

    @property
    def lambda_max(self) -> float:
        """The smallest penalty that leaves no unit."""
        return MultitaskLasso(self.joint, 0.0, self.costs).lambda_max


@dataclass(eq=False)
class LayerProblem:
    """One layer's moments, and what they say whatever is decided: found once, when it is asked for.

    Attributes:
        original, current: states of the original network and of the one compressed so far.
        known_facts: from moments of all units; None: found from these.
        known: how the units were selected in the original network. Exchanges on these moments start from there.
        swaps: whether chosen units may be exchanged for others.
        effort: of looking for better ones than exchanges lead to.
    """

    group: UnitGroup
    moments: LayerMoments
    options: LayerOptions
    original: Mapping[str, Tensor]
    current: Mapping[str, Tensor]
    known_facts: LayerFacts | None = None
    known: SelectionCurve | None = None
    swaps: bool = True
    effort: float = SHAKING

    @cached_property
    def weighing(self) -> Weighing:
        """What nothing decides."""
        return Weighing.of(self.group, self.moments, self.options.unit_costs, self.original)

    @cached_property
    def facts(self) -> LayerFacts:
        """Ranks, dead units and duplicates."""
        return self.known_facts or LayerFacts.of(self.weighing.joint, self.options.rank_tolerance)

    @cached_property
    def selection(self) -> SelectionCurve:
        """Which units to keep at every width."""
        return select_along(self.weighing.selecting, self.weighing.costs, self.options)

    def order(self, decision: Decision) -> SelectionCurve:
        """Which units to keep at every width; at one width alone where the decision gives them.

        A width that a search found has its order from the original network, where that is of the same units; what has
        changed since is left to exchanges.
        """
        if isinstance(decision, Given):
            return given_units(self.moments, decision.units)
        known = self.known
        whole = self.moments.candidates is None and known is not None and len(known.order) == len(self.moments.units)
        return known if isinstance(decision, Width) and known is not None and whole else self.selection

    def certify(self, decision: Decision, layer: LayerResult) -> LayerResult:
        """What a decision came to with a certified solution beside it, where one is asked for and it has none."""
        if not self.options.certify or layer.report.certificate is not None or layer.lacks_memory:
            return layer
        clock = _Clock(layer.report.seconds)
        weighing, options = self.weighing, self.options
        error = layer.report.fit.error if isinstance(decision, Within) else None
        solution, form = certify_layer(
            weighing.joint, weighing.costs, len(layer.kept), error, solver=options.solver, gap=options.gap
        )
        clock.lap("lasso")
        certificate = certificate_report(solution, form, weighing.lambda_max)
        return replace(layer, report=replace(layer.report, certificate=certificate, seconds=clock.laps))


def solve_layer(problem: LayerProblem, decision: Decision) -> LayerResult:
    """Choose a width as decided, choose its units, refit the consumers; not certified but where units rest on it.

    Raises:
        SolverError: the convex problem could not be solved at all.
    """
    clock = _Clock()
    group, moments, options = problem.group, problem.moments, problem.options
    weighing, facts = problem.weighing, problem.facts
    clock.lap("ranks")
    certified = solve_lasso(weighing, decision, options)
    clock.lap("lasso")
    curve = problem.order(decision)
    if certified is not None and isinstance(decision, Within):
        certified = support_or_selected(certified, curve, weighing, options)
    clock.lap("selection")
    trials = Trials(moments, curve, options.ridge, problem.original, problem.current)
    width = find_width(group, moments, decision, certified, options, trials)
    clock.lap("width")
    if width is None:
        return leave_whole(group, moments, facts, curve, clock.laps)
    places = trials.places(width)
    kept = take_units(problem, curve, width, decision, certified)
    clock.lap("selection")
    settled = places is not None and torch.equal(kept, curve.units(width))
    refit = refit_layer(moments, kept, options.ridge, problem.original, problem.current, places, settled=settled)
    clock.lap("refit")
    units = moments.units[kept.cpu()]
    inherited = trials.unchanged if isinstance(decision, Width) else trials.floor
    report = LayerReport(
        group.name,
        group.unit_count,
        len(units),
        facts.report(),
        report_widths(curve, trials.measured),
        report_fit(moments, refit.error, refit.held_back_error, inherited),
        None if certified is None else certificate_report(certified.solution, certified.form, weighing.lambda_max),
        clock.laps,
    )
    return LayerResult(report, units, refit.weights)


def solve_lasso(weighing: Weighing, decision: Decision, options: LayerOptions) -> Certified | None:
    """The lasso's solution where the decision rests on its support; None where it does not."""
    joint, costs = weighing.joint, weighing.costs
    if isinstance(decision, LassoSupport):
        problem = MultitaskLasso(joint, decision.penalty * weighing.lambda_max, costs)
        solution = solve(problem, options.solver, tolerance=options.gap)
        return Certified(solution, f"penalised at {decision.penalty:g} of λ_max")
    if isinstance(decision, Within) and decision.error == 0:
        solution = solve_exact(
            joint, costs, solver=options.solver, tolerance=options.gap, range_tolerance=options.rank_tolerance
        )
        form = f"exact on the numerical range of Φ (relative singular value {options.rank_tolerance:g})"
        return Certified(solution, form)
    return None


def support_or_selected(
    certificate: Certified, curve: SelectionCurve, weighing: Weighing, options: LayerOptions
) -> Certified:
    """The exact solution's own units, or fewer that selection finds for the same error; its form says which and why."""
    support = certificate.solution.active.cpu()
    reached = float(nested_errors(weighing.selecting, support, ridge=options.ridge, intercept=False)[-1])
    selected = curve.width_for(reached * (1 + 1e-6) + 1e-9)
    if selected < len(support):
        why = f"{selected} selected units are kept: they refit to the error {reached:.1e} of its {len(support)}"
        return replace(certificate, form=f"{certificate.form}; {why}", selected=selected)
    why = f"its own {len(support)} units are kept: selection takes {selected} for their error {reached:.1e}"
    return replace(certificate, form=f"{certificate.form}; {why}", support=True)


def select_along(moments: Moments, costs: Tensor, options: LayerOptions) -> SelectionCurve:
    """Units at every width, by the method of the options; of "best" the better one alone where columns are many.

    Backward elimination wins at all but the smallest widths, and an order of thousands of columns takes minutes.
    """
    wide = moments.covariance.shape[0] > POLISHABLE
    method = "backward" if wide and options.selection == "best" else options.selection
    return select_units(moments, method=method, unit_costs=costs, ridge=options.ridge, intercept=False)


@dataclass(eq=False)
class Trials:
    """Held-back errors after a refit at the widths that were tried.

    Attributes:
        measured: width -> error.
    """

    moments: LayerMoments
    curve: SelectionCurve
    ridge: float
    original: Mapping[str, Tensor]
    current: Mapping[str, Tensor]
    measured: dict[int, float] = field(default_factory=dict)
    _nested: dict[str, list[NestedRefits]] = field(default_factory=dict)

    def error_at(self, width: int, enough: float = 0.0) -> float:
        """The error with so many units of the curve; no lower one is looked for where each reading's is `enough`."""
        if width not in self.measured:
            order = None if width in self.curve.polished else self.curve.methods[width]
            if order is None:
                kept = self.curve.units(width)
                refit = refit_layer(self.moments, kept, self.ridge, self.original, self.current)
                self.measured[width] = refit.held_back_error
            else:
                nested = self._nested_in(order)
                self.measured[width] = root_mean_square([each.held_back_error(width, enough) for each in nested])
        return self.measured[width]

    def places(self, width: int) -> list[int] | None:
        """Of the ridge that is best for each reading with so many units of the curve; None where none were tried.

        What was factored for trials is let go.
        """
        nested = self._nested.get(self.curve.methods[width])
        self._nested.clear()
        return None if nested is None else [each.best_place(width) for each in nested]

    def _nested_in(self, order: str) -> list[NestedRefits]:
        if order not in self._nested:
            self._nested[order] = nested_refits(self.moments, self.curve.orders[order], self.ridge, self.current)
        return self._nested[order]

    @property
    def floor(self) -> float:
        """The error with all units, left by earlier layers."""
        unchanged = self.moments.unchanged
        return self.error_at(len(self.moments.units)) if unchanged is None else unchanged[1]

    @property
    def unchanged(self) -> float:
        """The same without a refit."""
        if self.moments.unchanged is not None:
            return self.moments.unchanged[1]
        return held_back_error(self.moments, torch.arange(len(self.moments.units)), self.original, self.current)


def find_width(
    group: UnitGroup,
    moments: LayerMoments,
    decision: Decision,
    certificate: Certified | None,
    options: LayerOptions,
    trials: Trials,
) -> int | None:
    """The width that the decision comes to; None where it takes more units than the memory bound lets be weighed."""
    units = len(moments.units)
    if isinstance(decision, Given):
        return len(decision.units)
    if isinstance(decision, Width):
        width = decision.count
    elif isinstance(decision, Keep):
        width = count_to_keep(decision.amount, group.unit_count)
    elif certificate is not None:
        width = certificate.width
    else:
        assert isinstance(decision, Within), "the other decisions are above"
        more = units if moments.unchanged is None else units + 1  # one more stands for the layer as it is
        enough = largest_error(decision.error, trials.floor)
        near = trials.curve.width_for(enough)
        width = smallest_width(partial(trials.error_at, enough=enough), more, decision.error, trials.floor, near)
    if moments.unchanged is not None and width > units:
        return None
    return min(units, legal_width(group, round_up(width, options.round_to, units)))


def take_units(
    problem: LayerProblem, curve: SelectionCurve, width: int, decision: Decision, certificate: Certified | None
) -> Tensor:
    """Places (width,) of the units that stay, among those that the moments hold."""
    if isinstance(decision, Given) or not width:
        return curve.units(width)
    group, options, weighing = problem.group, problem.options, problem.weighing
    if certificate is not None and certificate.support and group.blocks == 1:
        support = certificate.solution.active.cpu()
        if len(support) == width:
            return support
    kept = legal_units(group, curve, width)
    small = weighing.joint.gram.shape[0] <= POLISHABLE and width < weighing.joint.unit_count
    if problem.swaps and small and options.selection == "best" and group.blocks == 1:
        starts = [order[:width] for order in curve.orders.values()]
        return polish_units(
            weighing.selecting, kept, others=starts, ridge=options.ridge, intercept=False, effort=problem.effort
        )
    return kept


def adjust_layer(
    moments: LayerMoments,
    kept: Tensor,
    options: LayerOptions,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """New tensors of a consumer whose input has changed and whose units stay; none where held-back samples do not gain.

    Args:
        kept: (m,) unit numbers that are left; without any it is the constant that is found again.
    """
    held = moments.units
    if not bool(torch.isin(kept, held).all()):  # some were left out for want of memory
        return {}
    kept = torch.searchsorted(held, kept)
    refit = refit_layer(moments, kept, options.ridge, original, current)
    before = held_back_error(moments, kept, original, current)
    return refit.weights if refit.held_back_error < before else {}


def given_units(moments: LayerMoments, chosen: Tensor) -> SelectionCurve:
    """A curve that knows one width: the given units. Raises ValueError for a unit that the moments do not hold."""
    places = {int(unit): place for place, unit in enumerate(moments.units)}
    missing = [int(unit) for unit in chosen if int(unit) not in places]
    if missing:
        raise ValueError(f"`chosen`: units {missing[:5]} are not among the {len(places)} of {moments.group.name}.")
    chosen_places = torch.tensor(sorted(places[int(unit)] for unit in chosen), dtype=torch.int64)
    other_places = torch.tensor(sorted(set(range(len(places))) - set(chosen_places.tolist())), dtype=torch.int64)
    order = torch.cat([chosen_places, other_places])
    unknown = torch.full((len(order) + 1,), torch.nan, dtype=torch.float64)
    return SelectionCurve(order, unknown, ("given",) * (len(order) + 1), {"given": order})


def leave_whole(
    group: UnitGroup, moments: LayerMoments, facts: LayerFacts, curve: SelectionCurve, seconds: dict[str, float]
) -> LayerResult:
    """A layer left as it is, because it needs more units than the memory bound lets be weighed against each other."""
    assert moments.unchanged is not None, "only where units were left out of the moments"
    error, held_back = moments.unchanged
    fit = report_fit(moments, error, held_back, held_back, note=NEEDS_MEMORY)
    widths = report_widths(curve, {})
    units = group.unit_count
    report = LayerReport(group.name, units, units, facts.report(), widths, fit, seconds=seconds)
    return LayerResult(report, torch.arange(units), lacks_memory=True)


def unread(group: UnitGroup, facts: LayerFacts, curve: SelectionCurve) -> LayerResult:
    """A layer inside a block that goes as a whole: no unit is left, and nothing reads what its consumers give.

    Args:
        curve: of its units in the original network.
    """
    fit = Fit(1.0, 1.0, None, 0, "the block that it is in is removed")
    report = LayerReport(group.name, group.unit_count, 0, facts.report(), report_widths(curve, {}), fit)
    return LayerResult(report, torch.arange(0))


def legal_width(group: UnitGroup, width: int) -> int:
    """The smallest legal width that is at least `width`: equal counts in every block of a grouped layer."""
    blocks = group.blocks
    return min(group.unit_count, -(-width // blocks) * blocks)


def legal_units(group: UnitGroup, curve: SelectionCurve, width: int) -> Tensor:
    """The units (width,) to keep, sorted; in each block of a grouped layer its first ones in the nested order."""
    if group.blocks == 1:
        return curve.units(width)
    size = group.unit_count // group.blocks
    order = curve.order.tolist()
    chosen = [
        unit
        for block in range(group.blocks)
        for unit in [unit for unit in order if unit // size == block][: width // group.blocks]
    ]
    return torch.tensor(sorted(chosen))


class _Clock:
    """Wall seconds by stage."""

    def __init__(self, laps: Mapping[str, float] | None = None) -> None:
        self.laps: dict[str, float] = dict(laps or {})
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now

"""Widths of all layers under budgets or an accuracy bound: allocation, a sweep, verification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from compress.compression.faults import LAYER_FAULTS, describe_fault
from compress.compression.layers.certificates import certificate_report, certify_layer
from compress.compression.layers.decisions import Decision, Leave, Plan, Width
from compress.compression.layers.layer import POLISHABLE, LayerOptions, layer_unit_costs, legal_units
from compress.compression.layers.result import rounded
from compress.compression.pricing.allocate import Allocation, allocate, priced_widths, relative_costs
from compress.compression.pricing.latency import MOST_PASSES, LatencyModel, time_chosen
from compress.compression.pricing.pairs import extents_left
from compress.compression.problem import Problem, record_all
from compress.compression.scoring import score_samples
from compress.compression.searching.curves import Search
from compress.compression.searching.lowerings import describe_lowered, faster_ranks
from compress.compression.searching.revision import revised_allocation, with_less_damage, worth_a_sweep
from compress.compression.sweep import Compressed, refine, sweep
from compress.convex import MultitaskLasso
from compress.errors import GateError
from compress.graph.cost import measure_latency
from compress.progress import Portion, Progress
from compress.recipe import Bound
from compress.report.model import Certificate, LayerSearch, SearchReport, Step, Trial
from compress.units.branches import removed_branches, replacements
from compress.units.forms import Form
from compress.units.low_rank import factored
from compress.units.surgery import narrow

LATENCY_CHECKS = 5  # cut networks that are timed before the sweep, each correcting the predicted latency
LARGEST_STEP = 1.3  # by which one timed network corrects the prediction
LATENCY_SLACK = 0.03  # of the budget, that a timed network may leave unused
ACCURACY_SWEEPS = 6
FIRST = (2e-4, 0.1)  # least and most damage in nats that a search for an accuracy begins with
CANDIDATES = 1.5  # units to choose among in a sweep, for each that will stay
BLEND = {"macs": 1.0, "params": 1.0}  # what an accuracy bound alone tries to save


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The chosen widths, how they were found and what came of them.

    Attributes:
        trials: one entry per sweep: predicted damage, costs, held-back score.
        certificates: what `certify_widths` gives; None: not asked yet.
    """

    search: Search
    compressed: Compressed
    allocation: Allocation
    trials: list[Trial]
    certificates: Mapping[str, Certificate] | None = None

    @property
    def whole(self) -> bool:
        """Whether no layer lost a unit or its rank."""
        return not any(result.is_cut for result in self.compressed.results) and not self.compressed.ranks


@dataclass(frozen=True)
class Judgement:
    """Whether a compressed network is good enough, and what was lost, in words."""

    passed: bool
    lost: str


Judge = Callable[[Compressed], Judgement]


@dataclass(frozen=True, eq=False)
class Wanted:
    """An accuracy bound of a search.

    Attributes:
        judge: looks at a compressed network, still in its original shapes.
        first: predicted damage in nats to begin with.
        bound: in words, for messages.
    """

    judge: Judge
    first: float
    bound: str


def held_back_bound(bound: Bound) -> Wanted:
    """The bound as held-back samples keep it. Its judge raises GateError where they do not tell."""

    def judge(compressed: Compressed) -> Judgement:
        score = compressed.held_back
        if score is None or score.change() is None:
            raise GateError(
                "--max-drop is searched for on held-back samples of --data, which do not tell it: that needs an output "
                "of class scores, or labels or targets that fit one. Give a budget, or such data."
            )
        return Judgement(score.passes(bound), score.describe_loss())

    first = bound.most if bound.relative else bound.most / 100
    return Wanted(judge, min(max(first, FIRST[0]), FIRST[1]), str(bound) if bound.relative else f"{bound} points")


def check_held_back(problem: Problem, bound: Bound, progress: Progress) -> None:
    """Refuse, before any work, a bound that the held-back samples could not show to be kept. Raises GateError.

    The original is scored against itself: what is in doubt where nothing is lost is so with every cut.
    """
    stream = problem.held_back
    progress.stage("scoring held-back samples", stream.count)
    score = score_samples(
        problem.program,
        problem.state,
        problem.state,
        stream.batch,
        stream.sizes(),
        problem.outputs,
        problem.calibration.answered,
        judged=problem.calibration.judged,
        advance=progress.advance,
    )
    if score.change() is not None and not score.passes(bound):
        raise GateError(
            f"{stream.count} held-back samples tell {score.describe_loss()} even where nothing is lost, so that no cut "
            f"can be shown to keep --max-drop {bound}: hold back more (--held-back 0.3), give more samples, or allow "
            "more. Nothing was written."
        )


def search_widths(
    search: Search,
    options: LayerOptions,
    progress: Progress,
    *,
    budgets: Mapping[str, float],
    wanted: Wanted | None,
    sweeps: int = 0,
) -> SearchResult:
    """The widths that keep every budget (and, with a bound, the accuracy) at the least predicted damage.

    With budgets alone one sweep settles it, or a second one at widths revised by what the first measured. An accuracy
    bound alone asks for the largest cut within it: the predicted damage is raised and lowered, each time verified by
    compressing front to back and running the held-back samples.

    Args:
        budgets: "macs", "params", "latency" -> fraction of the original's.
        sweeps: further ones over the network at the chosen widths.

    Raises:
        GateError: a budget cannot be met, or the accuracy bound cannot be kept within the budgets.
    """
    trials: list[Trial] = []

    def attempt(search: Search, allocation: Allocation) -> SearchResult:
        return _run_trial(search, allocation, options, Portion(progress, 0, 1 / (1 + sweeps)), trials)

    if budgets:
        if "latency" in budgets:
            search, allocation = with_faster_pairs(search, lambda each: timed_search(each, budgets, progress))
        else:
            search, allocation = with_faster_pairs(search, lambda each: (each, allocate(each.choices, budgets)))
        first = attempt(search, allocation)
        searched = refined(revised(first, budgets, options, partial(attempt, search)), options, progress, sweeps)
        judgement = None if wanted is None else wanted.judge(searched.compressed)
        if wanted is not None and judgement is not None and not judgement.passed:
            raise GateError(
                f"Within the budget held-back samples lose {judgement.lost}, at most {wanted.bound} were allowed; "
                "nothing was written."
            )
        return searched
    assert wanted is not None, "a search has a budget or an accuracy bound"
    return refined(_largest_cut(search, attempt, wanted), options, progress, sweeps)


def revised(
    first: SearchResult,
    budgets: Mapping[str, float],
    options: LayerOptions,
    attempt: Callable[[Allocation], SearchResult],
) -> SearchResult:
    """A sweep's result, or that of another at widths revised by what the first measured, where less damage is done."""
    allocation = revised_allocation(first.search, first.allocation, first.compressed, budgets)
    if allocation is None or slower_pairs(first.search, allocation.widths):
        return first
    if not worth_a_sweep(first.search, first.allocation, first.compressed, allocation, options):
        return first
    if "latency" in budgets and doubted_time(first.search, allocation.widths, budgets["latency"]) > budgets["latency"]:
        return first
    second = attempt(allocation)
    if with_less_damage(first.compressed, second.compressed):
        return second
    first.trials.append(first.trials.pop(-2))  # the last is the one that is taken
    return first


def timed_search(search: Search, budgets: Mapping[str, float], progress: Progress) -> tuple[Search, Allocation]:
    """The search with a prediction of latency that agrees with what was measured, and the widths to take.

    Networks cut to the widths in question are timed, each correcting the prediction, until one is just fast enough. Of
    those that are, the one of least predicted damage is taken; where none is, the last, which is corrected once more.
    No budget is refused by the prediction alone: the narrowest network is timed before.

    Raises:
        GateError: no widths are fast enough.
    """
    try:
        allocation = allocate(search.choices, budgets)
    except GateError:
        progress.stage("timing the narrowest network")
        widths = search.choices.narrowest()
        share = relative_costs(search.model, widths)["latency"]
        search = corrected_search(search, time_allocation(search, widths) / share)
        allocation = allocate(search.choices, budgets)
    fast: list[Allocation] = []
    for _ in range(LATENCY_CHECKS):
        progress.stage("timing a cut network")
        measured = doubted_time(search, allocation.widths, budgets["latency"])
        step = measured / allocation.costs["latency"]  # one disturbed measurement is not all
        search = corrected_search(search, min(LARGEST_STEP, max(1 / LARGEST_STEP, step)))
        if measured <= budgets["latency"]:
            fast.append(replace(allocation, costs={**allocation.costs, "latency": measured}))
            if measured >= (1 - LATENCY_SLACK) * budgets["latency"]:
                break
        try:
            allocation = allocate(search.choices, budgets)
        except GateError:
            if not fast:
                raise
            break
    return search, min(fast, key=lambda each: each.damage) if fast else allocation


def with_faster_pairs(
    search: Search, allot: Callable[[Search], tuple[Search, Allocation]]
) -> tuple[Search, Allocation]:
    """The allocation all of whose ranks save time at its widths; the search without the ranks that did not.

    Args:
        allot: gives an allocation from what a search knows, and that search.
    """
    while True:
        search, allocation = allot(search)
        slow = slower_pairs(search, allocation.widths)
        if not slow:
            return search, allocation
        search = search.without_ranks(slow)


def slower_pairs(search: Search, widths: Mapping[str, int]) -> dict[str, int]:
    """The weights of a low rank, and that rank, for which two layers are no faster than one at these widths."""
    problem, ranks = search.problem, search.ranks(widths)
    slow: dict[str, int] = {}
    for layer in problem.factorables.layers:
        rank = ranks.get(layer.weight, 0)
        extents = extents_left(layer, problem.groups, widths)
        if rank and not faster_ranks(problem, layer, [rank], extents):
            slow[layer.weight] = rank
    return slow


def corrected_search(search: Search, factor: float) -> Search:
    """The search whose predicted latency of every cut network is multiplied by `factor`."""
    latency = search.model.latency
    assert isinstance(latency, LatencyModel), "measured before the widths are searched"
    return replace(search, model=replace(search.model, latency=replace(latency, scale=latency.scale * factor)))


def doubted_time(search: Search, widths: Mapping[str, int], wanted: float) -> float:
    """As `time_allocation`; of what seems fast enough the larger of two: of several networks luck would choose one."""
    measured = time_allocation(search, widths)
    return measured if measured > wanted else max(measured, time_allocation(search, widths))


def time_allocation(search: Search, widths: Mapping[str, int]) -> float:
    """Measured latency of the network at these widths as a fraction of the original's."""
    kept = {
        group.name: legal_units(group, search.curves[group.name], widths[group.name])
        if widths[group.name] < group.unit_count
        else torch.arange(group.unit_count)  # where memory was short the curve does not know them all
        for group in search.problem.groups
    }
    return time_cut(search.problem, kept, search.ranks(widths))


def time_cut(problem: Problem, kept: Mapping[str, Tensor], ranks: Mapping[str, int] | None = None) -> float:
    """Measured latency of the network with these units as a fraction of the original's; the first process measures.

    Args:
        ranks: weights that have a low rank -> that rank.
    """
    module, sample = problem.network.module, problem.timing.inputs(problem.network)
    going = removed_branches(problem.branches, {name: len(units) for name, units in kept.items()})

    def measure() -> float:
        replaced = replacements(problem.network, going, kept, {})
        narrowed = narrow(module, kept, problem.groups, replaced=replaced)
        pairs = factored(narrowed, {name.rpartition(".")[0]: rank for name, rank in (ranks or {}).items()})
        cut = problem.form.of(pairs).module
        with problem.timing.running():
            before, after = measure_latency((module, cut), sample, most=MOST_PASSES)
        return after.least / before.least

    return problem.share.from_first(measure)


def time_forms(problem: Problem, forms: Sequence[Form]) -> list[float]:
    """Measured latencies of the whole network in some forms, as `time_cut` measures them."""
    module, sample = problem.network.module, problem.timing.inputs(problem.network)

    def measure() -> list[float]:
        copies = [form.of(narrow(module, {}, ())).module for form in forms]
        with problem.timing.running():
            before, *after = measure_latency((module, *copies), sample, most=MOST_PASSES)
        return [each.least / before.least for each in after]

    return problem.share.from_first(measure)


def _run_trial(
    search: Search, allocation: Allocation, options: LayerOptions, progress: Progress, trials: list[Trial]
) -> SearchResult:
    """Compress front to back at the allocated widths and note what the held-back samples say."""
    compressed = sweep(
        search.problem,
        plan_widths(search, allocation.widths),
        replace(options, certify=False),
        progress,
        facts=search.facts,
        curves=search.curves,
        known=search.known,
        kept_state=search.kept_state,
    )
    compressed = lowered(search, search.ranks(allocation.widths), compressed, options, progress)
    note_trial(trials, allocation, compressed)
    return SearchResult(search, compressed, allocation, trials)


def lowered(
    search: Search, ranks: Mapping[str, int], compressed: Compressed, options: LayerOptions, progress: Progress
) -> Compressed:
    """The compressed network after a sweep that gives weights their ranks. Raises GateError where one gets none."""
    if not ranks:
        return compressed
    after = refine(
        search.problem,
        compressed,
        options,
        progress,
        sweeps=1,
        ranks=ranks,
        stage="lowering",
        known=search.known,
        kept_state=search.kept_state,
    )
    missing = [name.rpartition(".")[0] for name in ranks if name not in after.ranks]
    if missing:
        raise GateError(
            f"The budget cannot be met: {', '.join(missing)} cannot be given a low rank in the cut network."
        )
    return after


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


def refined(searched: SearchResult, options: LayerOptions, progress: Progress, sweeps: int) -> SearchResult:
    """The result after further sweeps, noted as a trial; unchanged without any."""
    if not sweeps:
        return searched
    search, allocation = searched.search, searched.allocation
    portion = Portion(progress, 1 / (1 + sweeps), 1)
    compressed = refine(
        search.problem,
        searched.compressed,
        options,
        portion,
        sweeps=sweeps,
        known=search.known,
        kept_state=search.kept_state,
    )
    note_trial(searched.trials, allocation, compressed)
    return replace(searched, compressed=compressed)


def note_trial(trials: list[Trial], allocation: Allocation, compressed: Compressed) -> None:
    """What the held-back samples say of a compressed network, for the report."""
    trials.append(
        Trial(
            allocation.damage,
            allocation.costs,
            compressed.refined,
            None if compressed.held_back is None else compressed.held_back.report(),
        )
    )


def milder_search(
    searched: SearchResult, options: LayerOptions, progress: Progress, *, sweeps: int = 0
) -> SearchResult:
    """The same search at a third of the predicted damage."""
    search, allocation = faster_at_damage(searched.search, searched.allocation.damage / 3)
    return refined(_run_trial(search, allocation, options, progress, searched.trials), options, progress, sweeps)


def _largest_cut(
    search: Search,
    attempt: Callable[[Search, Allocation], SearchResult],
    wanted: Wanted,
) -> SearchResult:
    """Raise and lower the predicted damage until the accuracy just stays within the bound."""
    best: SearchResult | None = None
    lost = "nothing"
    low, high = 0.0, math.inf  # predicted damages known to pass and to fail
    target = wanted.first
    seen: set[tuple[int, ...]] = set()
    for _ in range(ACCURACY_SWEEPS):
        search, allocation = faster_at_damage(search, target)
        key = tuple(allocation.widths.values())
        if key in seen:
            break
        seen.add(key)
        searched = attempt(search, allocation)
        judgement = wanted.judge(searched.compressed)
        lost = lost if judgement.passed else judgement.lost
        if judgement.passed:
            best, low = searched, max(low, target)
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
    if best is None or (best.whole and high < math.inf):
        raise GateError(
            f"No cut stayed within the {wanted.bound} that may be lost; the last one lost {lost}. Nothing was written."
        )
    return best


def faster_at_damage(search: Search, target: float) -> tuple[Search, Allocation]:
    """As `at_damage`, of ranks that save time alone; and the search without those that did not."""
    return with_faster_pairs(search, lambda each: (each, at_damage(each, target)))


def at_damage(search: Search, target: float) -> Allocation:
    """The allocation whose predicted damage is the largest that stays within `target` nats."""
    low, high = 1e-12, 1e12
    chosen = {name: curve.legal[-1] for name, curve in search.damages.items()}
    whole = search.choices.damage(chosen)
    for _ in range(60):
        price = math.sqrt(low * high)
        widths = priced_widths(search.choices, {name: price * each for name, each in BLEND.items()})
        if search.choices.damage(widths) - whole <= target:
            chosen, low = widths, price
        else:
            high = price
    return Allocation(chosen, search.choices.damage(chosen) - whole, relative_costs(search.model, chosen), low)


def with_certificates(searched: SearchResult, options: LayerOptions, progress: Progress) -> SearchResult:
    """The result with its certificates, and without the moments of all layers, which nothing else needs."""
    certificates = certify_widths(searched, options, progress)
    return replace(searched, search=replace(searched.search, moments={}), certificates=certificates)


def certify_widths(searched: SearchResult, options: LayerOptions, progress: Progress) -> dict[str, Certificate]:
    """For every layer that was cut, a certified lasso solution on the original network's moments.

    The moments are recorded again where the curves came from an earlier run.
    """
    if searched.certificates is not None:
        return dict(searched.certificates)
    search = searched.search
    certified: dict[str, Certificate] = {}
    cut = [result for result in searched.compressed.results if result.is_cut and len(result.kept)]
    moments = search.moments
    if cut and not moments:
        moments = record_all(search.problem, progress).moments
    groups = {group.name: group for group in search.problem.groups}
    progress.stage("certifying optimality", len(cut))
    for result in cut:
        layer_moments = moments[result.name]
        joint = layer_moments.joint()
        costs = layer_unit_costs(options.unit_costs, groups[result.name], layer_moments, search.problem.state, joint)
        try:
            solution, form = certify_layer(joint, costs, len(result.kept), None, solver=options.solver, gap=options.gap)
            lambda_max = MultitaskLasso(joint, 0.0, costs).lambda_max
            certified[result.name] = certificate_report(solution, f"{form}; original features", lambda_max)
        except LAYER_FAULTS as fault:
            progress.note(f"{result.name} has no certificate: {describe_fault(fault)}")
        progress.advance()
    return certified


def search_report(searched: SearchResult) -> SearchReport:
    """How the widths were found: trials, per layer the measured and the predicted damage, and times."""
    problem, model = searched.search.problem, searched.search.model
    times = (
        time_chosen(
            problem.network,
            model.latency,
            model.removed(searched.allocation.widths),
            searched.compressed.ranks,
            problem.timing,
        )
        if isinstance(model.latency, LatencyModel)
        else []
    )
    return SearchReport(
        trials=tuple(searched.trials),
        predicted_costs=searched.allocation.costs,
        times=tuple(times),
        low_rank=describe_lowered(problem, searched.search.lowerings, searched.compressed, searched.allocation.widths),
        full_rank=dict(searched.search.lowerings.refused),
        layers={
            name: LayerSearch(
                width=searched.allocation.widths[name],
                predicted_damage=float(curve.damage[searched.allocation.widths[name]]),
                measured=tuple(Step(*point) for point in curve.measured),
                error_curve=tuple(rounded(float(error)) for error in curve.errors),
            )
            for name, curve in searched.search.damages.items()
            if name not in searched.search.skipped
        },
    )

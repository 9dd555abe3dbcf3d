"""From a recipe to the problem and to how wide each layer stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from compress.compression.layers.decisions import (
    Decision,
    Keep,
    LassoSupport,
    Within,
    count_to_keep,
    round_up,
    same_for_all,
)
from compress.compression.layers.layer import LayerOptions
from compress.compression.merging import merge_layers
from compress.compression.pricing.allocate import OUT_OF_REACH
from compress.compression.pricing.latency import Timing
from compress.compression.problem import (
    Calibration,
    Problem,
    draw_samples,
    fit_samples,
    select_groups,
    select_names,
)
from compress.compression.resume import RunState
from compress.compression.searching.curves import prepare_search
from compress.compression.searching.search import SearchResult, Wanted, check_held_back, held_back_bound, search_widths
from compress.compression.searching.tightening import sweep_within
from compress.compression.sweep import Compressed, sweep
from compress.data.extremes import find_extremes, listed
from compress.errors import DataError, GateError, NonFiniteError, NothingToCompressError, RecipeError, nearest
from compress.graph.cost import count_macs
from compress.measures.kinds import find_place
from compress.measures.outputs import Output, check_finite, named_outputs
from compress.preparation import FORWARD_FAULTS, Prepared
from compress.progress import Portion, Progress
from compress.recipe import Recipe
from compress.report.checks import gated_keys
from compress.units.branches import find_branches
from compress.units.groups import SkipKind, UnitGroup
from compress.units.low_rank import Factorables, find_factorable

UNKNOWN_TRIED = 64  # samples with NaN or Inf that the network is tried on
FORM_SUFFICES = (
    "the budget of time is kept by the network's form alone, and no unit goes: ask for less time, or say --fold off, "
    "--in-place off or --memory-format keep for what should not count"
)


def choose_widths(
    prepared: Prepared,
    problem: Problem,
    recipe: Recipe,
    progress: Progress,
    state: RunState | None = None,
    metric_bound: Wanted | None = None,
    form_share: float = 1.0,
) -> tuple[Compressed, SearchResult | None]:
    """Compress by the recipe's width rule, or search the widths where it names a budget or only an accuracy bound.

    Args:
        state: where results are kept for a later run, and taken from.
        metric_bound: the recipe's bound as the user's own measure keeps it.
        form_share: of the original's time, that the network's form alone takes.

    Returns:
        The compressed network in its original shapes, and how the search went (None without one).
    """
    if recipe.merge_aligned:
        return merge_layers(problem, recipe.rank_tolerance, progress), None
    if recipe.budgets == {"latency": recipe.latency} and problem.form and form_share <= recipe.budgets["latency"]:
        progress.note(FORM_SUFFICES)
        return Compressed([], dict(problem.state), None, None), None
    options = LayerOptions.of(recipe)
    if not searches_widths(recipe):
        if not has_rule(recipe):
            return sweep_within(problem, recipe.tolerance, recipe.output_tolerance, options, progress, state), None
        plan = same_for_all(problem.groups, width_rule(recipe))
        return sweep(problem, plan, options, progress, kept_state=state), None
    before, after = Portion(progress, 0, 0.6), Portion(progress, 0.6, 1)
    if recipe.bound is not None and not recipe.own_metric:
        check_held_back(problem, recipe.bound, before)
    search = prepare_search(
        problem,
        options,
        before,
        timed="latency" in recipe.budgets,
        refining=recipe.refine > 0,
        kept_state=state,
    )
    wanted = metric_bound if recipe.own_metric or recipe.bound is None else held_back_bound(recipe.bound)
    with streams_named(select_groups(prepared.network.groups, recipe.layer, recipe.exclude)):
        searched = search_widths(
            search,
            options,
            after,
            budgets=recipe.budgets,
            wanted=wanted,
            sweeps=recipe.refine,
        )
    return searched.compressed, searched


@contextmanager
def streams_named(groups: Sequence[UnitGroup]) -> Iterator[None]:
    """Where a budget cannot be met and residual streams among the groups are left whole: what would cut them too."""
    try:
        yield
    except GateError as fault:
        streams = sum(group.skip is not None and group.skip.kind is SkipKind.STREAM for group in groups)
        if not streams or not str(fault).startswith(OUT_OF_REACH):
            raise
        which = "a residual stream" if streams == 1 else f"{streams} residual streams"
        raise GateError(f"{fault} With --couple {which} would be cut too.", fault.report) from None


def searches_widths(recipe: Recipe) -> bool:
    """Whether widths are searched for under a budget or an accuracy bound, and not given by a rule."""
    return not recipe.merge_aligned and bool(recipe.budgets or (recipe.max_drop is not None and not has_rule(recipe)))


def has_rule(recipe: Recipe) -> bool:
    """Whether an option says how wide every layer stays."""
    return recipe.keep is not None or recipe.error is not None or recipe.penalty is not None


def width_rule(recipe: Recipe) -> Decision:
    """The recipe's width rule; by default the stated tolerance on held-back samples."""
    if recipe.keep is not None:
        return Keep(recipe.keep)
    if recipe.penalty is not None:
        return LassoSupport(recipe.penalty)
    return Within(recipe.error if recipe.error is not None else recipe.tolerance)


def describe_rule(recipe: Recipe) -> str:
    """The recipe's width rule in words."""
    return "merge aligned units" if recipe.merge_aligned else str(width_rule(recipe))


def make_problem(prepared: Prepared, recipe: Recipe) -> Problem:
    """The selected prunable groups with calibration streams.

    Raises:
        RecipeError: a layer pattern matches nothing; the names are listed.
        NothingToCompressError: nothing selected can be compressed; the reasons are listed.
    """
    groups = prepared.network.groups
    check_patterns(groups, recipe.layer)
    selected = select_groups(groups, recipe.layer, recipe.exclude)
    usable = tuple(group for group in selected if group.prunable)
    factorables = selected_factorables(prepared, recipe, usable)
    if not usable and not factorables.layers:
        reasons = "; ".join(f"{group.name}: {group.skip_reason}" for group in selected)
        if not selected:
            reasons = "No layers were found"
        if next(prepared.network.module.parameters(), None) is None:
            reasons = "The network has no parameters: layers in a plain list are not seen, those in nn.ModuleList are"
        refused = "; ".join(f"{path}: {reason}" for path, reason in factorables.refused.items())
        low_rank = f" Of no low rank can be: {refused}." if refused else ""
        unknown = [] if recipe.layer or recipe.exclude else unknown_layers(prepared.network.module, groups)
        uncut = f" Of kinds that are not cut: {', '.join(unknown)}." if unknown else ""
        raise NothingToCompressError(f"No selected layer can be compressed. {reasons}.{uncut}{low_rank}")
    assert prepared.calibration is not None, "a run needs data"
    if prepared.calibration.sample_count < 8:
        raise DataError(f"At least 8 calibration samples are needed, got {prepared.calibration.sample_count}.")
    only_batch = prepared.network.batch_size
    batch_size = prepared.network.batch_within(recipe.batch_size)
    drawn = draw_samples(prepared.calibration, recipe.calibration_samples, recipe.seed)
    extremes = find_extremes(prepared.calibration, drawn, batch_size)
    check_unknown(prepared, extremes.unknown)
    fitting, held_back, related = fit_samples(
        prepared.calibration,
        recipe.calibration_samples,
        recipe.held_back,
        batch_size,
        recipe.seed,
        whole_batches=only_batch is not None,
        left_out=extremes.numbers,
    )
    return Problem(
        network=prepared.network,
        calibration=Calibration(
            fitting, held_back, calibration_answers(prepared), gated_keys(recipe), related, extremes
        ),
        groups=usable,
        forward_macs=count_macs(prepared.network.module, prepared.network.examples),
        memory=recipe.memory_bytes,
        seed=recipe.seed,
        readers=()
        if recipe.layer or recipe.exclude
        else tuple(consumer for group in groups for consumer in group.consumers),
        filters=() if recipe.layer or recipe.exclude else prepared.network.filters,
        branches=find_branches(prepared.network, usable) if recipe.depth and searches_widths(recipe) else (),
        factorables=factorables,
        timing=Timing(recipe.latency_batch, recipe.latency_threads),
    )


def check_unknown(prepared: Prepared, numbers: Sequence[int]) -> None:
    """Refuse calibration samples (by their numbers) that hold NaN or Inf where the network's outputs then do too.

    Raises:
        DataError: which samples, and what to do.
    """
    if not numbers or prepared.calibration is None:
        return
    size = prepared.network.batch_size or min(len(numbers), UNKNOWN_TRIED)
    chosen = torch.tensor(numbers).repeat(-(-size // len(numbers)))[:size]
    batch = next(iter(prepared.calibration.batches(size, chosen)))
    try:
        with torch.inference_mode():
            returned = prepared.network.module(*(part.to(prepared.network.device) for part in batch.tensors))
        check_finite(named_outputs(returned), "the network")
    except (NonFiniteError, *FORWARD_FAULTS):
        which = f"sample {numbers[0]} holds" if len(numbers) == 1 else f"samples {listed(tuple(numbers))} hold"
        raise DataError(
            f"{prepared.calibration.name}: calibration {which} NaN or Inf, and so do the network's outputs there; "
            "leave such samples out, or put numbers in their place."
        ) from None


def unknown_layers(module: nn.Module, groups: Sequence[UnitGroup]) -> list[str]:
    """Paths and types of the modules with weight matrices that no group of units makes or reads."""
    known = {each.name for group in groups for each in group.slices}
    known |= {consumer.weight for group in groups for consumer in group.consumers}
    return [
        f"{path or 'the network itself'} ({type(part).__name__})"
        for path, part in module.named_modules()
        if any(
            weight.ndim > 1 and ".".join(filter(None, (path, name))) not in known
            for name, weight in part.named_parameters(recurse=False)
        )
    ]


def selected_factorables(prepared: Prepared, recipe: Recipe, usable: Sequence[UnitGroup]) -> Factorables:
    """The layers that two of a low rank may stand for, of the recipe's; none where it asks for none.

    Args:
        usable: groups that may lose units.
    """
    if not recipe.low_rank:
        return Factorables()
    paths = [path for path, _ in prepared.network.module.named_modules()]
    return find_factorable(prepared.network, usable, select_names(paths, recipe.layer, recipe.exclude))


def calibration_answers(prepared: Prepared) -> Output | None:
    """The output that the calibration samples' labels or targets are answers to; None without any that fit."""
    source = prepared.calibration
    if source is None or (source.labels is None and source.targets is None):
        return None
    place = find_place(prepared.network.outputs, source)
    output = None if place is None else next(each for each in prepared.network.outputs if each.name == place.name)
    return output if output is not None and place is not None and output.kind == place.kind else None


def check_widths(groups: Sequence[UnitGroup], recipe: Recipe) -> None:
    """Refuse, before any work, options that leave every layer whole. Raises NothingToCompressError."""
    if not groups:
        return
    widest = max(groups, key=lambda group: group.unit_count)
    if recipe.keep is not None and all(
        count_to_keep(recipe.keep, group.unit_count) >= group.unit_count for group in groups
    ):
        raise NothingToCompressError(
            f"--keep {recipe.keep} keeps every unit: the widest selected layer, {widest.name}, has {widest.unit_count}."
        )
    if all(round_up(1, recipe.round_to, group.unit_count) >= group.unit_count for group in groups):
        raise NothingToCompressError(
            f"--round-to {recipe.round_to} keeps every unit: the widest selected layer, {widest.name}, has "
            f"{widest.unit_count}."
        )


def check_patterns(groups: Sequence[UnitGroup], patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer. Raises RecipeError."""
    names = [group.name for group in groups]
    for pattern in patterns:
        if not select_groups(groups, [pattern], []):
            raise RecipeError(
                f"--layer: {pattern!r} matches no layer{nearest(pattern, names)}; "
                f"there are {', '.join(names) or 'none'}."
            )

"""The user's own measure in a run: imported, fed, and what it makes of a bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.api.steps.cutting import cut_network
from compress.compression.problem import Problem
from compress.compression.searching.search import Judgement, Wanted
from compress.compression.sweep import Compressed
from compress.data.importing import import_object
from compress.errors import DataError, RecipeError
from compress.measures.outputs import LONE
from compress.measures.own import Function, OwnMeasure
from compress.preparation import Prepared
from compress.recipe import Bound, Recipe
from compress.report.checks import check_own
from compress.report.evaluation import network_outputs

FIRST_DAMAGE = 0.01  # nats, that a search for a bound in a unit of the user's begins with


@dataclass(frozen=True, eq=False)
class OwnMetric:
    """A user's measure.

    Attributes:
        measure: of finished networks.
        searching: while widths are searched for, which the evaluation data has no part in.
    """

    measure: OwnMeasure
    searching: Callable[[Problem], OwnMeasure]

    @classmethod
    def of_network(cls, measure: OwnMeasure) -> OwnMetric:
        """A measure that brings its own samples, for both."""
        return cls(measure, lambda problem: measure)


def import_metric(recipe: Recipe) -> Any:
    """The function that `--metric module:function` names; None where it names none. Executes that module.

    Raises:
        RecipeError: it cannot be imported, or is no function.
    """
    if recipe.metric is None or ":" not in recipe.metric:
        return None
    function = import_object(recipe.metric, RecipeError)
    if not callable(function):
        raise RecipeError(f"--metric {recipe.metric!r} is no function.")
    if needed_arguments(function) not in (1, 2):
        raise RecipeError(
            f"--metric {recipe.metric!r} must take the network, or outputs and targets; it takes "
            f"{needed_arguments(function)} arguments."
        )
    return function


def needed_arguments(function: Any) -> int:
    """How many positional arguments a function must be given; 1 where it does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(
        each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        for each in parameters
    )


def make_metric(recipe: Recipe, function: Any, prepared: Prepared) -> OwnMetric | None:
    """The measure of an imported function; None without one.

    Raises:
        DataError: it takes outputs and targets, and the data has no labels or targets.
    """
    if function is None:
        return None
    name, higher = f"--metric {recipe.metric}", not recipe.lower_is_better
    if needed_arguments(function) == 1:
        return OwnMetric.of_network(OwnMeasure(function, name, higher, recipe.seed))
    source = prepared.evaluation
    if source is None or (source.labels is None and source.targets is None):
        raise DataError(f"{name} takes outputs and targets: give --eval data with labels or targets.")
    only_batch, device = prepared.network.batch_size, prepared.network.device
    size = only_batch or recipe.batch_size

    def fed(batches: Callable[[], Iterable[Any]]) -> OwnMeasure:
        return OwnMeasure(on_answers(function, batches, device, only_batch), name, higher, recipe.seed)

    def searching(problem: Problem) -> OwnMeasure:
        assert prepared.calibration is not None, "a run needs data"
        stream = problem.held_back.of(prepared.calibration)
        if stream.source.labels is None and stream.source.targets is None:
            raise DataError(
                f"{name} is searched for on held-back samples of --data, which have no labels or targets; give such "
                "data, or a budget."
            )
        return fed(lambda: (stream.batch(number) for number in range(len(stream.sizes()))))

    return OwnMetric(fed(lambda: source.batches(size)), searching)


def on_answers(
    function: Any, batches: Callable[[], Iterable[Any]], device: torch.device, only_batch: int | None
) -> Function:
    """The function of outputs and targets as one of a network.

    It gets the outputs of all samples (N, …) on the CPU, by name where there are several, and labels (N, …) or real
    targets (N, D).
    """

    def measured(network: nn.Module) -> Any:
        outputs: dict[str, list[Tensor]] = {}
        answers: list[Tensor] = []
        for batch in batches():
            batch_outputs = network_outputs(network, [part.to(device) for part in batch.tensors], only_batch)
            for name, tensor in batch_outputs.items():
                outputs.setdefault(name, []).append(tensor.cpu())
            answers.append(batch.labels if batch.labels is not None else batch.targets)
        whole = {name: torch.cat(parts) for name, parts in outputs.items()}
        return function(whole[LONE] if list(whole) == [LONE] else whole, torch.cat(answers))

    return measured


def own_bound(metric: OwnMetric, bound: Bound, prepared: Prepared, problem: Problem) -> Wanted:
    """The bound as the user's measure keeps it, for a search of the widths."""
    measure = metric.searching(problem)
    before = measure.of(prepared.opened.module, "the original network")

    def judge(compressed: Compressed) -> Judgement:
        kept = {result.name: result.kept for result in compressed.results if result.is_cut}
        if not kept and not compressed.ranks:
            return Judgement(True, "nothing")
        narrowed, _ = cut_network(prepared, problem, kept, compressed.state, compressed.ranks)
        after = measure.of(narrowed.module, "a compressed network")
        check = check_own(measure, bound, before, after)
        return Judgement(bool(check.passed), f"{measure.loss(before, after):.4g}")

    return Wanted(judge, bound.most if bound.relative and bound.most else FIRST_DAMAGE, str(bound))

"""Narrowing a network to chosen units, verified against the masked original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from compress.allocator import give_back_freed_memory
from compress.api.steps.measuring import evaluate_pair
from compress.api.steps.tuning import Tuning, finetune_module, recover_module
from compress.api.steps.widths import has_rule, searches_widths
from compress.checkpoint.fitting import with_versions
from compress.checkpoint.manifest import computed_state, stored_state
from compress.checkpoint.removed import outside
from compress.compression.problem import Problem
from compress.compression.sweep import Compressed
from compress.errors import NothingToCompressError
from compress.preparation import Prepared
from compress.progress import Progress, Stages
from compress.recipe import Recipe
from compress.report.evaluation import Evaluation
from compress.units.biases import without_idle_biases
from compress.units.branches import Branch, removed_branches, replacements
from compress.units.low_rank import factored
from compress.units.surgery import Narrowed, narrow, verify_narrowed


@dataclass(frozen=True, eq=False)
class Cut:
    """A narrowed network, verified and evaluated.

    Attributes:
        kept: group name -> unit numbers, of the groups that lost some.
        stored: its tensors in the checkpoint's dtypes.
        deviation: largest relative deviation from the masked original.
        evaluation: of the network as it is written.
        blocks: names of the blocks that went as a whole.
        untuned: evaluation before the fine-tuning; `tuning` says what that did. None without any.
    """

    kept: dict[str, Tensor]
    narrowed: Narrowed
    stored: dict[str, Tensor]
    deviation: float
    evaluation: Evaluation | None
    untuned: Evaluation | None = None
    tuning: Tuning | None = None
    blocks: tuple[str, ...] = ()


def make_cut(
    prepared: Prepared, problem: Problem, compressed: Compressed, recipe: Recipe, clock: Stages, progress: Progress
) -> Cut:
    """Narrow, verify and evaluate.

    Raises:
        NothingToCompressError: no layer lost a unit.
        SurgeryError: the narrowed network differs from the masked one by more than rounding.
    """
    kept = {result.name: result.kept for result in compressed.results if result.is_cut}
    if not kept and not compressed.ranks and not problem.form:
        raise NothingToCompressError(explain_whole(compressed, recipe))
    tunes = recipe.tunes and bool(kept or compressed.ranks or recipe.finetune)
    with clock("cut"):
        progress.stage("cutting and verifying")
        narrowed, deviation = cut_network(prepared, problem, kept, compressed.state, compressed.ranks)
        narrowed = narrowed if tunes else problem.form.of(narrowed)
        stored = round_to_stored(narrowed.module, prepared)
    give_back_freed_memory()
    with clock("evaluate"):
        evaluation = evaluate_pair(prepared, narrowed.module, recipe, progress)
    blocks = tuple(branch.name for branch in going(problem, kept))
    cut = Cut(kept, narrowed, stored, deviation, evaluation, blocks=blocks)
    return finetune_cut(prepared, problem, cut, recipe, clock, progress) if tunes else cut


def explain_whole(compressed: Compressed, recipe: Recipe) -> str:
    """Why no layer lost a unit, and which option changes that."""
    if compressed.skipped and not compressed.results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in compressed.skipped.items())
        return f"No selected layer can be compressed. {reasons}."
    short = sum(result.lacks_memory for result in compressed.results)
    if short:
        return (
            f"{short} of {len(compressed.results)} selected layers stay as they are because weighing their units needs "
            f"more than --memory {recipe.memory}, and no other can lose a unit at this setting."
        )
    if not (has_rule(recipe) or searches_widths(recipe) or recipe.merge_aligned):
        message = (
            f"Every selected layer needs all its units within --tolerance {recipe.tolerance:g} and --output-tolerance "
            f"{recipe.output_tolerance:g}; allow more with these, or with --error, --keep or a budget such as --macs"
        )
    else:
        message = "Every selected layer needs all its units at this setting; allow more with --error or --keep"
    return f"{message}, or a smaller --round-to than {recipe.round_to}." if recipe.round_to > 1 else f"{message}."


def round_to_stored(module: nn.Module, prepared: Prepared) -> dict[str, Tensor]:
    """The module's tensors in the checkpoint's dtypes; the module goes on with what these hold."""
    stored = stored_state(module.state_dict(), prepared.stored)
    module.load_state_dict(with_versions(module, computed_state(stored)))
    return stored


def finetune_cut(
    prepared: Prepared, problem: Problem, cut: Cut, recipe: Recipe, clock: Stages, progress: Progress
) -> Cut:
    """The cut network after its recovery or fine-tuning, folded and evaluated again. Raises NonFiniteError."""
    give_back_freed_memory()
    tuning: Tuning | None = None
    with clock("finetune" if recipe.recovery is None else "recover"):
        module = cut.narrowed.module
        if recipe.recovery is None:
            tuned, tuning = finetune_module(prepared, problem, module, recipe, progress)
        else:
            recovered = recover_module(prepared, problem, module, list(cut.kept.values()), recipe, progress)
            if recovered is None and not problem.form:
                return cut
            tuned, tuning = recovered or (module, None)
        narrowed = problem.form.of(replace(cut.narrowed, module=tuned))
        stored = round_to_stored(narrowed.module, prepared)
    give_back_freed_memory()
    with clock("evaluate"):
        evaluation = evaluate_pair(prepared, narrowed.module, recipe, progress)
    untuned = None if tuning is None else cut.evaluation
    return replace(cut, narrowed=narrowed, stored=stored, evaluation=evaluation, untuned=untuned, tuning=tuning)


def going(problem: Problem, kept: Mapping[str, Tensor]) -> tuple[Branch, ...]:
    """The blocks that go as a whole."""
    return removed_branches(problem.branches, {name: len(units) for name, units in kept.items()})


def cut_network(
    prepared: Prepared,
    problem: Problem,
    kept: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    ranks: Mapping[str, int] | None = None,
) -> tuple[Narrowed, float]:
    """The narrowed network and its largest relative deviation from the masked one.

    Args:
        ranks: weights that have a low rank, for which two layers stand -> that rank.

    Raises:
        SurgeryError: the two differ by more than rounding.
    """
    changed = {name: tensor for name, tensor in current.items() if tensor is not prepared.network.state[name]}
    aliases = prepared.network.aliases
    changed.update({name: changed[first] for name, first in aliases.items() if first in changed})
    groups = problem.groups
    replaced = replacements(prepared.network, going(problem, kept), kept, changed)
    narrowed = narrow(prepared.network.module, kept, groups, weights=changed, replaced=replaced)
    narrowed = without_idle_biases(narrowed, prepared.network.biases)
    paths = {name.rpartition(".")[0]: rank for name, rank in (ranks or {}).items()}
    narrowed = factored(narrowed, outside(paths, replaced))
    deviation = verify_narrowed(
        prepared.network.graph,
        prepared.network.module,
        kept,
        groups,
        narrowed,
        prepared.network.examples,
        weights=changed,
    )
    return narrowed, deviation

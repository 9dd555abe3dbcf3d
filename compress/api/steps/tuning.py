"""After a cut: recovery without labels, where that helps, or a training method with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.compression.problem import Problem
from compress.data.source import Subset
from compress.errors import CompressError, DataError, RecipeError, first_line
from compress.preparation import Prepared
from compress.progress import Progress
from compress.recipe import Recipe, TrainingOptions
from compress.report.model import EvaluationReport, Scores, TuningReport
from compress.training.drawing import step_batch
from compress.training.loop import Fitted, score
from compress.training.losses import LOSSES, check_answers
from compress.training.recovery import Recovery, recover
from compress.training.session import Session


class Tuning(Protocol):
    """What a fine-tuning did."""

    def report(self, before: EvaluationReport | None) -> TuningReport:
        """What a report holds of it; `before`: the evaluation of the cut network."""


@dataclass(frozen=True, eq=False)
class LabelledTuning:
    """What a training method did after a cut.

    Attributes:
        before: held-back loss and top-1 of the cut network.
        kept_epoch: whose weights were kept; 0 where no epoch had a lower held-back loss than the cut network.
    """

    options: TrainingOptions
    fitted: Fitted
    before: tuple[float, float | None]
    kept_epoch: int

    def report(self, before: EvaluationReport | None) -> TuningReport:
        """What a report holds of it; `before`: the evaluation of the cut network."""
        return TuningReport(
            method=self.options.method,
            length=len(self.fitted.curve),
            kept=self.kept_epoch,
            evaluation_before=before,
            options=self.options.model_dump(mode="json"),
            held_back_before=Scores(*self.before),
            curve=self.fitted.epochs,
        )


def check_finetuning(prepared: Prepared, recipe: Recipe) -> None:
    """Refuse, before any work, a method that cannot train on this data or network. Raises DataError, RecipeError."""
    if recipe.finetune is None:
        return
    assert prepared.calibration is not None, "a run needs data"
    if not prepared.calibration.has_labels and prepared.calibration.targets is None:
        raise DataError(
            f"--finetune {recipe.finetune} trains with labels, and {recipe.data} has none; give labelled data, or "
            "--recover STEPS, which needs none."
        )
    chosen = chosen_options(recipe)
    with torch.inference_mode():
        check_answers(chosen.loss, prepared.calibration, prepared.network.module(*prepared.network.examples))
    if prepared.network.batch_size is not None:
        raise RecipeError(
            f"--finetune: this network runs on batches of {prepared.network.batch_size} only; give --recover STEPS, "
            "which needs no labels."
        )


def chosen_options(recipe: Recipe) -> TrainingOptions:
    """How a method named by `finetune` trains."""
    given = {} if recipe.training is None else recipe.training.model_dump()
    return TrainingOptions.model_validate({**given, "method": recipe.finetune}).completed(finetuning=True)


def finetune_module(
    prepared: Prepared, problem: Problem, module: nn.Module, recipe: Recipe, progress: Progress
) -> tuple[nn.Module, Tuning]:
    """A copy of a cut network, trained with labels, never worse on the held-back samples. Raises NonFiniteError."""
    chosen = chosen_options(recipe)
    assert prepared.calibration is not None, "a run needs data"
    fitting, held_back = (
        Subset(prepared.calibration, stream.of(prepared.calibration).indices.numpy())
        for stream in (problem.fitting, problem.held_back)
    )
    before = score(module, held_back, LOSSES[chosen.loss], chosen.batch_size)
    trained = Session(prepared.network.examples, chosen, fitting, held_back, recipe.seed, progress).train(module)
    best = min(row["validation_loss"] for row in trained.fitted.curve)
    if best < before[0]:
        return trained.module, LabelledTuning(chosen, trained.fitted, before, trained.fitted.best_epoch)
    return module, LabelledTuning(chosen, trained.fitted, before, 0)


def recover_module(
    prepared: Prepared,
    problem: Problem,
    module: nn.Module,
    kept: Sequence[Tensor],
    recipe: Recipe,
    progress: Progress,
) -> tuple[nn.Module, Tuning] | None:
    """A recovered copy of a cut network, never worse on the held-back samples.

    None where nobody asked for it and the network cannot be traced again or has no gradients; a note says so.

    Args:
        kept: the units that stay, of each group that was cut.

    Raises:
        CompressError, RuntimeError: the same where a number of steps was asked for.
    """
    try:
        recovered, recovery = _recover(prepared, problem, module, kept, recipe, progress)
    except (CompressError, RuntimeError) as error:  # an operation without a derivative, one that asks for what is cut
        if recipe.recovery != "auto":
            raise
        progress.note(f"recovery is left out: {first_line(error)}")
        return None
    progress.note(recovery.describe())
    return recovered, recovery


def _recover(
    prepared: Prepared,
    problem: Problem,
    module: nn.Module,
    kept: Sequence[Tensor],
    recipe: Recipe,
    progress: Progress,
) -> tuple[nn.Module, Recovery]:
    fitting, held_back = problem.fitting, problem.held_back
    if prepared.network.batch_size is None:
        probe = prepared.network.examples[0]
        values = prepared.network.program.computed() // len(probe)
        size = min(fitting.batch_size, step_batch(probe, fitting.count, values))
        fitting, held_back = (replace(stream, batch_size=size) for stream in (fitting, held_back))
    steps = recipe.recovery if isinstance(recipe.recovery, int) else None
    return recover(
        prepared.network.module,
        prepared.network.program,
        module,
        prepared.network.examples,
        fitting,
        held_back,
        problem.outputs,
        progress,
        answered=problem.calibration.answered,
        steps=steps,
        kept=kept,
        seed=recipe.seed,
    )

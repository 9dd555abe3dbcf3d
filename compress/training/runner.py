"""A network with its data, trained as the options say and scored: what becomes of it is its caller's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint.architecture import Architecture
from compress.checkpoint.execution import Execution
from compress.checkpoint.fitting import with_versions
from compress.checkpoint.manifest import computed_state, stored_state
from compress.data import DataSource
from compress.data.source import Subset, split_held_back
from compress.errors import DataError, GateError
from compress.graph.cost import count_macs, count_parameters
from compress.measures.kinds import Hints, describe_outputs, need_place, read_class_counts
from compress.progress import Progress, Stages
from compress.recipe import Recipe, TrainingOptions
from compress.report.evaluation import evaluate_networks, network_outputs
from compress.report.model import Inputs, Scores, SourceFile, TrainingEvaluation, TrainingReport
from compress.training.loop import score
from compress.training.losses import LOSSES, constant_loss
from compress.training.outcome import describe_training
from compress.training.session import Session


@dataclass(frozen=True, eq=False)
class Start:
    """A network before its training.

    Attributes:
        shapes, attributes, kept, removed, execution: what makes a freshly built `architecture` this network, as in a
            manifest.
        origin: the file it came from; None where it starts from random weights.
        stored: its tensors as stored, whose dtypes the result takes; empty for a new network.
    """

    module: nn.Module
    architecture: Architecture
    origin: SourceFile | None = None
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    removed: dict[str, Any] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True, eq=False)
class Training:
    """A network with the data it is to be trained on.

    Attributes:
        source: all samples, of which `training` and `validation` (None: nothing is held back) are disjoint parts.
        examples: a small batch of every input.
    """

    start: Start
    options: TrainingOptions
    source: DataSource
    training: DataSource
    validation: DataSource | None
    evaluation: DataSource | None
    examples: tuple[Tensor, ...]
    inputs: Inputs


@dataclass(frozen=True, eq=False)
class Taught:
    """A trained network with its tensors in the dtypes they are stored in, and what a report says of it."""

    module: nn.Module
    stored: dict[str, Tensor]
    report: TrainingReport


def teach(
    work: Training, recipe: Recipe, progress: Progress, clock: Stages, *, kind: str, folder: Path | None = None
) -> Taught:
    """Train a copy of the network and score it.

    Args:
        kind: "train" or "finetune".
        folder: where the state after every epoch is kept; None: nowhere.

    Raises:
        GateError: no λ within the allowed trainings reached the wanted sparsity.
        CompressError: the loss became NaN or Inf.
    """
    start, options, training, validation = work.start, work.options, work.training, work.validation
    module = start.module
    with clock("train"):
        session = Session(work.examples, options, training, validation, recipe.seed, progress)
        trained = session.train(module, folder)
    if trained.choice is not None and not trained.choice.met:
        raise GateError(
            f"After {len(trained.choice.history)} trainings {sum(trained.choice.levels)} weights are nonzero, not "
            f"within {options.target_tolerance:g} of the target; nothing was written. --resume with more --trainings "
            f"goes on; the closest was --penalty {trained.choice.penalties[0]:.6g}."
        )
    stored = stored_state(trained.module.state_dict(), start.stored)
    trained.module.load_state_dict(with_versions(trained.module, computed_state(stored)))
    with clock("evaluate"):
        outcome = describe_training(trained, options, training, validation, work.examples)
        scored = score_networks(module, trained.module, work.evaluation, recipe, options, progress)
        if scored is not None and start.origin is None:
            scored = replace(scored, original=None)
        undebiased = outcome.undebiased
        if undebiased is not None and trained.undebiased is not None:
            before = score_networks(module, trained.undebiased, work.evaluation, recipe, options, progress)
            undebiased = replace(undebiased, evaluation=None if before is None else before.trained)
        report = TrainingReport(
            work.inputs,
            kind=kind,
            options=options.model_dump(mode="json"),
            parameters=count_parameters(trained.module),
            macs=count_macs(trained.module, work.examples),
            samples=training.sample_count,
            evaluation=scored,
            notes=tuple(getattr(progress, "notes", ())),
            **{**vars(outcome), "undebiased": undebiased},
        )
    return Taught(trained.module, stored, report)


def score_networks(
    before: nn.Module,
    after: nn.Module,
    evaluation: DataSource | None,
    recipe: Recipe,
    options: TrainingOptions,
    progress: Progress,
) -> TrainingEvaluation | None:
    """Scores of two networks on the evaluation data; real targets by the loss, beside that of the best constant."""
    if evaluation is None:
        return None
    progress.stage("evaluating", evaluation.sample_count)
    if evaluation.targets is not None:
        losses = [score(network, evaluation, LOSSES[options.loss], recipe.batch_size)[0] for network in (before, after)]
        return TrainingEvaluation(
            samples=evaluation.sample_count,
            original=Scores(losses[0]),
            trained=Scores(losses[1]),
            loss=options.loss,
            constant_loss=constant_loss(options.loss, evaluation.targets),
        )
    batches = evaluation.batches(recipe.batch_size)
    first = [part.to(recipe.device) for part in next(iter(evaluation.batches(2))).tensors]
    with torch.inference_mode():
        tensors = network_outputs(after, first)
    outputs = describe_outputs(tensors, len(first[0]), (evaluation,), Hints(class_counts=read_class_counts(after)))
    answered = need_place(outputs, evaluation).name if evaluation.has_labels else ""
    scores = evaluate_networks(
        before.eval(), after, batches, outputs, answered, device=recipe.device, progress=progress
    )
    return TrainingEvaluation(scores.samples, scores.original, scores.compressed)


def split_source(source: DataSource, held_back: float, seed: int) -> tuple[DataSource, DataSource | None]:
    """Samples to train on and samples to validate on, disjoint; None where nothing is held back. Raises DataError."""
    if held_back == 0:
        return source, None
    try:
        fitting, validating = split_held_back(source.sample_count, held_back, seed)
    except ValueError as error:
        raise DataError(f"{source.name}: {error}") from None
    return Subset(source, fitting.numpy()), Subset(source, validating.numpy())

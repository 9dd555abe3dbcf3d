"""One training from options: a copy of a module, trained by a method, with its penalty given or searched for."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.data.source import DataSource
from compress.errors import NonFiniteError
from compress.progress import Progress, SilentProgress
from compress.recipe import TrainingOptions
from compress.training.loop import Fitted, fit, score
from compress.training.losses import LOSSES, answers_of
from compress.training.methods import make_augmentation, make_method, make_schedule, weight_names
from compress.training.sparsity import Choice, Minimiser, choose_penalties, l1_forces

JOURNAL = "journal.jsonl"
SMALLEST = 1e-6  # the search's bracket begins at this part of its upper end


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained copy of a module, in eval mode.

    Attributes:
        choice: how the penalties were found; None where they were given.
        undebiased: the module before the epochs without penalty; None where there were none.
    """

    module: nn.Module
    fitted: Fitted
    choice: Choice | None = None
    undebiased: nn.Module | None = None


def train_copy(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    options: TrainingOptions,
    training: DataSource,
    validation: DataSource | None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a copy of `module` as the options say.

    Args:
        example: a small batch on the module's device; of every input, where there are several.
        options: completed ones.
        folder: where the state after every epoch, and the journal of a search, are kept and taken up again.

    Raises:
        CompressError: the loss became NaN or Inf, or the state cannot be written or is of another training.
    """
    progress = progress or SilentProgress()
    if options.searches:
        choice = search_penalties(module, example, options, training, seed=seed, folder=folder, progress=progress)
        trained = Trained(choice.solution.module, choice.solution.fitted, choice)
    else:
        state_file = None if folder is None else folder / "training.state"
        trained = train_once(module, example, options, training, validation, None, seed, state_file, progress)
    if not options.debias or (trained.choice is not None and not trained.choice.met):
        return trained
    state_file = None if folder is None else folder / "debias.state"
    return debias(trained, example, options, training, validation, seed, state_file, progress)


def train_once(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    options: TrainingOptions,
    training: DataSource,
    validation: DataSource | None,
    penalties: Sequence[float] | None,
    seed: int,
    state_file: Path | None,
    progress: Progress,
) -> Trained:
    """Train a copy with given penalties, as `train_copy`."""
    own = trainable_copy(module)
    fitted = fit_module(own, example, options, training, validation, penalties, seed, state_file, progress)
    return Trained(own, fitted)


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters all take gradients."""
    own = copy.deepcopy(module)
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return own


def fit_module(
    own: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    options: TrainingOptions,
    training: DataSource,
    validation: DataSource | None,
    penalties: Sequence[float] | None,
    seed: int,
    state_file: Path | None,
    progress: Progress,
) -> Fitted:
    """Train a module in place, as `train_copy`."""
    assert options.epochs is not None, "completed options"
    method = make_method(own, example, options, penalties)
    steps = -(-training.sample_count // options.batch_size)
    fitted = fit(
        own,
        method.optimizer,
        LOSSES[options.loss],
        training,
        epochs=options.epochs,
        batch_size=options.batch_size,
        schedule=make_schedule(method.optimizer, options, steps),
        extra=method.extra,
        validation=validation,
        patience=options.patience,
        transform=make_augmentation(options),
        half=options.half,
        clip_norm=options.clip_norm,
        first_kept=math.ceil(options.ramp) + 1,
        seed=seed,
        state_file=state_file,
        progress=progress,
    )
    for parameter in own.parameters():
        parameter.grad = None
    return fitted


def debias(
    trained: Trained,
    example: Tensor | tuple[Tensor, ...],
    options: TrainingOptions,
    training: DataSource,
    validation: DataSource | None,
    seed: int,
    state_file: Path | None,
    progress: Progress,
) -> Trained:
    """Train on without the penalty, weights that are zero held there: what a large λ took off the others comes back.

    With validation data the best of these epochs is kept if it is better than what came before, which is kept if not.
    """
    assert options.lr is not None, "completed options"
    chosen = options.model_copy(
        update={
            "method": "sgd", "penalty": 0.0, "epochs": options.debias, "lr": options.debias_lr or options.lr,
            "schedule": "cosine", "milestones": (), "warmup": 0.0, "ramp": 0.0, "patience": None,
        }
    )  # fmt: skip
    module = trainable_copy(trained.module)
    weights = [module.get_parameter(name) for name in weight_names(module)]
    hooks = [
        weight.register_hook((weight != 0).to(weight).mul)  # type: ignore[no-untyped-call]
        for weight in weights
    ]
    found = fit_module(module, example, chosen, training, validation, None, seed, state_file, progress)
    for hook in hooks:
        hook.remove()
    before = len(trained.fitted.curve)
    rows = [{**row, "epoch": before + row["epoch"], "phase": "debias"} for row in found.curve]
    better = True
    if validation is not None:
        loss = score(trained.module, validation, LOSSES[options.loss], options.batch_size)[0]
        better = min(row["validation_loss"] for row in rows) < loss
    fitted = Fitted(
        (*trained.fitted.curve, *rows),
        before + found.best_epoch if better else trained.fitted.best_epoch,
        trained.fitted.stopped_early,
    )
    return Trained(module if better else trained.module, fitted, trained.choice, trained.module)


def search_penalties(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    options: TrainingOptions,
    training: DataSource,
    *,
    seed: int,
    folder: Path | None,
    progress: Progress,
) -> Choice:
    """λ, or a λ for each layer, with which mini-batch proximal training leaves the wanted nonzeros.

    Algorithms 1, 2 and 3 of Shen et al. 2024. Every training starts from `module` and runs to its last epoch; the
    bracket ends at the largest |∂loss/∂w| before training. The choice's `solution` is a `Trained`.
    """
    names = weight_names(module)
    sizes = [int(module.get_parameter(name).numel()) for name in names]
    wanted = options.target_nonzeros or max(1, round((1 - (options.target_sparsity or 0.0)) * sum(sizes)))
    targets = [wanted]
    if options.per_layer:
        targets = [max(1, round((1 - (options.target_sparsity or 0.0)) * size)) for size in sizes]
    high = max(float(force.max()) for force in loss_forces(module, training, options))
    count = 0

    def train(penalties: tuple[float, ...]) -> Minimiser:
        nonlocal count
        count += 1
        shown = ", ".join(f"{value:.3g}" for value in penalties[:3]) + (", …" if len(penalties) > 3 else "")
        progress.note(f"training {count} of the search, penalty {shown}")
        state_file = None
        if folder is not None:
            digest = hashlib.sha256(json.dumps(penalties).encode()).hexdigest()[:16]
            state_file = folder / f"search-{digest}.state"
            for other in folder.glob("search-*.state"):
                if other != state_file:
                    other.unlink()
        trained = train_once(module, example, options, training, None, penalties, seed, state_file, progress)
        weights = [trained.module.get_parameter(name).detach() for name in names]
        gradients = loss_forces(trained.module, training, options)
        if options.per_layer:
            pairs = [l1_forces([weight], [gradient]) for weight, gradient in zip(weights, gradients, strict=True)]
        else:
            pairs = [l1_forces(weights, gradients)]
        return Minimiser(tuple(level for level, _ in pairs), tuple(forces.cpu() for _, forces in pairs), trained)

    return choose_penalties(
        train,
        targets,
        low=SMALLEST * high,
        high=high,
        tolerance=options.target_tolerance,
        most=options.trainings,
        journal=None if folder is None else folder / JOURNAL,
    )


def loss_forces(module: nn.Module, source: DataSource, options: TrainingOptions) -> list[Tensor]:
    """|∂loss/∂W| of every tensor of `weight_names`, over all samples, in evaluation mode and without augmentation.

    Raises:
        NonFiniteError: one is NaN or Inf.
    """
    own = copy.deepcopy(module).eval().requires_grad_(True)
    device = next(own.parameters()).device
    names = weight_names(own)
    with torch.enable_grad():
        for batch in source.batches(options.batch_size):
            answers = answers_of(batch).to(device)
            share = len(answers) / source.sample_count
            value = LOSSES[options.loss](own(*(part.to(device) for part in batch.tensors)), answers)
            (share * value).backward()  # type: ignore[no-untyped-call]
    found = []
    for name in names:
        gradient = own.get_parameter(name).grad
        found.append(torch.zeros_like(own.get_parameter(name)) if gradient is None else gradient.abs())
        if not bool(torch.isfinite(found[-1]).all()):
            raise NonFiniteError(f"The gradient of `{name}` is NaN or Inf; give a smaller learning rate.")
    return [force.detach() for force in found]

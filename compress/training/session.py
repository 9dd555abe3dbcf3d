"""One training from options: a copy of a module, trained by a method, with its penalty given or searched for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.copying import deep_copy
from compress.data.source import DataSource
from compress.errors import NonFiniteError
from compress.progress import Progress, SilentProgress
from compress.recipe import TrainingOptions
from compress.training.loop import Fitted, Length, Lesson, Stepping, batch_count, fit, score
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


@dataclass(frozen=True, eq=False)
class Session:
    """All that a training depends on besides the module it begins with.

    Attributes:
        example: a small batch on the module's device; of every input, where there are several.
        options: completed ones.
    """

    example: Tensor | tuple[Tensor, ...]
    options: TrainingOptions
    training: DataSource
    validation: DataSource | None = None
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)

    def train(self, module: nn.Module, folder: Path | None = None) -> Trained:
        """Train a copy of `module` as the options say.

        Args:
            folder: where the state after every epoch, and the journal of a search, are kept and taken up again.

        Raises:
            CompressError: the loss became NaN or Inf, or the state cannot be written or is of another training.
        """
        if self.options.searches:
            choice = self.search(module, folder)
            trained = Trained(choice.solution.module, choice.solution.fitted, choice)
        else:
            trained = self.train_once(module, None if folder is None else folder / "training.state")
        if not self.options.debias or (trained.choice is not None and not trained.choice.met):
            return trained
        return self.debias(trained, None if folder is None else folder / "debias.state")

    def train_once(
        self, module: nn.Module, state_file: Path | None, penalties: Sequence[float] | None = None
    ) -> Trained:
        """Train a copy with given penalties."""
        network = trainable_copy(module)
        return Trained(network, self.fit(network, state_file, penalties))

    def fit(self, module: nn.Module, state_file: Path | None, penalties: Sequence[float] | None = None) -> Fitted:
        """Train a module in place."""
        options = self.options
        assert options.epochs is not None, "completed options"
        method = make_method(module, self.example, options, penalties)
        steps = batch_count(self.training.sample_count, options.batch_size)
        fitted = fit(
            module,
            Lesson(
                LOSSES[options.loss],
                self.training,
                self.validation,
                options.batch_size,
                make_augmentation(options),
                self.seed,
            ),
            Stepping(
                method.optimizer,
                make_schedule(method.optimizer, options, steps),
                method.extra,
                options.half,
                options.clip_norm,
            ),
            Length(options.epochs, options.patience, math.ceil(options.ramp) + 1),
            state_file=state_file,
            progress=self.progress,
        )
        for parameter in module.parameters():
            parameter.grad = None
        return fitted

    def debias(self, trained: Trained, state_file: Path | None) -> Trained:
        """Train on without the penalty, zeros held there: what a large λ took off the other weights comes back.

        With validation data the best of these epochs is kept if it is better than what came before, which is kept if
        not.
        """
        options = self.options
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
        after = replace(self, options=chosen).fit(module, state_file)
        for hook in hooks:
            hook.remove()
        before = len(trained.fitted.curve)
        rows = [{**row, "epoch": before + row["epoch"], "phase": "debias"} for row in after.curve]
        better = True
        if self.validation is not None:
            loss = score(trained.module, self.validation, LOSSES[options.loss], options.batch_size)[0]
            better = min(row["validation_loss"] for row in rows) < loss
        fitted = Fitted(
            (*trained.fitted.curve, *rows),
            before + after.best_epoch if better else trained.fitted.best_epoch,
            trained.fitted.stopped_early,
        )
        return Trained(module if better else trained.module, fitted, trained.choice, trained.module)

    def search(self, module: nn.Module, folder: Path | None) -> Choice:
        """λ, or a λ for each layer, with which mini-batch proximal training leaves the wanted nonzeros.

        Algorithms 1, 2 and 3 of Shen et al. 2024. Every training starts from `module` and runs to its last epoch; the
        bracket ends at the largest |∂loss/∂w| before training. The choice's `solution` is a `Trained`.
        """
        options = self.options
        alone = replace(self, validation=None)
        names = weight_names(module)
        count = 0

        def train(penalties: tuple[float, ...]) -> Minimiser:
            nonlocal count
            count += 1
            shown = ", ".join(f"{value:.3g}" for value in penalties[:3]) + (", …" if len(penalties) > 3 else "")
            self.progress.note(f"training {count} of the search, penalty {shown}")
            state_file = None if folder is None else search_state(folder, penalties)
            trained = alone.train_once(module, state_file, penalties)
            weights = [trained.module.get_parameter(name).detach() for name in names]
            gradients = loss_forces(trained.module, self.training, options)
            if options.per_layer:
                pairs = [l1_forces([weight], [gradient]) for weight, gradient in zip(weights, gradients, strict=True)]
            else:
                pairs = [l1_forces(weights, gradients)]
            return Minimiser(tuple(level for level, _ in pairs), tuple(forces.cpu() for _, forces in pairs), trained)

        high = max(float(force.max()) for force in loss_forces(module, self.training, options))
        return choose_penalties(
            train,
            wanted_nonzeros(options, [int(module.get_parameter(name).numel()) for name in names]),
            low=SMALLEST * high,
            high=high,
            tolerance=options.target_tolerance,
            most=options.trainings,
            journal=None if folder is None else folder / JOURNAL,
        )


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters all take gradients."""
    network = deep_copy(module)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return network


def wanted_nonzeros(options: TrainingOptions, sizes: Sequence[int]) -> list[int]:
    """Nonzeros asked for in all weights of these sizes together, or in each of them."""
    kept = 1 - (options.target_sparsity or 0.0)
    if options.per_layer:
        return [max(1, round(kept * size)) for size in sizes]
    return [options.target_nonzeros or max(1, round(kept * sum(sizes)))]


def search_state(folder: Path, penalties: Sequence[float]) -> Path:
    """The state file of one training of a search; those of the ones before it go."""
    digest = hashlib.sha256(json.dumps(penalties).encode()).hexdigest()[:16]
    state_file = folder / f"search-{digest}.state"
    for other in folder.glob("search-*.state"):
        if other != state_file:
            other.unlink()
    return state_file


def loss_forces(module: nn.Module, source: DataSource, options: TrainingOptions) -> list[Tensor]:
    """|∂loss/∂W| of every tensor of `weight_names`, over all samples, in evaluation mode and without augmentation.

    Raises:
        NonFiniteError: one is NaN or Inf.
    """
    network = deep_copy(module).eval().requires_grad_(True)
    device = next(network.parameters()).device
    names = weight_names(network)
    with torch.enable_grad():
        for batch in source.batches(options.batch_size):
            answers = answers_of(batch).to(device)
            share = len(answers) / source.sample_count
            value = LOSSES[options.loss](network(*(part.to(device) for part in batch.tensors)), answers)
            (share * value).backward()  # type: ignore[no-untyped-call]
    forces = []
    for name in names:
        gradient = network.get_parameter(name).grad
        forces.append(torch.zeros_like(network.get_parameter(name)) if gradient is None else gradient.abs())
        if not bool(torch.isfinite(forces[-1]).all()):
            raise NonFiniteError(f"The gradient of `{name}` is NaN or Inf; give a smaller learning rate.")
    return [force.detach() for force in forces]

"""A compact training loop: shuffled batches, schedule, validation, best weights, early stop, resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from compress.atomic import new_file
from compress.checkpoint.reading.read import read_plain
from compress.data.source import DataSource
from compress.errors import CompressError, NonFiniteError, OutputError, RecipeError, first_line
from compress.progress import Progress, SilentProgress
from compress.report.model import Epoch
from compress.training.losses import LossFunction, answers_of


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a training ended with.

    Attributes:
        curve: for each epoch: epoch, learning rate, mean training loss, validation loss and top-1 (None without one).
        best_epoch: whose weights the module holds; by validation loss, the last one without validation data.
        stopped_early: whether patience ran out.
    """

    curve: tuple[dict[str, Any], ...]
    best_epoch: int
    stopped_early: bool

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """The curve as a report holds it."""
        return tuple(Epoch(**row) for row in self.curve)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is learned, from which samples.

    Attributes:
        training: labelled samples, or such with targets; `validation`: others, which choose the best epoch.
        transform: augmentation of a batch's inputs.
        seed: of shuffling, augmentation and dropout (torch's own generator); epoch e's depend on seed and e alone.
    """

    loss: LossFunction
    training: DataSource
    validation: DataSource | None = None
    batch_size: int = 128
    transform: Callable[[Tensor, torch.Generator], Tensor] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Stepping:
    """How weights move.

    Attributes:
        schedule: stepped after every batch.
        extra: added to the loss, such as a lasso term.
        half: run the forward pass in bfloat16 (autocast).
        clip_norm: scale gradients down to this norm; 0: leave them.
    """

    optimizer: Optimizer
    schedule: LRScheduler | None = None
    extra: Callable[[nn.Module], Tensor] | None = None
    half: bool = False
    clip_norm: float = 0.0

    def step(self, module: nn.Module, value: Tensor) -> None:
        """Down the gradient of the loss `value`."""
        value.backward()  # type: ignore[no-untyped-call]
        if self.clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), self.clip_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        detach_buffers(module)


def detach_buffers(module: nn.Module) -> None:
    """Buffers that forward() computed stay as numbers: the next batch's gradient ends at them."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.grad_fn is not None:
                part._buffers[name] = buffer.detach()


@dataclass(frozen=True)
class Length:
    """When a training ends.

    Attributes:
        patience: stop after so many epochs without a lower validation loss.
        first_kept: the first epoch whose weights may be kept as the best; patience counts from there.
    """

    epochs: int
    patience: int | None = None
    first_kept: int = 1

    def is_over(self, done: int, best: int) -> bool:
        """Whether patience has run out after so many epochs, of which `best` was the best."""
        return self.patience is not None and done > 0 and done - max(best, self.first_kept - 1) >= self.patience


def fit(
    module: nn.Module,
    lesson: Lesson,
    stepping: Stepping,
    length: Length,
    *,
    state_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train `module` in place and leave it, in eval mode, with the best epoch's weights.

    Args:
        state_file: after every epoch all that is needed to go on is put there, whole or not at all; where it exists,
            the run goes on from it. The caller removes it.

    Raises:
        NonFiniteError: the loss became NaN or Inf.
        RecipeError: batch norms learn from batches of one value.
        OutputError: `state_file` cannot be written, or is of another run.
    """
    if lesson.training.labels is None and lesson.training.targets is None:
        raise ValueError("training data needs labels or targets.")
    progress = progress or SilentProgress()
    curve: list[dict[str, Any]] = []
    best: dict[str, Any] = {"epoch": 0, "value": math.inf, "state": None}
    if state_file is not None and Path(state_file).exists():
        curve, best = _restore(state_file, module, stepping)
    stopped = length.is_over(len(curve), best["epoch"])
    while len(curve) < length.epochs and not stopped:
        epoch = len(curve) + 1
        progress.stage(
            f"epoch {epoch} of {length.epochs}", batch_count(lesson.training.sample_count, lesson.batch_size)
        )
        curve.append(_train_epoch(module, lesson, stepping, epoch, progress))
        reached = -epoch if lesson.validation is None else curve[-1]["validation_loss"]
        if epoch >= length.first_kept and reached < best["value"]:
            state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
            best = {"epoch": epoch, "value": reached, "state": state}
        stopped = length.is_over(len(curve), best["epoch"])
        if state_file is not None:
            _keep(state_file, module, stepping, curve, best)
    if best["state"] is not None:
        module.load_state_dict(best["state"])
    module.eval()
    return Fitted(tuple(curve), best["epoch"], stopped)


def _train_epoch(
    module: nn.Module, lesson: Lesson, stepping: Stepping, epoch: int, progress: Progress
) -> dict[str, Any]:
    """One pass over the samples; gives the epoch's row of the curve."""
    device, source = next(module.parameters()).device, lesson.training
    generator = torch.Generator().manual_seed(1_000_003 * lesson.seed + epoch)
    order = torch.randperm(source.sample_count, generator=generator)
    torch.manual_seed(1_000_003 * lesson.seed + epoch)  # of dropout
    module.train()
    total, rate = 0.0, float(stepping.optimizer.param_groups[0]["lr"])
    for numbers in in_batches(order, lesson.batch_size):
        (batch,) = source.batches(len(numbers), numbers)
        answers = answers_of(batch).to(device)
        first = batch.inputs if lesson.transform is None else lesson.transform(batch.inputs, generator)
        inputs = [part.to(device) for part in (first, *batch.further)]
        stepping.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=stepping.half):
            value = lesson.loss(run_training(module, inputs), answers)
            if stepping.extra is not None:
                value = value + stepping.extra(module)
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(f"The loss became {value.item()} in epoch {epoch}; give a smaller learning rate.")
        stepping.step(module, value)
        total += value.item() * len(answers)
        progress.advance()
    scores = (None, None)
    if lesson.validation is not None:
        scores = score(module, lesson.validation, lesson.loss, lesson.batch_size)  # type: ignore[assignment]
    return {
        "epoch": epoch,
        "rate": rate,
        "loss": total / source.sample_count,
        "validation_loss": scores[0],
        "validation_top1": scores[1],
    }


def batch_count(samples: int, size: int) -> int:
    """How many pieces `in_batches` makes."""
    return -(-samples // size) - (1 < size < samples and samples % size == 1)


def in_batches(order: Tensor, size: int) -> list[Tensor]:
    """The order (N,) in pieces of `size`; one sample that is left over joins the piece before, for the batch norms."""
    pieces = list(torch.split(order, size))
    if size > 1 and len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def run_training(module: nn.Module, inputs: list[Tensor]) -> Any:
    """The outputs for a batch in training mode. Raises RecipeError: batch norms are given a batch of one value."""
    try:
        return module(*inputs)
    except ValueError as fault:
        if len(inputs[0]) > 1:
            raise
        raise RecipeError(
            "batch_size: two samples or more in a batch, and in the data, are needed where batch norms learn."
        ) from fault


def score(
    module: nn.Module, source: DataSource, loss: LossFunction, batch_size: int = 256
) -> tuple[float, float | None]:
    """Mean loss and top-1 accuracy (None where real targets stand in for labels), in evaluation mode."""
    module.eval()
    device = next(module.parameters()).device
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in source.batches(batch_size):
            answers = answers_of(batch).to(device)
            outputs = module(*(part.to(device) for part in batch.tensors)).float()
            total += loss(outputs, answers).item() * len(answers)
            count += len(answers)
            if not answers.is_floating_point():
                right += int((outputs.argmax(1) == answers).sum())
    return total / count, None if source.targets is not None else right / count


def _keep(
    path: str | Path, module: nn.Module, stepping: Stepping, curve: list[dict[str, Any]], best: dict[str, Any]
) -> None:
    schedule = stepping.schedule
    content = {
        "module": module.state_dict(),
        "optimizer": stepping.optimizer.state_dict(),
        "schedule": None if schedule is None else _plain(schedule.state_dict()),
        "curve": curve,
        "best": best,
    }
    with new_file(path) as draft, draft.open("wb") as file:
        torch.save(content, file)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without functions, which the weights-only reader refuses."""
    return {
        name: copy.deepcopy(value) for name, value in state.items() if not callable(value) and name != "anneal_func"
    }


def _restore(path: str | Path, module: nn.Module, stepping: Stepping) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    try:
        content = read_plain(Path(path), next(module.parameters()).device)
        module.load_state_dict(content["module"])
        stepping.optimizer.load_state_dict(content["optimizer"])
        if stepping.schedule is not None:
            stepping.schedule.load_state_dict(content["schedule"])
    except (OSError, CompressError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{str(path)!r} does not continue this run ({first_line(error)}); remove it to start again."
        ) from None
    curve, best = content["curve"], content["best"]
    if not (isinstance(curve, list) and isinstance(best, dict) and set(best) >= {"epoch", "value", "state"}):
        raise OutputError(f"{str(path)!r} does not continue this run (it is damaged); remove it to start again.")
    return curve, best

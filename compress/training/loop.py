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
from compress.checkpoint.read import read_plain
from compress.data.source import DataSource
from compress.errors import CompressError, NonFiniteError, OutputError
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


def fit(
    module: nn.Module,
    optimizer: Optimizer,
    loss: LossFunction,
    source: DataSource,
    *,
    epochs: int,
    batch_size: int = 128,
    schedule: LRScheduler | None = None,
    extra: Callable[[nn.Module], Tensor] | None = None,
    validation: DataSource | None = None,
    patience: int | None = None,
    transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    half: bool = False,
    clip_norm: float = 0.0,
    first_kept: int = 1,
    seed: int = 0,
    state_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train `module` in place and leave it, in eval mode, with the best epoch's weights.

    Args:
        schedule: stepped after every batch.
        extra: added to the loss, such as a lasso term.
        patience: stop after so many epochs without a lower validation loss.
        transform: augmentation of a batch's inputs.
        half: run the forward pass in bfloat16 (autocast).
        clip_norm: scale gradients down to this norm; 0: leave them.
        first_kept: the first epoch whose weights may be kept as the best; patience counts from there.
        seed: of shuffling, augmentation and dropout (torch's own generator); epoch e's depend on seed and e alone.
        state_file: after every epoch all that is needed to go on is put there, whole or not at all; where it exists,
            the run goes on from it. The caller removes it.

    Raises:
        NonFiniteError: the loss became NaN or Inf.
        OutputError: `state_file` cannot be written, or is of another run.
    """
    if source.labels is None and source.targets is None:
        raise ValueError("training data needs labels or targets.")
    progress = progress or SilentProgress()
    device = next(module.parameters()).device
    curve: list[dict[str, Any]] = []
    best: dict[str, Any] = {"epoch": 0, "value": math.inf, "state": None}
    if state_file is not None and Path(state_file).exists():
        curve, best = _restore(state_file, module, optimizer, schedule)
    batches = -(-source.sample_count // batch_size)
    stopped = _exhausted(curve, best, patience, first_kept)
    while len(curve) < epochs and not stopped:
        epoch = len(curve) + 1
        progress.stage(f"epoch {epoch} of {epochs}", batches)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(source.sample_count, generator=generator)
        torch.manual_seed(1_000_003 * seed + epoch)  # of dropout
        module.train()
        total, rate = 0.0, float(optimizer.param_groups[0]["lr"])
        for batch in source.batches(batch_size, order):
            answers = answers_of(batch).to(device)
            first = batch.inputs if transform is None else transform(batch.inputs, generator)
            inputs = [part.to(device) for part in (first, *batch.further)]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                value = loss(module(*inputs), answers)
                if extra is not None:
                    value = value + extra(module)
            if not bool(torch.isfinite(value)):
                raise NonFiniteError(f"The loss became {value.item()} in epoch {epoch}; give a smaller learning rate.")
            value.backward()  # type: ignore[no-untyped-call]
            if clip_norm:
                nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total += value.item() * len(answers)
            progress.advance()
        entry: dict[str, Any] = {
            "epoch": epoch,
            "rate": rate,
            "loss": total / source.sample_count,
            "validation_loss": None,
            "validation_top1": None,
        }
        if validation is not None:
            entry["validation_loss"], entry["validation_top1"] = score(module, validation, loss, batch_size)
        curve.append(entry)
        value_now = entry["validation_loss"] if validation is not None else -epoch
        if epoch >= first_kept and value_now < best["value"]:
            state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
            best = {"epoch": epoch, "value": value_now, "state": state}
        stopped = _exhausted(curve, best, patience, first_kept)
        if state_file is not None:
            _keep(state_file, module, optimizer, schedule, curve, best)
    if best["state"] is not None:
        module.load_state_dict(best["state"])
    module.eval()
    return Fitted(tuple(curve), best["epoch"], stopped)


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


def _exhausted(curve: list[dict[str, Any]], best: dict[str, Any], patience: int | None, first_kept: int) -> bool:
    return patience is not None and len(curve) - max(best["epoch"], first_kept - 1) >= patience and len(curve) > 0


def _keep(
    path: str | Path,
    module: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    curve: list[dict[str, Any]],
    best: dict[str, Any],
) -> None:
    content = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
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


def _restore(
    path: str | Path, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    try:
        content = read_plain(Path(path), next(module.parameters()).device)
        module.load_state_dict(content["module"])
        optimizer.load_state_dict(content["optimizer"])
        if schedule is not None:
            schedule.load_state_dict(content["schedule"])
    except (OSError, CompressError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutputError(f"{str(path)!r} does not continue this run ({first}); remove it to start again.") from None
    curve, best = content["curve"], content["best"]
    if not (isinstance(curve, list) and isinstance(best, dict) and set(best) >= {"epoch", "value", "state"}):
        raise OutputError(f"{str(path)!r} does not continue this run (it is damaged); remove it to start again.")
    return curve, best

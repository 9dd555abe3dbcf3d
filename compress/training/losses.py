"""Losses of a training, and what they compare a network's outputs with: labels of classes, or real targets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compress.data.source import Batch, DataSource
from compress.errors import DataError

LossFunction = Callable[[Tensor, Tensor], Tensor]


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of ‖output − target‖²; class numbers are taken as one-hot vectors."""
    return (outputs - _shaped(targets, outputs)).square().flatten(1).sum(1).mean()


def poisson_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of exp(output) − target·output: the negative log-likelihood of counts, up to a constant."""
    return (outputs.exp() - _shaped(targets, outputs) * outputs).flatten(1).sum(1).mean()


LOSSES: dict[str, LossFunction] = {
    "cross_entropy": functional.cross_entropy,
    "squared": squared_loss,
    "poisson": poisson_loss,
}


def _shaped(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the outputs' shape and dtype. Raises ValueError where the numbers do not go up."""
    if not targets.is_floating_point():
        targets = functional.one_hot(targets, outputs.shape[1])
    if targets.numel() != outputs.numel():
        raise ValueError(
            f"`targets` must hold one number for each output, got shapes {tuple(targets.shape)} and "
            f"{tuple(outputs.shape)}."
        )
    return targets.to(outputs).reshape(outputs.shape)


def answers_of(batch: Batch) -> Tensor:
    """What outputs are compared with: real targets (B, D), or labels (B,). Raises ValueError where there are none."""
    answers = batch.targets if batch.targets is not None else batch.labels
    if answers is None:
        raise ValueError("training data needs labels or targets.")
    return answers


def check_answers(loss: str, source: DataSource, outputs: object) -> None:
    """Refuse data that a network with these outputs (B, …) cannot be trained on with that loss. Raises DataError."""
    if not isinstance(outputs, Tensor):
        raise DataError(f"Training needs a network that returns one tensor; this one returns {type(outputs).__name__}.")
    targets, width = source.targets, outputs[0].numel()
    if targets is None and source.labels is None:
        raise DataError(f"{source.name} has no labels and no targets; a network cannot be trained on it.")
    if targets is None:
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise DataError(
                f"{source.name} has labels of classes, and the network gives {tuple(outputs.shape[1:])} for a sample; "
                "real numbers to fit go under `targets`."
            )
        return source.check_labels(outputs.shape[1])
    if loss == "cross_entropy":
        raise DataError(
            f"{source.name} has real targets, and cross_entropy wants labels; give --loss squared, or poisson for "
            "counts."
        )
    if targets.shape[1] != width:
        raise DataError(
            f"{source.name} has {targets.shape[1]} targets a sample, and the network gives {width} numbers; they must "
            "be as many."
        )
    if loss == "poisson" and targets.min() < 0:
        first = int(np.flatnonzero((targets < 0).any(1))[0])
        raise DataError(f"{source.name}: counts must be 0 or larger; sample {first} has {targets[first].min():g}.")
    return None


def constant_loss(loss: str, targets: np.ndarray) -> float:
    """The loss of the best constant output on real targets (N, D), to hold a network's against."""
    mean = torch.from_numpy(targets).double().mean(0)
    if loss == "poisson":
        return float((mean - torch.xlogy(mean, mean)).sum())
    return float((torch.from_numpy(targets).double() - mean).square().sum(1).mean())

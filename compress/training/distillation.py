"""distil(): all weights of a cut network adjusted by gradient steps to predict what the original predicts, label-free.

The targets are the original's own outputs on the calibration samples, taken once. Normalisation statistics stay as they
are. What comes out is never worse on the held-back samples than what went in: the best weights seen there are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.compression.damage import divergence
from compress.errors import NonFiniteError
from compress.graph.program import first_tensor
from compress.progress import Progress

RATE = 3e-4  # of Adam
TEMPERATURE = 4.0  # of the class distributions; sharper ones say little about samples that the network is sure of
WARM_UP = 0.1  # share of the steps in which the rate rises
CHECKS = 6  # times that held-back samples are looked at
CLIP = 1.0  # largest gradient norm


class Batches(Protocol):
    """Batches of samples by number."""

    def sizes(self) -> list[int]:
        """Samples in each batch."""

    def read(self, number: int) -> tuple[Tensor, ...]:
        """Inputs of one batch."""


@dataclass(frozen=True)
class Distillation:
    """What the steps did.

    Attributes:
        divergences: (step, mean `soft_divergence` of the outputs on held-back samples), from step 0 on.
        kept_step: the step whose weights were kept.
    """

    steps: int
    divergences: tuple[tuple[int, float], ...]
    kept_step: int

    def as_report(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def distil(
    original: nn.Module,
    compressed: nn.Module,
    fitting: Batches,
    held_back: Batches,
    steps: int,
    progress: Progress,
    *,
    rate: float = RATE,
    seed: int = 0,
) -> tuple[nn.Module, Distillation]:
    """A copy of `compressed` after `steps` of Adam towards the original's outputs; eval mode throughout.

    Args:
        fitting, held_back: batches of disjoint samples, without labels; one batch of the first makes one step.
        rate: largest learning rate; it rises linearly, then falls as a half cosine.

    Raises:
        NonFiniteError: the loss became NaN or Inf.
    """
    module = copy.deepcopy(compressed).eval()
    parameters = [tensor for tensor in module.parameters() if tensor.is_floating_point()]
    for tensor in parameters:
        tensor.requires_grad_(True)
    device = parameters[0].device
    progress.stage("original's outputs", sum(fitting.sizes()) + sum(held_back.sizes()))
    targets = outputs_of(original, fitting, device, progress)
    checks = outputs_of(original, held_back, device, progress)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    best, kept_step = copy.deepcopy(module.state_dict()), 0
    lowest = mean_divergence(module, held_back, checks, device)
    divergences = [(0, lowest)]
    every = max(1, math.ceil(steps / CHECKS))
    progress.stage("distilling", steps)
    for step in range(1, steps + 1):
        if not order:
            order = torch.randperm(len(targets), generator=generator).tolist()
        number = order.pop()
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_share(step - 1, steps)
        with torch.enable_grad():
            inputs = [tensor.to(device) for tensor in fitting.read(number)]
            loss = soft_divergence(targets[number].to(device), first_tensor(module(*inputs))).mean()
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"The distillation loss is NaN or Inf at step {step}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        progress.advance()
        if step % every == 0 or step == steps:
            found = mean_divergence(module, held_back, checks, device)
            divergences.append((step, found))
            if found < lowest:
                lowest, kept_step, best = found, step, copy.deepcopy(module.state_dict())
    module.load_state_dict(best)
    for tensor in parameters:
        tensor.grad = None
    return module, Distillation(steps, tuple(divergences), kept_step)


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate at a step counted from 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def soft_divergence(before: Tensor, after: Tensor) -> Tensor:
    """How far outputs moved, per sample (B,): T²·KL of the classes at temperature T, else relative squares."""
    if before.ndim == 2 and before.shape[1] > 1:
        return TEMPERATURE**2 * divergence(before / TEMPERATURE, after / TEMPERATURE)
    return divergence(before, after)


def outputs_of(module: nn.Module, stream: Batches, device: torch.device, progress: Progress) -> list[Tensor]:
    """The network's first output on every batch."""
    found = []
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            found.append(first_tensor(module(*(tensor.to(device) for tensor in stream.read(number)))).cpu())
            progress.advance(size)
    return [output.clone() for output in found]  # out of inference mode, so that gradients may pass by them


def mean_divergence(module: nn.Module, stream: Batches, targets: Sequence[Tensor], device: torch.device) -> float:
    """Mean divergence per sample of the network's outputs from the targets."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            output = first_tensor(module(*(tensor.to(device) for tensor in stream.read(number))))
            total += float(soft_divergence(targets[number].to(device), output).sum())
            count += size
    return total / max(count, 1)

"""The methods of a training recipe: which optimizer, which term beside the loss, which rate at which step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from compress.recipe import TrainingOptions
from compress.training.proximal.couplings import Couplings, find_couplings
from compress.training.proximal.pathprox import PathProx
from compress.training.proximal.penalties import ProximalL1, group_lasso_term, lasso_term

PENALTIES = ("penalty", "weight_decay")


@dataclass(frozen=True, eq=False)
class Method:
    """An optimizer for a module, and what is added to its loss.

    Attributes:
        extra: of the module, times nothing further; None where the optimizer takes care of the penalty.
        couplings: PathProx's; None for the others.
    """

    optimizer: Optimizer
    extra: Callable[[nn.Module], Tensor] | None = None
    couplings: Couplings | None = None


def weight_names(module: nn.Module) -> list[str]:
    """Names of the tensors that penalties act on: those of two or more dimensions."""
    return [name for name, value in module.named_parameters() if value.ndim >= 2 and value.is_floating_point()]


def make_method(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    options: TrainingOptions,
    penalties: Sequence[float] | None = None,
) -> Method:
    """The optimizer of `options.method` over the module's trainable parameters.

    Args:
        example: a small batch (B, …), for PathProx's trace.
        options: completed ones, with a learning rate.
        penalties: of `l1`, a λ for each trainable one of `weight_names(module)`, or one for all; None: the options'.

    Raises:
        TraceError: PathProx's network cannot be exported to a graph.
    """
    if options.lr is None:
        raise ValueError("`options` must be completed: the learning rate is None.")
    rate: dict[str, Any] = {"lr": options.lr, "momentum": options.momentum, "nesterov": options.nesterov}
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    names = [name for name in weight_names(module) if name in trained]
    weights, rest = [trained[name] for name in names], [trained[name] for name in trained if name not in set(names)]
    if options.method == "pathprox":
        was_training = module.training
        couplings = find_couplings(module.eval(), example)
        module.train(was_training)
        optimizer = PathProx(
            trained.values(),
            couplings,
            **rate,
            penalty=options.penalty,
            published=options.published,
            layer_balance=options.layer_balance,
            radius=options.radius or None,
        )
        return Method(optimizer, couplings=couplings)
    if options.method == "l1":
        strengths = tuple(penalties) if penalties is not None else (options.penalty,)
        strengths = strengths * len(names) if len(strengths) == 1 else strengths
        if len(strengths) != len(names):
            raise ValueError(f"`penalties` must be one, or {len(names)} for as many weights, got {len(strengths)}.")
        groups: list[dict[str, Any]] = [
            {"params": [weight], "penalty": own} for weight, own in zip(weights, strengths, strict=True)
        ]
        return Method(ProximalL1([*groups, {"params": rest, "penalty": 0.0}] if rest else groups, **rate))
    decay = options.penalty if options.method == "sgd" else 0.0
    groups = [
        {"params": weights, "weight_decay": decay, "penalty": options.penalty},
        {"params": rest, "weight_decay": 0.0},
    ]
    descent = SGD([group for group in groups if group["params"]], **rate)
    terms = {"lasso": lasso_term, "group_lasso": group_lasso_term}
    if options.method not in terms or not weights:
        return Method(descent)
    term = terms[options.method]
    return Method(descent, extra=lambda net: float(descent.param_groups[0]["penalty"]) * term(net))


class RampedSchedule(LambdaLR):
    """A schedule of the rate under which the λ of every parameter group also rises, linearly over `ramp` steps.

    λ is a group's `penalty` or `weight_decay`; the full values are those it has at the start. Which units go is then
    decided on features that were learned, not on the initial ones.
    """

    def __init__(self, optimizer: Optimizer, share: Callable[[int], float], ramp: int) -> None:
        self.ramp = ramp
        self.full = [{name: group[name] for name in PENALTIES if group.get(name)} for group in optimizer.param_groups]
        super().__init__(optimizer, share)

    def step(self, epoch: int | None = None) -> None:
        """After every batch."""
        super().step(epoch)
        risen = min(1.0, self.last_epoch / self.ramp)
        for group, full in zip(self.optimizer.param_groups, self.full, strict=True):
            group.update({name: risen * value for name, value in full.items()})


def make_schedule(optimizer: Optimizer, options: TrainingOptions, steps_per_epoch: int) -> LambdaLR:
    """The rate after every step: a linear warm-up, then a half cosine to zero, a constant, or steps at milestones.

    With `ramp` it makes λ rise too.
    """
    assert options.epochs is not None, "completed options"
    total = options.epochs * steps_per_epoch
    warm = min(total, round(options.warmup * steps_per_epoch))

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        if options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
        epoch = step // steps_per_epoch
        return float(options.gamma ** sum(epoch >= milestone for milestone in options.milestones))

    ramp = round(options.ramp * steps_per_epoch)
    return RampedSchedule(optimizer, share, ramp) if ramp else LambdaLR(optimizer, share)


def make_augmentation(options: TrainingOptions) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """Random crops of padded images and random mirroring, of a batch (B, C, H, W); None where neither is asked for."""
    if not options.crop and not options.flip:
        return None

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        if images.ndim != 4:
            raise ValueError(
                f"`images` must have shape (B, C, H, W) to be cropped or flipped, got {tuple(images.shape)}."
            )
        if options.crop:
            images = random_crop(images, options.crop, generator)
        if options.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images

    return augment


def random_crop(images: Tensor, margin: int, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) padded by zeros on all sides and cut back to H × W, each at a place of its own.

    A zero is the mean colour where the images are normalised.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (margin, margin, margin, margin))
    tops, lefts = torch.randint(0, 2 * margin + 1, (2, count), generator=generator)
    rows = tops[:, None] + torch.arange(height)  # (B, H)
    columns = lefts[:, None] + torch.arange(width)  # (B, W)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return picked.permute(0, 3, 1, 2).contiguous()

"""Where the regularised loss stops falling as a net grows wider (Jacot et al. 2022), against ranks and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.convex import Moments, width_bound
from compress.models import mlp
from compress.progress import Progress, SilentProgress
from compress.training.losses import LOSSES


@dataclass(frozen=True, eq=False)
class Plateau:
    """What widths reached.

    Attributes:
        losses: for each width the smallest regularised loss of its seeds.
        start: the smallest width within `tolerance` (relative) of the smallest loss of all.
        rank_features, rank_outputs: of the last hidden layer of the widest net; `bound` their product.
        data_bound: N(N + 1).
    """

    widths: tuple[int, ...]
    losses: tuple[float, ...]
    tolerance: float
    start: int
    rank_features: int
    rank_outputs: int
    bound: int
    data_bound: int

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "losses": [{"width": width, "loss": loss} for width, loss in zip(self.widths, self.losses, strict=True)],
            "tolerance": self.tolerance,
            "plateau_starts_at": self.start,
            "rank_features": self.rank_features,
            "rank_outputs": self.rank_outputs,
            "bound": self.bound,
            "data_bound": self.data_bound,
        }


def measure_plateau(
    inputs: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    *,
    layers: int = 2,
    penalty: float = 1e-3,
    loss: str = "cross_entropy",
    steps: int = 1000,
    rate: float = 1e-2,
    seeds: Sequence[int] = (0,),
    tolerance: float = 0.02,
    rank_tolerance: float = 1e-2,
    progress: Progress | None = None,
) -> Plateau:
    """Train fully connected ReLU nets of every width, full batch, on loss + λ/2 Σ‖W‖² (biases free), and compare.

    Adam with a cosine rate; no training is sure to reach the global minimum, so the best of `seeds` counts.

    Args:
        inputs: (N, …). labels: (N,) class numbers or (N, D) targets.
        layers: linear layers, so `layers` − 1 hidden ones of the same width.
    """
    if layers < 2 or not widths or min(widths) < 1:
        raise ValueError(f"`layers` must be at least 2 and `widths` positive, got {layers} and {list(widths)}.")
    progress = progress or SilentProgress()
    flat = inputs.flatten(1)
    outputs = labels.shape[1] if labels.ndim > 1 else int(labels.max()) + 1
    ordered = sorted(set(widths))
    progress.stage("training over widths", len(ordered) * len(seeds))
    best: list[tuple[float, nn.Module]] = []
    for width in ordered:
        tried = []
        for seed in seeds:
            torch.manual_seed(seed)
            module = mlp((flat.shape[1], *(layers - 1) * (width,), outputs)).to(flat.device)
            tried.append((train_full_batch(module, flat, labels, penalty, loss, steps, rate), module))
            progress.advance()
        best.append(min(tried, key=lambda each: each[0]))
    losses = tuple(each[0] for each in best)
    start = next(width for width, value in zip(ordered, losses, strict=True) if value <= (1 + tolerance) * min(losses))
    stack = list(best[-1][1].layers)  # type: ignore[arg-type]
    with torch.no_grad():
        features = nn.Sequential(*stack[:-1])(flat).double()
        scores = features @ stack[-1].weight.double().T
    ranks = width_bound(Moments.of(features, scores).centred(), tolerance=rank_tolerance)
    count = len(flat)
    return Plateau(
        tuple(ordered), losses, tolerance, start, ranks.rank_features, ranks.rank_outputs, ranks.bound,
        count * (count + 1),
    )  # fmt: skip


def train_full_batch(
    module: nn.Module, inputs: Tensor, labels: Tensor, penalty: float, loss: str, steps: int, rate: float
) -> float:
    """Full-batch Adam on loss + λ/2 Σ‖W‖² over the weights; the last value."""
    weights = [value for value in module.parameters() if value.ndim >= 2]
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def objective() -> Tensor:
        squares = torch.stack([value.square().sum() for value in weights]).sum()
        return LOSSES[loss](module(inputs), labels) + penalty / 2 * squares

    for _ in range(steps):
        optimizer.zero_grad()
        objective().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return objective().item()

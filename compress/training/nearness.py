"""How far a network's outputs lie from the original's while it is adjusted, and whether it is the better for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from compress.measures.figures import GATED, MEANINGS, Figure, FigureSums
from compress.measures.outputs import Output, Spread, named_outputs, weighted_mean
from compress.progress import Progress

TEMPERATURE = 4.0  # of the class distributions; sharper ones say little about samples that the network is sure of
LEADING = (*GATED, "squared_error", "agreement", "distance")  # figures that a report leads with

Tensors = Mapping[str, Tensor]


class Batches(Protocol):
    """Batches of samples by number."""

    def sizes(self) -> list[int]:
        """Samples in each batch."""

    def batch(self, number: int) -> Any:
        """One batch: inputs, labels, targets."""

    def read(self, number: int) -> tuple[Tensor, ...]:
        """Inputs of one batch."""


@dataclass(frozen=True)
class Check:
    """A network on the held-back samples.

    Attributes:
        divergence: mean `soft_divergence` from the original.
        figures: what labels or targets say, else how many answers agree with the original's; else the distance.
        samples: what each sample (N,) adds to a figure that is a mean over them.
    """

    step: int
    divergence: float
    figures: dict[str, float]
    samples: Mapping[str, np.ndarray] = field(default_factory=dict)

    def no_worse_than(self, other: Check) -> bool:
        """Whether no figure that a report leads with is worse by more than one standard error of the difference."""
        leading = [key for key in LEADING if key in self.figures] or list(self.figures)
        return all(self._worsening(other, key) <= self._noise(other, key) for key in leading)

    def _worsening(self, other: Check, key: str) -> float:
        change = self.figures[key] - other.figures[key]
        return -change if MEANINGS[key].higher else change

    def _noise(self, other: Check, key: str) -> float:
        pair = self.samples.get(key), other.samples.get(key)
        if pair[0] is None or pair[1] is None or len(pair[0]) != len(pair[1]) or len(pair[0]) < 2:
            return 0.0
        return float(np.std(pair[0] - pair[1], ddof=1) / math.sqrt(len(pair[0])))


def soft_divergence(
    outputs: Sequence[Output],
    before: Tensors,
    after: Tensors,
    scales: Mapping[str, float],
    samples: int,
    *,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """How far outputs moved, per sample (B,): mean over the outputs by weight, squares held against their spread.

    Of class scores T²·KL at a temperature T.
    """
    total = sum(output.weight for output in outputs)
    distances = torch.zeros(samples, dtype=torch.float64, device=before[outputs[0].name].device)
    for output in outputs:
        moved = output.distances(before[output.name], after[output.name], samples, temperature=temperature)
        distances = distances + output.weight / total * moved / scales[output.name]
    return distances


def outputs_of(
    module: nn.Module, stream: Batches, outputs: Sequence[Output], device: torch.device, progress: Progress
) -> list[dict[str, Tensor]]:
    """The network's outputs on every batch, by name."""
    batches = []
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            tensors = named_outputs(module(*(tensor.to(device) for tensor in stream.read(number))))
            batches.append({output.name: tensors[output.name].cpu() for output in outputs})
            progress.advance(size)
    # out of inference mode, so that gradients may pass by them
    return [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in batches]


def measure_scales(outputs: Sequence[Output], batches: Sequence[Tensors], sizes: Sequence[int]) -> dict[str, float]:
    """What each output's distances are held against: its spread, 1 where they are nats or shares."""
    spreads = {output.name: Spread() for output in outputs}
    for tensors, size in zip(batches, sizes, strict=True):
        for output in outputs:
            if output.kind == "real":
                spreads[output.name].add(output.by_sample(tensors[output.name]), size)
    return {name: spread.scale for name, spread in spreads.items()}


@dataclass(eq=False)
class Checking:
    """Sums over batches, of which a `Check` is made.

    Attributes:
        scales: what each output's distances are held against.
        answered: the output that labels or targets are answers to.
    """

    outputs: Sequence[Output]
    scales: Mapping[str, float]
    answered: Output | None
    _soft: float = 0.0
    _count: int = 0

    def __post_init__(self) -> None:
        scored = (output for output in self.outputs if output.kind in ("classes", "binary"))
        self._shown = self.answered or next(scored, None)
        self._figures = None if self._shown is None else FigureSums(self._shown)
        self._distances = dict.fromkeys(self.scales, 0.0)

    def add(self, before: Tensors, after: Tensors, batch: Any, size: int) -> None:
        """Add a batch: the original's outputs, the network's, and what holds labels or targets."""
        self._count += size
        self._soft += float(soft_divergence(self.outputs, before, after, self.scales, size).sum())
        for output in self.outputs:
            moved = output.distances(before[output.name], after[output.name], size)
            self._distances[output.name] += float(moved.sum())
        if self._shown is None or self._figures is None:
            return
        if self.answered is not None:
            answers = batch.labels if batch.labels is not None else batch.targets
            self._figures.add(after[self.answered.name], after[self.answered.name], answers)
        else:
            self._figures.add_agreement(before[self._shown.name], after[self._shown.name], size)

    def finish(self, step: int) -> Check:
        """How far the network's outputs lie from the wanted ones, and what a report would lead with."""
        count = max(self._count, 1)
        sums = [] if self._figures is None else self._figures.figures()
        figures = {figure.key: figure.values[1] for figure in sums}
        if not figures or len(self.outputs) > 1:
            means = {name: value / count / self.scales[name] for name, value in self._distances.items()}
            figures["distance"] = weighted_mean(self.outputs, means)
        return Check(step, self._soft / count, figures, sample_means(sums))


def sample_means(figures: Sequence[Figure]) -> dict[str, np.ndarray]:
    """What each sample (N,) adds to the figures of the second network that are means over samples, by key."""
    contributions: dict[str, np.ndarray] = {}
    for figure in figures:
        top, bottom = figure.numerators[1], figure.denominators[1]
        weight = float(bottom.mean())
        if top.shape[1] == 1 and bottom.shape[1] == 1 and weight > 0:
            rows = top[:, 0] / weight
            if math.isclose(float(rows.mean()), figure.values[1], rel_tol=1e-9, abs_tol=1e-12):
                contributions[figure.key] = rows
    return contributions

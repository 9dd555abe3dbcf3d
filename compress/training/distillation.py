"""distil(): all weights of a cut network adjusted by gradient steps to predict what the original predicts, label-free.

The targets are the original's own outputs on the calibration samples, taken once; all outputs count. Normalisation
statistics stay as they are. What comes out is never worse on the held-back samples than what went in, by the figures
that a report leads with: of the weights looked at that are not, the ones nearest to the original are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.errors import NonFiniteError
from compress.measures.figures import GATED, MEANINGS, FigureSums
from compress.measures.outputs import Output, Spread, named_outputs, weighted_mean
from compress.progress import Progress
from compress.report.model import EvaluationReport, HeldBackCheck, Step, TuningReport

RATE = 3e-4  # of Adam
TEMPERATURE = 4.0  # of the class distributions; sharper ones say little about samples that the network is sure of
WARM_UP = 0.1  # share of the steps in which the rate rises
CHECKS = 6  # times that held-back samples are looked at
CLIP = 1.0  # largest gradient norm
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
    """

    step: int
    divergence: float
    figures: dict[str, float]

    def no_worse_than(self, other: Check) -> bool:
        """Whether no figure that a report leads with is worse."""
        leading = [key for key in LEADING if key in self.figures] or list(self.figures)
        return all(
            self.figures[key] >= other.figures[key] if MEANINGS[key].higher else self.figures[key] <= other.figures[key]
            for key in leading
        )


@dataclass(frozen=True)
class Distillation:
    """What the steps did.

    Attributes:
        checks: of the held-back samples, from step 0 on.
        kept_step: the step whose weights were kept; 0 where no later ones were nearer and at least as good.
    """

    steps: int
    checks: tuple[Check, ...]
    kept_step: int

    @property
    def divergences(self) -> tuple[tuple[int, float], ...]:
        """(step, divergence) of every check."""
        return tuple((check.step, check.divergence) for check in self.checks)

    def describe(self) -> str:
        """What was kept, in words."""
        first = self.checks[0]
        kept = next(check for check in self.checks if check.step == self.kept_step)
        pairs = ", ".join(
            f"{MEANINGS[key].name} {value:.4g} → {kept.figures[key]:.4g}" for key, value in first.figures.items()
        )
        if self.kept_step == 0:
            return "fine-tuning did not help on held-back samples: the network is kept as it was cut"
        return f"fine-tuning on held-back samples: {pairs} (step {self.kept_step} of {self.steps} kept)"

    def report(self, before: EvaluationReport | None) -> TuningReport:
        """What a report holds of it; `before`: the evaluation of the cut network."""
        return TuningReport(
            method="distillation",
            length=self.steps,
            kept=self.kept_step,
            evaluation_before=before,
            divergences=tuple(Step(*point) for point in self.divergences),
            held_back=tuple(HeldBackCheck(check.step, dict(check.figures)) for check in self.checks),
        )


def distil(
    original: nn.Module,
    compressed: nn.Module,
    fitting: Batches,
    held_back: Batches,
    steps: int,
    outputs: Sequence[Output],
    progress: Progress,
    *,
    answered: Output | None = None,
    rate: float = RATE,
    seed: int = 0,
) -> tuple[nn.Module, Distillation]:
    """A copy of `compressed` after `steps` of Adam towards the original's outputs; eval mode throughout.

    Args:
        fitting, held_back: batches of disjoint samples; one batch of the first makes one step.
        outputs: those that count; whole numbers have no gradient and are only looked at.
        answered: the one that labels or targets are answers to.
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
    wanted = outputs_of(original, fitting, outputs, device, progress)
    checks = outputs_of(original, held_back, outputs, device, progress)
    scales = measure_scales(outputs, wanted, fitting.sizes())
    smooth = [output for output in outputs if output.kind != "whole"]

    def check(step: int) -> Check:
        return check_held_back(module, held_back, checks, outputs, scales, answered, device, step)

    optimizer = torch.optim.Adam(parameters, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    best, kept = copy.deepcopy(module.state_dict()), check(0)
    seen = [kept]
    every = max(1, math.ceil(steps / CHECKS))
    progress.stage("distilling", steps)
    for step in range(1, steps + 1) if smooth else ():
        if not order:
            order = torch.randperm(len(wanted), generator=generator).tolist()
        number = order.pop()
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_share(step - 1, steps)
        with torch.enable_grad():
            found = named_outputs(module(*(tensor.to(device) for tensor in fitting.read(number))))
            before = {name: tensor.to(device) for name, tensor in wanted[number].items()}
            size = fitting.sizes()[number]
            loss = soft_divergence(smooth, before, found, scales, size).mean()
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"The distillation loss is NaN or Inf at step {step}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        progress.advance()
        if step % every == 0 or step == steps:
            seen.append(check(step))
            if seen[-1].divergence < kept.divergence and seen[-1].no_worse_than(seen[0]):
                kept, best = seen[-1], copy.deepcopy(module.state_dict())
    module.load_state_dict(best)
    for tensor in parameters:
        tensor.grad = None
    return module, Distillation(steps, tuple(seen), kept.step)


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate at a step counted from 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


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
    found = torch.zeros(samples, dtype=torch.float64, device=before[outputs[0].name].device)
    for output in outputs:
        moved = output.distances(before[output.name], after[output.name], samples, temperature=temperature)
        found = found + output.weight / total * moved / scales[output.name]
    return found


def outputs_of(
    module: nn.Module, stream: Batches, outputs: Sequence[Output], device: torch.device, progress: Progress
) -> list[dict[str, Tensor]]:
    """The network's outputs on every batch, by name."""
    found = []
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            tensors = named_outputs(module(*(tensor.to(device) for tensor in stream.read(number))))
            found.append({output.name: tensors[output.name].cpu() for output in outputs})
            progress.advance(size)
    # out of inference mode, so that gradients may pass by them
    return [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in found]


def measure_scales(outputs: Sequence[Output], batches: Sequence[Tensors], sizes: Sequence[int]) -> dict[str, float]:
    """What each output's distances are held against: its spread, 1 where they are nats or shares."""
    spreads = {output.name: Spread() for output in outputs}
    for tensors, size in zip(batches, sizes, strict=True):
        for output in outputs:
            if output.kind == "real":
                spreads[output.name].add(tensors[output.name], size)
    return {name: spread.scale for name, spread in spreads.items()}


def check_held_back(
    module: nn.Module,
    stream: Batches,
    wanted: Sequence[Tensors],
    outputs: Sequence[Output],
    scales: Mapping[str, float],
    answered: Output | None,
    device: torch.device,
    step: int,
) -> Check:
    """How far the network's outputs lie from the wanted ones, and what a report would lead with."""
    soft, total = 0.0, dict.fromkeys(scales, 0.0)
    shown = answered or next((output for output in outputs if output.kind in ("classes", "binary")), None)
    sums = None if shown is None else FigureSums(shown)
    with torch.inference_mode():
        for number, size in enumerate(stream.sizes()):
            found = named_outputs(module(*(tensor.to(device) for tensor in stream.read(number))))
            before = {name: tensor.to(device) for name, tensor in wanted[number].items()}
            soft += float(soft_divergence(outputs, before, found, scales, size).sum())
            for output in outputs:
                total[output.name] += float(output.distances(before[output.name], found[output.name], size).sum())
            if answered is not None and sums is not None:
                batch = stream.batch(number)
                answers = batch.labels if batch.labels is not None else batch.targets
                sums.add(found[answered.name], found[answered.name], answers)
            elif shown is not None and sums is not None:
                sums.add_agreement(before[shown.name], found[shown.name], size)
    count = max(sum(stream.sizes()), 1)
    figures = {} if sums is None else {figure.key: figure.values[1] for figure in sums.figures()}
    if not figures or len(outputs) > 1:
        means = {name: value / count / scales[name] for name, value in total.items()}
        figures["distance"] = weighted_mean(outputs, means)
    return Check(step, soft / count, figures)

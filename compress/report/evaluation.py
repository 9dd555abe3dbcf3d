"""Evaluation of the original and the compressed network on the same samples, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import DataError, NonFiniteError
from compress.graph.program import first_tensor
from compress.progress import Progress

TOP5_FROM_CLASSES = 20
MOST_DISAGREEMENTS = 12  # kept with their inputs
MOST_CHANGES = 30  # pairs of classes


@dataclass(frozen=True)
class Score:
    """One network on labelled samples. Fractions in [0, 1]; loss is the mean cross-entropy in nats."""

    top1: float
    top5: float | None
    loss: float


@dataclass(frozen=True, eq=False)
class Disagreement:
    """One sample on which the networks predict different classes.

    Attributes:
        index: its number in the evaluation data; label: None without labels.
        original, compressed: the predicted classes.
        probabilities: of its own predicted class, the original's and the compressed network's softmax.
        lost: probability that the class predicted by the original lost; the larger, the worse the disagreement.
        inputs: the sample as the networks read it, on the CPU.
    """

    index: int
    label: int | None
    original: int
    compressed: int
    probabilities: tuple[float, float]
    lost: float
    inputs: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Both networks on the same samples.

    Attributes:
        samples: how many.
        original, compressed: scores; None without labels.
        agreement: fraction of samples on which both predict the same class; None where outputs are no class scores.
        relative_output_change: ‖compressed − original‖_F / ‖original‖_F over all outputs.
        per_class: class -> (samples, original top-1, compressed top-1); empty without labels.
        changes: (class predicted by the original, by the compressed network, samples), most samples first.
        disagreements: the worst, worst first.
        squared_error: both networks' mean over samples of ‖output − target‖², where the data has real targets.
    """

    samples: int
    original: Score | None
    compressed: Score | None
    agreement: float | None
    relative_output_change: float
    per_class: dict[int, tuple[int, float, float]] = field(default_factory=dict)
    changes: tuple[tuple[int, int, int], ...] = ()
    disagreements: tuple[Disagreement, ...] = ()
    squared_error: tuple[float, float] | None = None

    @property
    def drop(self) -> float | None:
        """Points of top-1 accuracy lost (positive: the compressed network is worse); None without labels."""
        if self.original is None or self.compressed is None:
            return None
        return 100 * (self.original.top1 - self.compressed.top1)


@dataclass
class _Count:
    samples: int = 0
    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    hits: Tensor | None = None

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        classes = outputs.shape[-1]
        correct = outputs.argmax(-1) == labels
        self.samples += len(labels)
        self.top1 += int(correct.sum())
        self.loss += float(functional.cross_entropy(outputs.double(), labels, reduction="sum"))
        if classes >= TOP5_FROM_CLASSES:
            self.top5 += int((outputs.topk(5).indices == labels[:, None]).any(-1).sum())
        found = torch.bincount(labels[correct], minlength=classes)
        self.hits = found if self.hits is None else self.hits + found

    def score(self, classes: int) -> Score:
        top5 = self.top5 / self.samples if classes >= TOP5_FROM_CLASSES else None
        return Score(self.top1 / self.samples, top5, self.loss / self.samples)


@dataclass
class _Differences:
    """The worst disagreements and the counts of changed predictions, batch by batch."""

    seen: int = 0
    worst: list[Disagreement] = field(default_factory=list)
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, inputs: Tensor, labels: Tensor | None, first: Tensor, second: Tensor) -> int:
        """Count a batch; returns on how many samples both networks agree."""
        before, after = first.argmax(1), second.argmax(1)
        places = (before != after).nonzero()[:, 0]
        if len(places):
            was, now = before[places], after[places]
            old, new = (outputs[places].double().softmax(1) for outputs in (first, second))
            rows = torch.arange(len(places), device=places.device)
            lost = old[rows, was] - new[rows, was]
            self.pairs.update(zip(was.tolist(), now.tolist(), strict=True))
            for place in lost.argsort(descending=True, stable=True)[:MOST_DISAGREEMENTS].tolist():
                sample = int(places[place])
                self.worst.append(
                    Disagreement(
                        index=self.seen + sample,
                        label=None if labels is None else int(labels[sample]),
                        original=int(was[place]),
                        compressed=int(now[place]),
                        probabilities=(float(old[place, was[place]]), float(new[place, now[place]])),
                        lost=float(lost[place]),
                        inputs=inputs[sample].detach().cpu().clone(),
                    )
                )
            self.worst = sorted(self.worst, key=lambda one: (-one.lost, one.index))[:MOST_DISAGREEMENTS]
        self.seen += len(first)
        return len(first) - len(places)

    def changes(self) -> tuple[tuple[int, int, int], ...]:
        """The commonest changes of a prediction."""
        common = sorted(self.pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_CHANGES]
        return tuple((*pair, count) for pair, count in common)


def evaluate_networks(
    original: nn.Module,
    compressed: nn.Module,
    batches: Iterable[Any],
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    only_batch: int | None = None,
) -> Evaluation:
    """Run both networks over batches of (inputs, labels or None); every number comes from this one pass.

    Args:
        only_batch: the one batch size that the networks run on; a smaller batch is filled up, the filling not counted.

    Raises:
        DataError: no samples, labels without class scores, or labels out of range.
        NonFiniteError: a network's output is NaN or Inf.
    """
    before, after, differences = _Count(), _Count(), _Differences()
    samples = agreeing = 0
    change = norm = 0.0
    squares: list[float] | None = None
    totals: Tensor | None = None
    classes, scored = 0, False
    with torch.inference_mode():
        for batch in batches:
            inputs = batch.inputs.to(device)
            first, second = (network_output(network, inputs, only_batch) for network in (original, compressed))
            scored = is_class_scores(first)
            samples += len(inputs)
            if scored:
                classes = first.shape[1]
                agreeing += differences.add(inputs, batch.labels, first, second)
            change += float((second.double() - first.double()).square().sum())
            norm += float(first.double().square().sum())
            if batch.labels is not None:
                if not scored:
                    raise DataError(
                        f"Labels need one row of class scores (batch, classes) per sample, got {tuple(first.shape)}."
                    )
                labels = check_labels(batch.labels, classes).to(device)
                before.add(first, labels)
                after.add(second, labels)
                found = torch.bincount(labels, minlength=classes)
                totals = found if totals is None else totals + found
            if batch.targets is not None:
                own = [squared_errors(outputs, batch.targets) for outputs in (first, second)]
                squares = own if squares is None else [sum(pair) for pair in zip(squares, own, strict=True)]
            if progress is not None:
                progress.advance(len(inputs))
    if not samples:
        raise DataError("The evaluation data holds no samples.")
    per_class = {}
    if totals is not None and before.hits is not None and after.hits is not None:
        per_class = {
            index: (int(total), int(before.hits[index]) / int(total), int(after.hits[index]) / int(total))
            for index, total in enumerate(totals)
            if total
        }
    return Evaluation(
        samples=samples,
        original=before.score(classes) if before.samples else None,
        compressed=after.score(classes) if after.samples else None,
        agreement=agreeing / samples if scored else None,
        relative_output_change=(change / norm) ** 0.5 if norm else 0.0,
        per_class=per_class,
        changes=differences.changes(),
        disagreements=tuple(differences.worst),
        squared_error=None if squares is None else (squares[0] / samples, squares[1] / samples),
    )


def squared_errors(outputs: Tensor, targets: Tensor) -> float:
    """Σ‖output − target‖² of targets (B, D). Raises DataError where outputs are not D numbers a sample."""
    rows = outputs.flatten(1).double() if outputs.ndim > 1 else outputs[:, None].double()
    if rows.shape != targets.shape:
        raise DataError(
            f"The data has {targets.shape[1]} targets a sample, and the network gives {tuple(outputs.shape[1:])}; they "
            "must be as many."
        )
    return float((rows - targets.to(rows)).square().sum())


def is_class_scores(outputs: Tensor) -> bool:
    """Whether outputs are one row of scores of at least two classes a sample: (batch, classes)."""
    return outputs.ndim == 2 and outputs.shape[1] > 1


def network_output(network: nn.Module, inputs: Tensor, only_batch: int | None = None) -> Tensor:
    """A network's output, or the first tensor in the container it returns. Raises TraceError, NonFiniteError."""
    count = len(inputs)
    if only_batch is not None and count < only_batch:
        inputs = torch.cat([inputs, inputs[-1:].expand(only_batch - count, *inputs.shape[1:])])
    outputs = first_tensor(network(inputs))[:count]
    if not bool(torch.isfinite(outputs.sum())):
        raise NonFiniteError(f"The output of {type(network).__name__} is NaN or Inf; check weights and preprocessing.")
    return outputs


def check_labels(labels: Tensor, classes: int) -> Tensor:
    """The labels (B,) if they lie in 0 … classes − 1. Raises DataError."""
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise DataError(f"The labels must lie in 0 … {classes - 1}, as the network has {classes} classes; got {worst}.")
    return labels

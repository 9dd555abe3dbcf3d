"""Evaluation of the original and the compressed network on the same samples, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.measures.figures import GATED, Figure, FigureSums
from compress.measures.outputs import (
    Distances,
    Output,
    check_finite,
    named_outputs,
    weighted_mean,
    without_masked,
)
from compress.measures.statistics import CONFIDENCE, Change, compare_figure, compare_flips
from compress.progress import Progress
from compress.report.model import (
    ClassChange,
    ClassScore,
    DisagreementReport,
    EvaluationReport,
    FigureChange,
    FigureReport,
    Flips,
    Measured,
    OutputReport,
    Scores,
    finite,
)
from compress.report.thumbnails import thumbnail

MOST_DISAGREEMENTS = 12  # kept with their inputs
MOST_CHANGES = 30  # pairs of classes


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
class OutputChange:
    """How far one output of the compressed network lies from the original's.

    Attributes:
        distance: mean over samples, in nats or in squares relative to the output's spread; see `Output.measure`.
        relative_change: ‖compressed − original‖_F / ‖original‖_F; of whole numbers, the share that differs.
        agreement: share of answers that both networks give alike; None where the output is no scores.
    """

    output: Output
    distance: float
    relative_change: float
    agreement: float | None


@dataclass(frozen=True)
class Evaluation:
    """Both networks on the same samples.

    Attributes:
        samples: how many.
        original, compressed: scores; None without a label a sample.
        agreement: fraction of samples on which both predict the same, of the output that labels belong to or else the
            first one with scores; None where no output is scores.
        relative_output_change: root of the weighted mean square of the outputs' relative changes.
        per_class: class -> (samples, original top-1, compressed top-1, flips); empty without labels.
        changes: (class predicted by the original, by the compressed network, samples), most samples first.
        disagreements: the worst, worst first.
        figures: what labels or targets say of both networks, sample by sample.
        outputs: every output that counts.
        answered: name of the output that labels or targets are answers to; empty without any.
        guess: share of right answers of whoever always gives the commonest label; 0 without labels.
    """

    samples: int
    original: Scores | None
    compressed: Scores | None
    agreement: float | None
    relative_output_change: float
    per_class: dict[int, tuple[int, float, float, Flips]] = field(default_factory=dict)
    changes: tuple[tuple[int, int, int], ...] = ()
    disagreements: tuple[Disagreement, ...] = ()
    figures: tuple[Figure, ...] = ()
    outputs: tuple[OutputChange, ...] = ()
    answered: str = ""
    guess: float = 0.0

    def figure(self, *keys: str) -> Figure | None:
        """The first figure with one of these keys."""
        return next((figure for figure in self.figures if figure.key in keys), None)

    @property
    def drop(self) -> float | None:
        """Points of accuracy lost, of mean IoU if more of that is (positive: the compressed network is worse).

        None where nothing is right or wrong.
        """
        gated = [figure.worsening for figure in self.figures if figure.key in GATED]
        return max(gated, default=None)

    @property
    def squared_error(self) -> tuple[float, float] | None:
        """Both networks' mean over samples of ‖output − target‖²; None without real targets."""
        figure = self.figure("squared_error")
        return None if figure is None else figure.values

    def report(
        self,
        preprocessing: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        confidence: float = CONFIDENCE,
    ) -> EvaluationReport:
        """What a report holds of it.

        Args:
            preprocessing: as recorded, to show the inputs of the worst disagreements as they were before it.
            confidence: of the intervals of what changed.
        """
        return EvaluationReport(
            samples=self.samples,
            original=self.original,
            compressed=self.compressed,
            drop_points=self.drop,
            agreement=self.agreement,
            relative_output_change=self.relative_output_change,
            squared_error=None if self.squared_error is None else Measured(*self.squared_error),
            figures=tuple(
                FigureReport(
                    figure.key, figure.output, *figure.values, change_report(compare_figure(figure, confidence))
                )
                for figure in self.figures
            ),
            outputs=tuple(
                OutputReport(
                    name=one.output.name,
                    kind=one.output.kind,
                    measure=one.output.measure,
                    because=one.output.reason,
                    weight=one.output.weight,
                    distance=one.distance,
                    relative_change=one.relative_change,
                    agreement=one.agreement,
                )
                for one in self.outputs
            ),
            per_class=tuple(
                class_score(label, *scores, confidence=confidence) for label, scores in self.per_class.items()
            ),
            class_names=None if class_names is None else tuple(class_names),
            changes=tuple(ClassChange(*change) for change in self.changes),
            disagreements=tuple(
                DisagreementReport(
                    index=case.index,
                    label=case.label,
                    original=case.original,
                    compressed=case.compressed,
                    probabilities=Measured(*case.probabilities),
                    lost=case.lost,
                    thumbnail=thumbnail(case.inputs, preprocessing),
                )
                for case in self.disagreements
            ),
        )


def class_score(label: int, samples: int, before: float, after: float, flips: Flips, confidence: float) -> ClassScore:
    """One class as a report holds it, with the interval of the points lost."""
    low, high = compare_flips(*flips, samples, confidence).interval
    return ClassScore(label, samples, before, after, flips, (low, high))


def change_report(change: Change) -> FigureChange:
    """A change as a report holds it; None for what is infinite."""
    return FigureChange(
        loss=change.loss,
        interval=(finite(change.interval[0]), finite(change.interval[1])),
        bound=finite(change.bound),
        confidence=change.confidence,
        method=change.method,
        flips=None if change.flips is None else Flips(*change.flips),
        p_value=change.p_value,
    )


@dataclass
class _Differences:
    """The worst disagreements and the counts of changed predictions, batch by batch."""

    seen: int = 0
    worst: list[Disagreement] = field(default_factory=list)
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, output: Output, inputs: Tensor, labels: Tensor | None, first: Tensor, second: Tensor) -> None:
        """Count a batch of one output's class scores."""
        before, after = first.argmax(1), second.argmax(1)
        places = (before != after).nonzero()[:, 0]
        if len(places):
            was, now = before[places], after[places]
            old, new = (output.logs(scores[places]).exp() for scores in (first, second))
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
            self.worst = sorted(self.worst, key=lambda sample: (-sample.lost, sample.index))[:MOST_DISAGREEMENTS]
        self.seen += len(first)

    def changes(self) -> tuple[tuple[int, int, int], ...]:
        """The commonest changes of a prediction."""
        common = sorted(self.pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_CHANGES]
        return tuple((*pair, count) for pair, count in common)


def evaluate_networks(
    original: nn.Module,
    compressed: nn.Module,
    batches: Iterable[Any],
    outputs: Sequence[Output],
    answered: str = "",
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    only_batch: int | None = None,
    asked: Sequence[str] = (),
) -> Evaluation:
    """Run both networks over batches of (inputs, labels, targets); every number comes from this one pass.

    Args:
        outputs: those that count.
        answered: name of the one that labels or targets are answers to.
        only_batch: the one batch size that the networks run on; a smaller batch is filled up, the filling not counted.
        asked: figures of class scores that only come where they are asked for.

    Raises:
        DataError: no samples, or labels out of range.
        NonFiniteError: an output of a network is NaN or Inf.
    """
    totals = _Totals(outputs, answered, asked)
    with torch.inference_mode():
        for batch in batches:
            inputs = tuple(part.to(device) for part in batch.tensors)
            first = network_outputs(original, inputs, only_batch)
            second = first if compressed is original else network_outputs(compressed, inputs, only_batch)
            totals.add(batch, inputs[0], first, second)
            if progress is not None:
                progress.advance(len(inputs[0]))
    return totals.evaluation()


class _Totals:
    """Everything that is summed over the batches of an evaluation."""

    def __init__(self, outputs: Sequence[Output], answered: str, asked: Sequence[str]) -> None:
        self.outputs, self.answered = outputs, answered
        self.distances, self.differences = Distances(outputs), _Differences()
        self.squares = {output.name: [0.0, 0.0] for output in outputs}  # of changes and of the original
        self.agreements = {
            output.name: FigureSums(output) for output in outputs if output.kind in ("classes", "binary")
        }
        self.judged = next((output for output in outputs if output.name == answered), None)
        self.answers = None if self.judged is None else FigureSums(self.judged, asked=asked)
        self.shown = self.judged or next((output for output in outputs if output.name in self.agreements), None)
        self.labels: list[Tensor] = []

    def add(self, batch: Any, inputs: Tensor, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
        """A batch, whose first input is `inputs`, with the outputs of both networks."""
        size = len(inputs)
        self.distances.start(first, size)
        self.distances.add(0, first, second, size)
        for output in self.outputs:
            was, now = without_masked(first[output.name].double(), second[output.name].double())
            self.squares[output.name][0] += float((now - was).square().sum())
            self.squares[output.name][1] += float(was.square().sum())
            if output.name in self.agreements:
                self.agreements[output.name].add_agreement(first[output.name], second[output.name], size)
        shown = self.shown
        if shown is not None and shown.kind == "classes" and not shown.positions:
            labels = batch.labels if shown is self.judged else None
            pair = (shown.by_sample(tensors[shown.name]) for tensors in (first, second))
            self.differences.add(shown, inputs, labels, *pair)
        wanted = batch.labels if batch.labels is not None else batch.targets
        if self.judged is not None and self.answers is not None and wanted is not None:
            if self.judged.kind == "classes" and not self.judged.positions:
                self.labels.append(check_labels(wanted, self.judged.classes))
            self.answers.add(first[self.judged.name], second[self.judged.name], wanted)

    def evaluation(self) -> Evaluation:
        """What came of them. Raises DataError: there was no sample."""
        if not self.distances.samples:
            raise DataError("The evaluation data holds no samples.")
        agreeing = {name: part.figures()[0].values[1] for name, part in self.agreements.items()}
        changes = self.changes(agreeing)
        figures = () if self.answers is None else self.answers.figures()
        before, after = (_score(figures, which) for which in (0, 1))
        squares = {change.output.name: change.relative_change**2 for change in changes}
        return Evaluation(
            samples=self.distances.samples,
            original=before,
            compressed=after,
            agreement=None if self.shown is None else agreeing.get(self.shown.name),
            relative_output_change=weighted_mean(self.outputs, squares) ** 0.5,
            per_class=_by_class(figures, self.labels),
            changes=self.differences.changes(),
            disagreements=tuple(self.differences.worst),
            figures=figures,
            outputs=changes,
            answered=self.answered,
            guess=0.0 if self.answers is None or not figures else self.answers.guess,
        )

    def changes(self, agreeing: Mapping[str, float]) -> tuple[OutputChange, ...]:
        """One row an output."""
        (distances,) = self.distances.means()
        return tuple(
            OutputChange(
                output,
                distances[output.name],
                distances[output.name] if output.kind == "whole" else _relative(*self.squares[output.name]),
                agreeing.get(output.name),
            )
            for output in self.outputs
        )


def _relative(change: float, norm: float) -> float:
    return (change / norm) ** 0.5 if norm else 0.0


def _score(figures: Sequence[Figure], which: int) -> Scores | None:
    values = {figure.key: figure.values[which] for figure in figures}
    if "top1" not in values:
        return None
    return Scores(values["loss"], values["top1"], values.get("top5"))


def _by_class(figures: Sequence[Figure], labels: Sequence[Tensor]) -> dict[int, tuple[int, float, float, Flips]]:
    """Class -> (samples, original top-1, compressed top-1, flips)."""
    top1 = next((figure for figure in figures if figure.key == "top1"), None)
    if top1 is None:
        return {}
    classes = torch.cat(list(labels)).cpu().numpy()
    scores = {}
    for label in np.unique(classes):
        of_class = classes == label
        before, after = (part[of_class, 0] for part in top1.numerators)
        flips = Flips(int((before > after).sum()), int((after > before).sum()))
        scores[int(label)] = (int(of_class.sum()), float(before.mean()), float(after.mean()), flips)
    return scores


def network_outputs(network: nn.Module, inputs: Sequence[Tensor], only_batch: int | None = None) -> dict[str, Tensor]:
    """What a network returns for a batch, by name, without the parts of samples that only fill up the batch.

    Raises:
        TraceError: it returns no tensor.
        NonFiniteError: an output is NaN or Inf.
    """
    count = size = len(inputs[0])
    if only_batch is not None and count < only_batch:
        size = only_batch
        inputs = [torch.cat([part, part[-1:].expand(size - count, *part.shape[1:])]) for part in inputs]
    outputs = named_outputs(network(*inputs))
    check_finite(outputs, type(network).__name__)
    if size == count:
        return outputs
    return {name: _without_filling(tensor, count, size) for name, tensor in outputs.items()}


def _without_filling(tensor: Tensor, count: int, size: int) -> Tensor:
    dim = next((dim for dim, extent in enumerate(tensor.shape) if extent == size), None)
    return tensor if dim is None else tensor.narrow(dim, 0, count)


def check_labels(labels: Tensor, classes: int) -> Tensor:
    """The labels (B,) if they lie in 0 … classes − 1. Raises DataError."""
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise DataError(f"The labels must lie in 0 … {classes - 1}, as the network has {classes} classes; got {worst}.")
    return labels

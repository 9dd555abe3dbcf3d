"""The compressed network against the original on calibration samples, from stored activations where there are some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import ndtr
from torch import Tensor

from compress.graph.program import Program, run
from compress.graph.steps import Override
from compress.measures.figures import ASKED, GATED, Figure, FigureSums
from compress.measures.outputs import Distances, Output, weighted_mean
from compress.measures.statistics import Change, compare_figure, judge, most_lost
from compress.recipe import Bound
from compress.recording.store import ActivationStore
from compress.report.model import CalibrationFigures, Measured, finite

ONE_ERROR = float(ndtr(1.0))  # confidence of one standard error, which a search leaves itself
LEFT_OUT = (
    "top5",
    "mean_iou",
    "perplexity",
    "squared_error",
    "absolute_error",
    "f1",
    "auc",
)  # figures that calibration samples are only asked for where a bound is of them


@dataclass(frozen=True, eq=False)
class CalibrationScore:
    """Both networks on the same calibration samples.

    Attributes:
        distances: output name -> mean distance from the original's, in nats or relative squares.
        distance: their mean by the outputs' weights.
        figures: accuracy and loss where there are labels; agreement where an output is scores; else none.
        judged: keys of those that say whether much was lost; agreement stands in for an accuracy.
    """

    samples: int
    distances: dict[str, float]
    distance: float
    figures: tuple[Figure, ...]
    judged: Sequence[str] = GATED

    def figure(self, *keys: str) -> Figure | None:
        """The first figure with one of these keys."""
        return next((one for one in self.figures if one.key in keys), None)

    @property
    def leading(self) -> Figure | None:
        """The figure that says whether much was lost; None where the samples do not give it."""
        return self.figure(*self.judged) or (self.figure("agreement") if set(self.judged) <= {*GATED} else None)

    def change(self, confidence: float = ONE_ERROR) -> Change | None:
        """Accuracy lost, disagreement where the samples have no labels; None where no output is scores."""
        return None if self.leading is None else compare_figure(self.leading, confidence)

    def passes(self, bound: Bound) -> bool:
        """Whether the loss stays within the bound, with a confidence (one standard error where none is given)."""
        change = self.change(bound.confidence or ONE_ERROR)
        if change is None or self.leading is None:
            return False
        return judge(change, most_lost(self.leading, bound), tested=True).passed

    def describe_loss(self) -> str:
        """What was lost, with the standard error, in words."""
        change = self.change()
        if change is None or self.leading is None:
            return "unknown"
        loss, error = change.loss, change.bound - change.loss
        return f"{loss:.2f} ± {error:.2f} points" if self.leading.meaning.share else f"{loss:.4g} ± {error:.2g}"

    def report(self) -> CalibrationFigures:
        """What a report holds of it."""
        change = self.change()
        top1, loss, agreement = (self.figure(key) for key in ("top1", "loss", "agreement"))
        return CalibrationFigures(
            samples=self.samples,
            drop=None if change is None else change.loss,
            error=None if change is None else finite(change.bound - change.loss),
            agreement=None if agreement is None else agreement.values[1],
            top1=None if top1 is None else Measured(*top1.values),
            loss=None if loss is None else Measured(*loss.values),
            distance=self.distance,
            outputs=dict(self.distances),
        )


def score_samples(
    program: Program,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    batch: Callable[[int], Any],
    sizes: list[int],
    outputs: Sequence[Output],
    answered: Output | None = None,
    *,
    judged: Sequence[str] = GATED,
    store: ActivationStore | None = None,
    known: Callable[[int], Sequence[Tensor]] | None = None,
    override: Mapping[str, Override] | None = None,
    advance: Callable[[int], None] | None = None,
) -> CalibrationScore:
    """Run the original and the masked compressed network over batches.

    Args:
        batch: batch number -> object with inputs, labels and targets (or None).
        outputs: those that are judged.
        answered: the one of them that labels or targets are answers to.
        judged: keys of the figures that say whether much was lost.
        store: values from which a batch can start; used up.
        known: batch number -> what the original network gives at the outputs' nodes, each node once; it does not run.
        override: steps that the compressed network computes otherwise.
    """
    device = next(iter(original.values())).device
    nodes = list(dict.fromkeys(output.node for output in outputs if output.node is not None))
    states = (original, current) if known is None else (current,)
    sums = Distances(outputs)
    agreeing = next((output for output in outputs if output.kind in ("classes", "binary")), None)
    skipped = [key for key in LEFT_OUT if key not in judged]
    answers = None if answered is None else FigureSums(answered, skipped, [key for key in ASKED if key in judged])
    agreement = None if agreeing is None else FigureSums(agreeing)
    with torch.inference_mode():
        for number, size in enumerate(sizes):
            start = store.get(number, device) if store is not None else None
            samples = batch(number)
            if start is not None:
                start = {name: pair[-len(states) :] for name, pair in start.items()}
            inputs = tuple(part.to(device) for part in samples.tensors)
            pairs = run(program, states, inputs, nodes, start=start, override=override, fast=True)
            if known is not None:
                pairs = {node: (first, *pairs[node]) for node, first in zip(nodes, known(number), strict=True)}
            if store is not None:
                store.drop(number)
            first, second = (
                {output.name: pairs[output.node][which] for output in outputs if output.node is not None}
                for which in (0, 1)
            )
            sums.start(first, size)
            sums.add(0, first, second, size)
            if answered is not None and answers is not None:
                truth = samples.labels if samples.labels is not None else samples.targets
                answers.add(first[answered.name], second[answered.name], truth)
            if agreeing is not None and agreement is not None:
                agreement.add_agreement(first[agreeing.name], second[agreeing.name], size)
            if advance is not None:
                advance(size)
    (distances,) = sums.means()
    figures = [part for part in (answers, agreement) if part is not None]
    return CalibrationScore(
        samples=sums.samples,
        distances=distances,
        distance=weighted_mean(outputs, distances),
        figures=tuple(figure for part in figures for figure in part.figures()),
        judged=judged,
    )

"""Figures of two networks on the same samples, kept sample by sample so that they can be compared in pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import DataError
from compress.measures.kinds import valid_labels
from compress.measures.outputs import Output, sample_rows

TOP5_FROM_CLASSES = 20
Parts = dict[str, tuple[Tensor, Tensor]]  # figure -> numerators (B, K) and denominators (B, K)


@dataclass(frozen=True)
class Meaning:
    """How a figure is read.

    Attributes:
        name: in words.
        share: whether it is a share, shown in per cent and compared in points.
        higher: whether more is better.
    """

    name: str
    share: bool
    higher: bool


MEANINGS: Mapping[str, Meaning] = {
    "top1": Meaning("top-1", True, True),
    "top5": Meaning("top-5", True, True),
    "pixel_accuracy": Meaning("pixel accuracy", True, True),
    "mean_iou": Meaning("mean IoU", True, True),
    "token_accuracy": Meaning("token accuracy", True, True),
    "accuracy": Meaning("accuracy of yes and no", True, True),
    "f1": Meaning("F1", True, True),
    "auc": Meaning("AUC", True, True),
    "agreement": Meaning("agreement", True, True),
    "loss": Meaning("loss", False, False),
    "perplexity": Meaning("perplexity", False, False),
    "squared_error": Meaning("squared error", False, False),
    "absolute_error": Meaning("absolute error", False, False),
    "distance": Meaning("distance from the original", False, False),
}
GATED = ("top1", "pixel_accuracy", "mean_iou", "token_accuracy", "accuracy")  # what a bound in points is of
ASKED = ("f1", "auc")  # of class scores, only where they are asked for: numbers for each class and sample are kept
MOST_CLASSES = 4096  # of figures by class: three numbers a class and sample are kept


def sample_figures(output: Output, scores: Tensor, answers: Tensor, asked: Sequence[str] = ()) -> Parts:
    """Each figure's parts on one batch: its value is the mean over K of Σ numerators / Σ denominators.

    Of `auc` they are scores, and yes or no as 1 and 0, NaN where nothing is said.

    Args:
        asked: which of `ASKED` are wanted of class scores.
        scores: the network's output (B, …), samples first.
        answers: labels (B, …), or targets (B, D).
    """
    samples = len(answers)
    if output.kind == "real":
        apart = sample_rows(_aligned(output, scores, answers), samples)
        return {"squared_error": _parts(apart.square().sum(1)), "absolute_error": _parts(apart.abs().sum(1))}
    if output.kind == "binary":
        return _binary_figures(output, scores, answers)
    assert output.class_dim is not None, "whole numbers have no answers"
    logs = output.logs(scores).movedim(output.class_dim, 1)  # (B, C, …)
    classes = logs.shape[1]
    valid = valid_labels(answers, classes)
    wanted = answers.where(valid, 0)
    best = scores.movedim(output.class_dim, 1).argmax(1)
    hits = _parts(((best == wanted) & valid).double(), valid.double())
    losses = functional.nll_loss(logs, wanted, reduction="none") * valid
    loss = _parts(losses, valid.double())
    if not output.positions:
        parts = {"top1": hits, "loss": loss}
        if classes >= TOP5_FROM_CLASSES:
            five = scores.topk(5).indices == answers[:, None]
            parts["top5"] = _parts(five.any(1).double())
        if classes <= MOST_CLASSES:
            places = functional.one_hot(answers, classes).double()
            if "f1" in asked:
                parts["f1"] = _f1(functional.one_hot(best, classes).double(), places)
            if "auc" in asked:
                parts["auc"] = logs.exp().cpu(), places.cpu()
        return {name: parts[name] for name in ("top1", "top5", "loss", *ASKED) if name in parts}
    if output.positions == 1:
        return {"token_accuracy": hits, "loss": loss, "perplexity": loss}
    parts = {"pixel_accuracy": hits, "loss": loss}
    if classes <= MOST_CLASSES:
        parts["mean_iou"] = _overlaps(best, wanted, valid, classes)
    return parts


def _aligned(output: Output, scores: Tensor, targets: Tensor) -> Tensor:
    """Outputs less targets (B, D). Raises DataError where they are not as many."""
    rows = scores.reshape(len(targets), -1).double()
    if rows.shape != targets.shape:
        raise DataError(
            f"The data has {targets.shape[1]} targets a sample, and the output `{output.name}` gives {rows.shape[1]}; "
            "they must be as many."
        )
    return rows - targets.to(rows)


def _binary_figures(output: Output, scores: Tensor, labels: Tensor) -> Parts:
    samples = len(labels)
    rows = sample_rows(output.logits(scores), samples)
    wanted = labels.reshape(samples, -1)
    valid = valid_labels(wanted, 2) if wanted.shape[1] > 1 else torch.ones_like(wanted, dtype=torch.bool)
    yes = wanted.where(valid, 0).double()
    hits = ((rows > 0) == (yes > 0.5)) & valid
    losses = functional.binary_cross_entropy_with_logits(rows, yes, reduction="none") * valid
    parts = {"accuracy": _parts(hits.double(), valid.double()), "loss": _parts(losses, valid.double())}
    guesses = ((rows > 0) & valid).double()
    if output.positions >= 2:  # of all pixels together
        doubled, marked = _f1(guesses, yes * valid)
        parts["f1"] = doubled.sum(1, keepdim=True), marked.sum(1, keepdim=True)
    elif rows.shape[1] <= MOST_CLASSES:
        parts["f1"] = _f1(guesses, yes * valid)
        parts["auc"] = rows.cpu(), yes.where(valid, torch.nan).cpu()
    if output.positions >= 2 and output.shape[-1] > 1:  # a mask
        guess = (rows > 0).long()
        parts["mean_iou"] = _overlaps(guess, yes.long(), valid, 2)
    return parts


def _f1(guess: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Twice the right ones over all said and all wanted, by label (B, K)."""
    return (2 * guess * wanted).cpu(), (guess + wanted).cpu()


def _parts(numerators: Tensor, denominators: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Summed over positions, (B, 1) each."""
    samples = len(numerators)
    counts = torch.ones(samples, 1) if denominators is None else denominators.reshape(samples, -1).sum(1, keepdim=True)
    return numerators.reshape(samples, -1).sum(1, keepdim=True).cpu(), counts.cpu()


def _overlaps(best: Tensor, wanted: Tensor, valid: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Intersections and unions (B, C) of predicted and wanted masks."""
    samples = len(best)
    rows = torch.arange(samples, device=best.device).view(-1, *[1] * (best.ndim - 1)) * classes

    def count(values: Tensor, where: Tensor) -> Tensor:
        cells = (rows + values)[where]
        return torch.bincount(cells, minlength=samples * classes).view(samples, classes).double().cpu()

    both = count(best, valid & (best == wanted))
    return both, count(best, valid) + count(wanted, valid) - both


@dataclass(frozen=True, eq=False)
class Figure:
    """One figure of both networks.

    Attributes:
        key: its name in `MEANINGS`.
        output: name of the output that it is of.
        numerators, denominators: of the original and of the compressed network, (N, K) each.
    """

    key: str
    output: str
    numerators: tuple[np.ndarray, np.ndarray]
    denominators: tuple[np.ndarray, np.ndarray]

    @property
    def meaning(self) -> Meaning:
        """How it is read."""
        return MEANINGS[self.key]

    @property
    def values(self) -> tuple[float, float]:
        """Of the original and of the compressed network."""
        ones = np.ones((1, len(self.numerators[0])))
        first, second = (float(self.resampled(which, ones)[0]) for which in (0, 1))
        return first, second

    def resampled(self, which: int, weights: np.ndarray) -> np.ndarray:
        """The figure of one network (R,) where the samples count so many times (R, N); NaN where nothing counts."""
        if self.key == "auc":
            columns = zip(self.numerators[which].T, self.denominators[which].T, strict=True)
            areas = np.stack([weighted_auc(scores, labels, weights) for scores, labels in columns], 1)
            return mean_known(areas)
        top, bottom = weights @ self.numerators[which], weights @ self.denominators[which]
        ratios = np.divide(top, bottom, out=np.full_like(top, np.nan, dtype=np.float64), where=bottom > 0)
        means = mean_known(ratios)
        return np.exp(means) if self.key == "perplexity" else means

    @property
    def hits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Which samples (N,) each network has right, where that is all there is to a sample; else None."""
        if self.key not in ("top1", "top5", "agreement", "accuracy"):
            return None
        single = all(part.shape[1] == 1 and bool((part == 1).all()) for part in self.denominators)
        return (self.numerators[0][:, 0] > 0.5, self.numerators[1][:, 0] > 0.5) if single else None

    @property
    def worsening(self) -> float:
        """By how much the compressed network is worse: points of a share, else in the figure's own unit."""
        before, after = self.values
        change = (before - after) if self.meaning.higher else (after - before)
        return 100 * change if self.meaning.share else change


@dataclass
class FigureSums:
    """Figures of both networks on one output, batch by batch.

    Attributes:
        skipped: keys of figures that are not wanted; asked: of those that only come where they are.
        answers: how often each label came.
    """

    output: Output
    skipped: Sequence[str] = ()
    asked: Sequence[str] = ()
    answers: Counter[int] = field(default_factory=Counter)
    parts: dict[str, list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]] = field(default_factory=dict)

    def add(self, first: Tensor, second: Tensor, answers: Tensor) -> None:
        """A batch of the two networks' outputs, as they return them, and what they are held against."""
        first, second = self.output.by_sample(first), self.output.by_sample(second)
        before, after = (
            sample_figures(self.output, scores, answers.to(scores.device), self.asked) for scores in (first, second)
        )
        if not answers.is_floating_point():
            counted = answers[valid_labels(answers, self.output.classes or 2)]
            labels, counts = np.unique(counted.cpu().numpy(), return_counts=True)
            self.answers.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
        for key, part in before.items():
            if key not in self.skipped:
                self.parts.setdefault(key, []).append((part, after[key]))

    def add_agreement(self, first: Tensor, second: Tensor, samples: int) -> None:
        """A batch of the two networks' outputs, of class or binary scores: where both say the same."""
        first, second = self.output.by_sample(first), self.output.by_sample(second)
        same = sample_rows(decisions(self.output, first) == decisions(self.output, second), samples)
        all_of_them = _parts(torch.ones(same.shape, dtype=torch.float64), torch.ones(same.shape))
        agreeing = _parts(same.double(), torch.ones(same.shape))
        self.parts.setdefault("agreement", []).append((all_of_them, agreeing))

    @property
    def guess(self) -> float:
        """Share of right answers of whoever always gives the commonest label, and at least one in all classes."""
        total = sum(self.answers.values())
        commonest = max(self.answers.values(), default=0) / total if total else 0.0
        return max(commonest, 1 / (self.output.classes or 2))

    def figures(self) -> tuple[Figure, ...]:
        """All of them, in the order of `MEANINGS`."""
        figures = []
        for key in MEANINGS:
            if key in self.parts:
                top, bottom = (
                    tuple(
                        torch.cat([pair[which][part] for pair in self.parts[key]]).double().numpy() for which in (0, 1)
                    )
                    for part in (0, 1)
                )
                figure = Figure(key, self.output.name, top, bottom)  # type: ignore[arg-type]
                if key not in ASKED or all(map(np.isfinite, figure.values)):  # not where all answers are alike
                    figures.append(figure)
        return tuple(figures)


def weighted_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share (R,) of pairs of a yes and a no whose scores are in order, ties half; samples count so often (R, N).

    Args:
        scores, labels: (N,); labels 1, 0 or NaN.
    """
    known = ~np.isnan(labels)
    order = np.flatnonzero(known)[np.argsort(scores[known], kind="stable")]
    values, yes, counts = scores[order], labels[order], weights[:, order]
    if not len(order):
        return np.full(len(weights), np.nan)
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])  # of runs of equal scores
    positive = np.add.reduceat(counts * yes, starts, axis=1)
    negative = np.add.reduceat(counts * (1 - yes), starts, axis=1)
    below = np.cumsum(negative, 1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    areas: np.ndarray = np.divide((positive * below).sum(1), pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
    return areas


def mean_known(values: np.ndarray) -> np.ndarray:
    """Mean (R,) over columns of (R, K), those that are NaN left out; NaN where all are."""
    counted = (~np.isnan(values)).sum(1)
    means: np.ndarray = np.divide(np.nansum(values, 1), counted, out=np.full(len(counted), np.nan), where=counted > 0)
    return means


def decisions(output: Output, scores: Tensor) -> Tensor:
    """Predicted classes, or yes and no, at every position."""
    if output.class_dim is not None:
        return scores.argmax(output.class_dim)
    return output.logits(scores) > 0

"""What came of it: costs, scores, fine-tuning, checks, exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

from compress.report.model.numbers import Count, Counts, Measured, Plain, Positive, Real, Share, Step


@dataclass(frozen=True)
class Latency:
    """Milliseconds a batch of both networks."""

    batch_size: Count
    threads: Count
    device: str
    before_ms: Positive
    after_ms: Positive

    @property
    def factor(self) -> float:
        """How many times faster; 1 where nothing was measured."""
        return self.before_ms / self.after_ms if self.after_ms else 1.0


@dataclass(frozen=True)
class CostReport:
    """Costs before and after: parameters, multiply-accumulates a sample, bytes on disk, latency by batch size."""

    parameters: Counts
    macs: Counts
    bytes: Counts
    latency: tuple[Latency, ...] = ()


@dataclass(frozen=True)
class ModuleCost:
    """Parameters and multiply-accumulates a sample of one module of the network, before and after."""

    name: str
    parameters: Counts
    macs: Counts


@dataclass(frozen=True)
class Scores:
    """One network on labelled samples; top1 and top5 are None where they have no meaning."""

    loss: Real
    top1: Share | None = None
    top5: Share | None = None


class Flips(NamedTuple):
    """Samples that were right and are wrong now, and that were wrong and are right now."""

    lost: Count
    won: Count


@dataclass(frozen=True)
class ClassScore:
    """Both networks' accuracy on the samples of one class.

    Attributes:
        interval: two-sided, of the points lost, at the confidence of the figures; None where flips are not known.
    """

    label: Count
    samples: Count
    original: Share
    compressed: Share
    flips: Flips | None = None
    interval: tuple[Real, Real] | None = None


class ClassChange(NamedTuple):
    """Samples that the original counted to one class and the compressed network to another."""

    original: Count
    compressed: Count
    samples: Count


@dataclass(frozen=True)
class DisagreementReport:
    """One sample on which both predict different classes; see `Disagreement`. `thumbnail` is a data URI."""

    index: Count
    label: Count | None
    original: Count
    compressed: Count
    probabilities: Measured
    lost: Real
    thumbnail: Annotated[str, Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]*$")] | None = None


@dataclass(frozen=True)
class FigureChange:
    """What a figure lost, positive where the compressed network is worse; see `compress.measures.statistics.Change`.

    Attributes:
        interval, bound: two-sided, and one-sided, at `confidence`; None where they are infinite.
    """

    loss: Real
    interval: tuple[Real | None, Real | None]
    bound: Real | None
    confidence: Share
    method: str
    flips: Flips | None = None
    p_value: Real | None = None


@dataclass(frozen=True)
class FigureReport:
    """A figure of both networks on labels or targets; `change` is None where only the values are known."""

    key: str
    output: str
    original: Real
    compressed: Real
    change: FigureChange | None = None


@dataclass(frozen=True)
class OutputReport:
    """How far one output lies from the original's; see `OutputChange`. `because`: why it is taken for that kind."""

    name: str
    kind: str
    measure: str
    because: str
    weight: Real
    distance: Real
    relative_change: Real
    agreement: Share | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """Both networks on the evaluation data; see `Evaluation`. `drop_points`: of top-1 accuracy, lost."""

    samples: Count
    original: Scores | None
    compressed: Scores | None
    drop_points: Real | None
    agreement: Share | None
    relative_output_change: Real
    squared_error: Measured | None = None
    figures: tuple[FigureReport, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    per_class: tuple[ClassScore, ...] = ()
    class_names: tuple[str, ...] | None = None
    changes: tuple[ClassChange, ...] = ()
    disagreements: tuple[DisagreementReport, ...] = ()

    @property
    def top1(self) -> Measured | None:
        """Accuracy before and after; None where none was measured."""
        before, after = self.original, self.compressed
        if before is None or after is None or before.top1 is None or after.top1 is None:
            return None
        return Measured(before.top1, after.top1)

    @property
    def losses(self) -> Measured | None:
        """Loss before and after; None without labels."""
        if self.original is None or self.compressed is None:
            return None
        return Measured(self.original.loss, self.compressed.loss)

    def name_of(self, label: int) -> str:
        """A class in words."""
        names = self.class_names
        return names[label] if names and 0 <= label < len(names) else str(label)


@dataclass(frozen=True)
class Epoch:
    """One epoch: learning rate, mean training loss, validation loss and top-1 (None without one)."""

    epoch: Count
    rate: Real
    loss: Real
    validation_loss: Real | None = None
    validation_top1: Real | None = None
    phase: str | None = None


@dataclass(frozen=True)
class HeldBackCheck:
    """Figures of the network on held-back samples after a step."""

    step: Count
    figures: dict[str, Real]


@dataclass(frozen=True)
class ForecastReport:
    """What more samples would bring a recovery without labels, from what parts of those at hand brought.

    Attributes:
        samples: calibration samples at hand; further: those that it is told for.
        points: (fitting samples, mean distance of held-back outputs from the original's) that it was fitted to.
        left: share of the last distance that would be left with them; low, high: its bounds at 90 %.
        agreement_before, agreement_after: share of held-back answers as the original's, cut and recovered; None
            where no output is scores.
    """

    samples: Count
    further: Count
    points: tuple[Step, ...]
    left: Share
    low: Share
    high: Share
    agreement_before: Share | None = None
    agreement_after: Share | None = None

    def gained(self, left: float) -> float | None:
        """Points of agreement that such a share would bring: what a margin is moved by grows as the distance's root."""
        return None if self.agreement_after is None else 100 * (1 - self.agreement_after) * (1 - left**0.5)


@dataclass(frozen=True)
class TuningReport:
    """A fine-tuning after the cut.

    Attributes:
        method: "distillation", which needs no labels, or a training method.
        length, kept: steps (distillation) or epochs, and the one whose weights were kept.
        evaluation_before: of the cut network.
        divergences, held_back: of distillation, on held-back samples by step; forecast: what more samples would bring
            it; the rest is of a training method.
    """

    method: str
    length: Count
    kept: Count
    evaluation_before: EvaluationReport | None = None
    divergences: tuple[Step, ...] = ()
    held_back: tuple[HeldBackCheck, ...] = ()
    options: Plain | None = None
    held_back_before: Scores | None = None
    curve: tuple[Epoch, ...] = ()
    forecast: ForecastReport | None = None

    @property
    def effort(self) -> str:
        """How much was done, in words."""
        return (
            f"{self.length} label-free steps"
            if self.method == "distillation"
            else f"{self.length} epochs of {self.method}"
        )


@dataclass(frozen=True)
class Verification:
    """Largest relative deviations: of the narrowed network from the masked original, and of the written one, reloaded
    in a fresh process, from the narrowed one (None where nothing was written)."""

    narrowed_deviation: Real
    reload_deviation: Real | None = None


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        passed: None where it could not be judged; `message` says why.
        message: one sentence for people.
    """

    name: str
    wanted: str
    measured: str
    passed: bool | None
    message: str = ""


@dataclass(frozen=True)
class GuardReport:
    """A guard set on both networks. `weight`: its share of the calibration samples; `most`: points it may lose."""

    name: str
    weight: Share
    most: Real
    evaluation: EvaluationReport


@dataclass(frozen=True)
class ExportCheck:
    """Largest relative deviation of an export at one batch size."""

    batch_size: Count
    deviation: Real


@dataclass(frozen=True)
class ExportLatency:
    """Milliseconds a batch of an export and of the network in torch."""

    batch_size: Count
    threads: Count
    exported_ms: Positive
    torch_ms: Positive


@dataclass(frozen=True)
class ExportReport:
    """One further format: its file, what it was checked with and how far it deviates; `opset` is of ONNX."""

    kind: str
    file: str
    checked_with: str
    checks: tuple[ExportCheck, ...]
    sha256: str | None = None
    bytes: Count | None = None
    latency: tuple[ExportLatency, ...] = ()
    opset: int | None = None

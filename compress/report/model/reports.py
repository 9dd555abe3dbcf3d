"""The two kinds of report, written as JSON and read back with every part of it checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from pydantic import ValidationError

from compress.errors import OutputError
from compress.report.model.earlier import upgraded_run, upgraded_training
from compress.report.model.inputs import Inputs, SourceFile
from compress.report.model.layers import CalibrationReport, LayerReport, SearchReport, SkippedLayer
from compress.report.model.numbers import Count, Counts, Measured, Plain, Real, adapter
from compress.report.model.results import (
    Check,
    CostReport,
    Epoch,
    EvaluationReport,
    ExportReport,
    GuardReport,
    ModuleCost,
    Scores,
    TuningReport,
    Verification,
)

SCHEMA = 2  # of both kinds of report; 1 is release 0.1.0


@dataclass(frozen=True)
class Claims:
    """What a report says of the network in its folder, for whoever looks again.

    Attributes:
        widths: group name -> units before and after.
        latency: batch size -> milliseconds.
        fingerprint: of the evaluation data; None without any.
        figures: key -> value of the network before, where it is known, and of this one, on that data.
    """

    widths: dict[str, Counts]
    parameters: int
    macs: int
    latency: dict[int, float]
    fingerprint: str | None
    figures: dict[str, tuple[float | None, float]]


@dataclass(frozen=True)
class Report:
    """What a run's report and a training's have in common.

    Attributes:
        hashes: file name -> SHA-256.
        seconds: of the stages.
    """

    inputs: Inputs
    exports: tuple[ExportReport, ...] = field(default=(), kw_only=True)
    hashes: dict[str, str] = field(default_factory=dict, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    seconds: dict[str, Real] = field(default_factory=dict, kw_only=True)
    schema: int = field(default=SCHEMA, kw_only=True)

    FILE: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data, every part of it named."""
        plain: dict[str, Any] = adapter(type(self)).dump_python(self, mode="json")
        last = {name: plain.pop(name) for name in ("exports", "hashes", "notes", "seconds")}
        return {"schema": plain.pop("schema"), **plain, **last}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> Self:
        """Read what `to_json` gave, of this release or of an earlier one.

        Args:
            source: names the file in the error.

        Raises:
            OutputError: it is damaged, or of a later version; the first fault is named.
        """
        version = content.get("schema", 1)
        if not isinstance(version, int) or not 1 <= version <= SCHEMA:
            raise OutputError(f"{source!r} has schema {version!r}; this version of compress reads up to {SCHEMA}.")
        try:
            report: Self = adapter(cls).validate_python(cls.upgraded(content) if version == 1 else content)
            return report
        except ValidationError as error:
            raise OutputError(f"{source!r} is damaged: {first_fault(error)}.") from None

    @classmethod
    def upgraded(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """What release 0.1.0 wrote, in today's form."""
        raise NotImplementedError

    def claims(self) -> Claims:
        """What is said of the network in the folder."""
        raise NotImplementedError

    def reloaded(self, deviation: float) -> Self:
        """The report with the deviation of the written network, reloaded in a fresh process."""
        raise NotImplementedError

    def with_exports(self, made: Sequence[ExportReport]) -> Self:
        """The report with these exports, in the place of older ones of the same kinds."""
        kinds = {export.kind for export in made}
        return replace(self, exports=(*(export for export in self.exports if export.kind not in kinds), *made))


@dataclass(frozen=True)
class RunReport(Report):
    """The content of `report.json`.

    Attributes:
        recipe: every option as it was resolved; `rule` says in words how wide a layer stays.
        layers: those that were looked at, whether or not they lost units.
        evaluations: how often the evaluation data was looked at.
        added_biases: state names.
        guards: further domains, calibrated on and bounded.
        metrics: name -> what the user's own measure says before and after.
        order: names of all layers, skipped ones too, in the order of the network; empty where it is not known.
        modules: what each part of the network costs.
        removed: names of the blocks that went as a whole.
    """

    recipe: Plain
    rule: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    cost: CostReport
    verification: Verification
    calibration: CalibrationReport = field(default_factory=CalibrationReport)
    search: SearchReport | None = None
    evaluation: EvaluationReport | None = None
    evaluations: Count = 0
    finetune: TuningReport | None = None
    added_biases: tuple[str, ...] = ()
    gates: tuple[Check, ...] = ()
    metrics: dict[str, Measured] = field(default_factory=dict)
    guards: tuple[GuardReport, ...] = ()
    order: tuple[str, ...] = ()
    modules: tuple[ModuleCost, ...] = ()
    removed: tuple[str, ...] = ()

    FILE: ClassVar[str] = "report.json"

    @property
    def checkpoint(self) -> SourceFile:
        """The file that was compressed."""
        return self.inputs.checkpoint or SourceFile("", "")

    def layer(self, name: str) -> LayerReport:
        """The layer of that name, of those that were looked at. Raises KeyError."""
        return {layer.name: layer for layer in self.layers}[name]

    @classmethod
    def upgraded(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """What release 0.1.0 wrote, in today's form."""
        return upgraded_run(content)

    def reloaded(self, deviation: float) -> Self:
        """The report with the deviation of the written network, reloaded in a fresh process."""
        return replace(self, verification=replace(self.verification, reload_deviation=deviation))

    def claims(self) -> Claims:
        """What is said of the network in the folder."""
        evaluation, eval_data = self.evaluation, self.inputs.data.evaluation
        return Claims(
            widths={layer.name: Counts(layer.units, layer.kept) for layer in self.layers},
            parameters=self.cost.parameters.after,
            macs=self.cost.macs.after,
            latency={latency.batch_size: latency.after_ms for latency in self.cost.latency},
            fingerprint=None if eval_data is None else eval_data.fingerprint,
            figures={
                figure.key: (figure.original, figure.compressed)
                for figure in (evaluation.figures if evaluation else ())
            },
        )


@dataclass(frozen=True)
class WeightsReport:
    """A weight tensor and how much of it is not zero."""

    name: str
    weights: Count
    nonzeros: Count


@dataclass(frozen=True)
class CouplingReport:
    """Coupled units and how many are active."""

    name: str
    units: Count
    active: Count


@dataclass(frozen=True)
class PenaltySearch:
    """How penalties were found: whether the target was met, with which, at what nonzeros, after how many trainings."""

    met: bool
    penalties: tuple[Real, ...]
    levels: tuple[Real, ...]
    trainings: Count


@dataclass(frozen=True)
class TrainingEvaluation:
    """The network before and after its training on evaluation data.

    Attributes:
        original: None where it started from random weights.
        loss, constant_loss: for real targets, which loss, and what the best constant comes to.
    """

    samples: Count
    original: Scores | None
    trained: Scores | None
    loss: str | None = None
    constant_loss: Real | None = None


@dataclass(frozen=True)
class Undebiased:
    """Scores before the epochs without penalty."""

    training: Scores | None
    validation: Scores | None = None
    evaluation: Scores | None = None


@dataclass(frozen=True)
class TrainingReport(Report):
    """The content of `training.json`.

    Attributes:
        kind: "train" or "finetune".
        samples: that were trained on; `training`, `validation`: scores on them and on those held back.
        weight_decay_objective: what weight decay at the same penalty would minimise.
        nonzeros, weights, layers: of the weight tensors; couplings, active_fraction: of coupled units.
        reload_deviation: of the written network, reloaded in a fresh process; None before it is written.
    """

    kind: str
    method: str
    options: Plain
    parameters: Count
    macs: Count
    samples: Count
    curve: tuple[Epoch, ...]
    best_epoch: Count
    stopped_early: bool
    training: Scores | None
    validation: Scores | None
    nonzeros: Count
    weights: Count
    layers: tuple[WeightsReport, ...]
    couplings: tuple[CouplingReport, ...] = ()
    active_fraction: Real | None = None
    weight_decay_objective: Real | None = None
    undebiased: Undebiased | None = None
    penalty_search: PenaltySearch | None = None
    evaluation: TrainingEvaluation | None = None
    reload_deviation: Real | None = None

    FILE: ClassVar[str] = "training.json"

    @classmethod
    def upgraded(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """What release 0.1.0 wrote, in today's form."""
        return upgraded_training(content)

    def reloaded(self, deviation: float) -> Self:
        """The report with the deviation of the written network, reloaded in a fresh process."""
        return replace(self, reload_deviation=deviation)

    def claims(self) -> Claims:
        """What is said of the network in the folder."""
        scored, eval_data = self.evaluation, self.inputs.data.evaluation
        figures: dict[str, tuple[float | None, float]] = {}
        if scored is not None and scored.trained is not None:
            before = scored.original
            if scored.trained.top1 is not None:
                figures["top1"] = (None if before is None else before.top1, scored.trained.top1)
            if scored.loss == "squared":
                figures["squared_error"] = (None if before is None else before.loss, scored.trained.loss)
        return Claims(
            widths={},
            parameters=self.parameters,
            macs=self.macs,
            latency={},
            fingerprint=None if eval_data is None else eval_data.fingerprint,
            figures=figures,
        )


def first_fault(error: ValidationError) -> str:
    """The first of what is wrong, in one line: where, and what."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    return " ".join(f"{place}: {message[:1].lower()}{message[1:]}".split())

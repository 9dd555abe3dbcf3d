"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.report.model import RunReport


@dataclass(frozen=True)
class RunFigures:
    """The figures that runs are compared by; None where a run has none."""

    name: str
    file: str
    rule: str
    parameters: int
    parameters_kept: float
    parameters_reduction: float
    macs: int
    macs_reduction: float
    bytes: int
    latency_ms: float | None
    speedup: float | None
    top1: float | None
    drop_points: float | None
    loss: float | None
    agreement: float | None
    relative_output_change: float | None
    evaluation_samples: int | None
    seed: int

    @classmethod
    def of(cls, name: str, report: RunReport) -> RunFigures:
        """The figures of one run."""
        cost, evaluation = report.cost, report.evaluation
        scores = None if evaluation is None else evaluation.compressed
        latency = cost.latency[-1] if cost.latency else None
        return cls(
            name=name,
            file=report.checkpoint.file,
            rule=report.rule,
            parameters=cost.parameters.after,
            parameters_kept=cost.parameters.kept,
            parameters_reduction=cost.parameters.factor,
            macs=cost.macs.after,
            macs_reduction=cost.macs.factor,
            bytes=cost.bytes.after,
            latency_ms=None if latency is None else latency.after_ms,
            speedup=None if latency is None else latency.factor,
            top1=None if scores is None else scores.top1,
            drop_points=None if evaluation is None else evaluation.drop_points,
            loss=None if scores is None else scores.loss,
            agreement=None if evaluation is None else evaluation.agreement,
            relative_output_change=None if evaluation is None else evaluation.relative_output_change,
            evaluation_samples=None if evaluation is None else evaluation.samples,
            seed=report.inputs.seed,
        )


@dataclass(frozen=True)
class LayerWidths:
    """One layer's units, and how many each run kept; None where a run does not have the layer."""

    name: str
    units: int
    kept: tuple[int | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: figures of each, and kept units by layer."""

    runs: tuple[RunFigures, ...]
    layers: tuple[LayerWidths, ...]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The figures as texts, a row for each that some run has, one cell a run."""
        rows = [(name, *(show(getattr(run, key)) for run in self.runs)) for key, name, show in COMPARED]
        return [row for row in rows if set(row[1:]) != {"–"}]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_reports(reports: Sequence[tuple[str, RunReport]]) -> Comparison:
    """Runs, each (name, report), side by side."""
    kept: dict[str, dict[int, int]] = {}
    units: dict[str, int] = {}
    for number, (_, report) in enumerate(reports):
        for layer in report.layers:
            kept.setdefault(layer.name, {})[number] = layer.kept
            units[layer.name] = max(units.get(layer.name, 0), layer.units)
    return Comparison(
        tuple(RunFigures.of(name, report) for name, report in reports),
        tuple(
            LayerWidths(name, units[name], tuple(runs.get(number) for number in range(len(reports))))
            for name, runs in kept.items()
        ),
    )


def _shown(form: str, scale: int = 1, unit: str = "") -> Callable[[Any], str]:
    return lambda value: "–" if value is None else f"{format(scale * value if form else value, form)}{unit}"


COMPARED: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("file", "checkpoint", _shown("")),
    ("rule", "widths", _shown("")),
    ("parameters", "parameters", _shown(",")),
    ("parameters_reduction", "fewer parameters", _shown(".2f", unit="×")),
    ("macs", "MACs per sample", _shown(",")),
    ("macs_reduction", "fewer MACs", _shown(".2f", unit="×")),
    ("bytes", "bytes on disk", _shown(",")),
    ("latency_ms", "latency, largest batch", _shown(".2f", unit=" ms")),
    ("speedup", "faster than its original", _shown(".2f", unit="×")),
    ("top1", "top-1", _shown(".2f", 100, " %")),
    ("drop_points", "points lost", _shown(".2f")),
    ("loss", "loss", _shown(".4f")),
    ("agreement", "agreement", _shown(".2f", 100, " %")),
    ("relative_output_change", "relative output change", _shown(".4f")),
    ("evaluation_samples", "evaluation samples", _shown(",")),
    ("seed", "seed", _shown("")),
)

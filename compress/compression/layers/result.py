"""What a layer comes to: one value, whether this run settled it or an earlier one that it goes on from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from compress.convex import SelectionCurve, WidthBound
from compress.recording.layer_moments import LayerMoments
from compress.report.model import (
    Facts,
    Fit,
    LayerReport,
    Point,
    Ranks,
    Spectra,
    WidthErrors,
    adapter,
    finite,
    plain_data,
)

CURVE_POINTS = 200  # of a curve or spectrum, in the report
NEEDS_MEMORY = "left as it is: a width above that needs more --memory"
WEIGHT, WHOLE = "weight:", "whole:"  # in front of a state name, in the file of a turn


@dataclass(frozen=True, eq=False)
class LayerResult:
    """What was decided about one layer.

    Attributes:
        report: its facts, errors by width, refit and certificate, in numbers that JSON holds.
        kept: unit numbers that stay, sorted.
        weights: state name -> new tensor in the original shape, removed units' columns zero.
        lacks_memory: it stays whole because weighing its units needs more memory than was allowed.
    """

    report: LayerReport
    kept: Tensor
    weights: dict[str, Tensor] = field(default_factory=dict)
    lacks_memory: bool = False

    @property
    def name(self) -> str:
        """Of its group of units."""
        return self.report.name

    @property
    def units(self) -> int:
        """K, before anything goes."""
        return self.report.units

    @property
    def is_cut(self) -> bool:
        """Whether any unit goes."""
        return len(self.kept) < self.units

    def after_recording(self, seconds: Mapping[str, float]) -> LayerResult:
        """The same with the seconds that recording took in front of its own."""
        return replace(self, report=replace(self.report, seconds={**seconds, **self.report.seconds}))


@dataclass(frozen=True)
class Watched:
    """How a layer was settled while the outputs were watched.

    Attributes:
        reached: distance of the held-back outputs from the original's then.
        error: the smaller one that it was held to, 0 where it was left whole; None where it was not.
    """

    reached: float
    error: float | None = None


@dataclass(frozen=True, eq=False)
class Settled:
    """What a turn of a sweep comes to.

    Attributes:
        weights: state name -> new tensor.
        layer: the result where units were chosen.
        fault: why it comes to nothing, where its moments or the problem on them are no good.
        whole: what the weights were before they were given a low rank; empty where they were not.
        watched: what the outputs made of it, where they were watched.
    """

    weights: Mapping[str, Tensor]
    layer: LayerResult | None = None
    fault: str | None = None
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    watched: Watched | None = None

    @classmethod
    def of(cls, layer: LayerResult, watched: Watched | None = None) -> Settled:
        """A turn that chose units."""
        return cls(layer.weights, layer, watched=watched)

    def to(self, device: Any) -> Settled:
        """The same with its weights on a device."""
        weights = {name: tensor.to(device) for name, tensor in self.weights.items()}
        layer = None if self.layer is None else replace(self.layer, weights=weights)
        whole = {name: tensor.to(device) for name, tensor in self.whole.items()}
        return replace(self, weights=weights, layer=layer, whole=whole)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data that hold it."""
        tensors = {f"{WEIGHT}{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"{WHOLE}{name}": tensor for name, tensor in self.whole.items()}
        about: dict[str, Any] = {} if self.fault is None else {"fault": self.fault}
        if self.layer is not None:
            tensors["kept"] = self.layer.kept
            about = {"layer": plain_data(self.layer.report), "lacks_memory": self.layer.lacks_memory}
            about |= {} if self.watched is None else {"watched": asdict(self.watched)}
        return tensors, about

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Settled | None:
        """What `to_file` gave; None for what another version wrote."""
        weights, whole = (
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in (WEIGHT, WHOLE)
        )
        if "kept" not in tensors:
            return cls(weights, fault=about.get("fault"), whole=whole)
        try:
            report = adapter(LayerReport).validate_python(about["layer"])
            watched = Watched(**about["watched"]) if "watched" in about else None
        except (KeyError, TypeError, ValidationError):
            return None
        layer = LayerResult(report, tensors["kept"], weights, bool(about.get("lacks_memory")))
        return cls.of(layer, watched)


def report_facts(bound: WidthBound, dead: int, duplicates: int) -> Facts:
    """Ranks and counts of a layer as a report holds them."""
    return Facts(
        dead=dead,
        duplicates=duplicates,
        rank_features=bound.rank_features,
        rank_outputs=bound.rank_outputs,
        bound=bound.bound,
        bound_text=bound.message,
        spectra=Spectra(
            tolerance=bound.tolerance,
            features=thinned(bound.feature_spectrum, first=1),
            outputs=thinned(bound.output_spectrum, first=1),
        ),
        grid=tuple(Ranks(each.tolerance, each.rank_features, each.rank_outputs, each.bound) for each in bound.grid()),
    )


def report_widths(curve: SelectionCurve | None, measured: Mapping[int, float]) -> WidthErrors:
    """Errors by width: of the selection, and held-back ones after the refit where a width was tried."""
    return WidthErrors(
        curve=None if curve is None else thinned(curve.errors),
        tried=tuple(Point(width, rounded(error)) for width, error in sorted(measured.items())),
    )


def report_fit(moments: LayerMoments, error: float, held_back_error: float, floor: float, *, note: str = "") -> Fit:
    """A refit as a report holds it; `floor`: held-back error with all units, left by earlier layers."""
    return Fit(
        error=finite(error),
        held_back_error=finite(held_back_error),
        inherited_error=finite(floor),
        rows=moments.rows,
        sampling=moments.positions + (f"; {note}" if note else ""),
    )


def rounded(value: float) -> float | None:
    """The value to five significant digits; None where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def thinned(values: Tensor, first: int = 0) -> tuple[Point, ...]:
    """Points (place, value) of a curve (n,), at most `CURVE_POINTS` of them, evenly spread; places start at `first`."""
    count = len(values)
    steps = min(count, CURVE_POINTS)
    places = sorted({round(step * (count - 1) / max(1, steps - 1)) for step in range(steps)})
    return tuple(Point(place + first, rounded(float(values[place]))) for place in places)

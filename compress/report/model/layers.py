"""What was decided about the layers, and how their widths were found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from compress.report.model.numbers import Count, Counts, Measured, Point, Real, Share, Step


@dataclass(frozen=True)
class Spectra:
    """Relative singular values of Φ and Ψ; those above `tolerance` make up the numerical ranks."""

    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    features: tuple[Point, ...]
    outputs: tuple[Point, ...]


@dataclass(frozen=True)
class Ranks:
    """Numerical ranks of Φ and Ψ at a tolerance, and their product, the width bound there."""

    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    features: Count
    outputs: Count
    bound: Count


@dataclass(frozen=True)
class Facts:
    """What the moments say of a layer, whichever units stay.

    Attributes:
        dead, duplicates: units that never fire, and that are multiples of an earlier one.
        bound: units that an exact solution needs at most; `bound_text` says it in words.
        grid: ranks at larger tolerances, where an error is allowed.
    """

    dead: Count
    duplicates: Count
    rank_features: Count
    rank_outputs: Count
    bound: Count
    bound_text: str
    spectra: Spectra | None = None
    grid: tuple[Ranks, ...] = ()


@dataclass(frozen=True)
class WidthErrors:
    """What a width was chosen from.

    Attributes:
        curve: relative error on the fitting samples by width; None without a selection.
        tried: relative error on held-back samples of the widths that were tried.
    """

    curve: tuple[Point, ...] | None = None
    tried: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Fit:
    """The refit: relative errors ‖Ψ − Ψ̂‖/‖Ψ − mean Ψ‖, None where the outputs are constant.

    Attributes:
        inherited_error: held-back error with all units, left by earlier layers.
        rows: of Φ on the fitting samples; `sampling` says which.
    """

    error: Real | None
    held_back_error: Real | None
    inherited_error: Real | None
    rows: Count
    sampling: str


@dataclass(frozen=True)
class Certificate:
    """A solution of the multitask lasso with its duality gap; `form` says of which problem."""

    form: str
    penalty: Real
    silencing_penalty: Real | None
    objective: Real
    relative_duality_gap: Real
    active_units: Count
    status: str


@dataclass(frozen=True)
class LayerReport:
    """What was decided about one layer, and from what. `seconds`: by stage. Without units its block was removed."""

    name: str
    units: Count
    kept: Count
    facts: Facts
    widths: WidthErrors
    fit: Fit
    certificate: Certificate | None = None
    seconds: dict[str, Real] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """What is left of it, in words."""
        return f"{self.kept} of {self.units} units kept" if self.kept else f"block removed with all {self.units} units"


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was left as it is, and why."""

    name: str
    units: Count
    reason: str


@dataclass(frozen=True)
class CalibrationFigures:
    """Both networks on the same calibration samples; None for what the outputs or the samples have no figure of.

    Attributes:
        drop: points of accuracy lost; points of disagreement where the samples have no labels.
        error: standard error of `drop`, from the paired samples.
        top1, loss: accuracy and mean cross-entropy in nats.
        distance, outputs: from the original's outputs, of all by weight and of each, in nats or relative squares.
    """

    samples: Count
    drop: Real | None
    error: Real | None
    agreement: Share | None
    top1: Measured | None
    loss: Measured | None
    distance: Real | None = None
    outputs: dict[str, Real] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One network that the search made, and what the held-back samples say of it; damage in nats."""

    predicted_damage: Real
    costs: dict[str, Real]
    refining_sweeps: Count = 0
    held_back: CalibrationFigures | None = None


@dataclass(frozen=True)
class LayerSearch:
    """One layer's width, its predicted damage (nats), the damages measured at some widths, the errors by width."""

    width: Count
    predicted_damage: Real
    measured: tuple[Step, ...]
    error_curve: tuple[Real | None, ...]


@dataclass(frozen=True)
class MapTime:
    """Milliseconds of one linear map by itself: whole, as predicted at its chosen width, and measured at that."""

    name: str
    whole_ms: Real
    predicted_ms: Real
    measured_ms: Real


@dataclass(frozen=True)
class LowRankLayer:
    """A layer in whose place two layers of a low rank stand.

    Attributes:
        kind: what it was, in words.
        tried: damage (nats) at each rank that was measured, in the original network.
        predicted_damage, measured_damage: that at `rank`, and what the rank adds in the cut network; on held-back
            samples.
        macs: of it alone, a sample; milliseconds: of it alone, at the widths that are left.
    """

    name: str
    kind: str
    rank: Count
    tried: tuple[Step, ...]
    predicted_damage: Real
    measured_damage: Real
    macs: Counts
    milliseconds: Measured


@dataclass(frozen=True)
class SearchReport:
    """How the widths were found; `times` where they were chosen under a budget of time.

    Attributes:
        low_rank: layers that became two; `full_rank`: of the others that were in question, name -> why not.
    """

    trials: tuple[Trial, ...]
    predicted_costs: dict[str, Real]
    layers: dict[str, LayerSearch]
    times: tuple[MapTime, ...] = ()
    low_rank: tuple[LowRankLayer, ...] = ()
    full_rank: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationReport:
    """The compressed network on the calibration samples, before any fine-tuning."""

    fitting: CalibrationFigures | None = None
    held_back: CalibrationFigures | None = None

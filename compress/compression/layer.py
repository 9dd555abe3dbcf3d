"""One layer: certificate, ranks, width, units, refit, from its moments alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress.compression.certificates import certificate_report, certify_layer
from compress.compression.refit import held_back_error, refit_layer
from compress.compression.widths import WidthRule, count_to_keep, round_up, smallest_width
from compress.convex import (
    Moments,
    MultitaskLasso,
    SelectionCurve,
    Solution,
    WidthBound,
    polish_units,
    select_units,
    solve,
    solve_exact,
    width_bound,
)
from compress.diagnostics.balance import input_norms
from compress.recording.layer_moments import LayerMoments, count_duplicates, dead_units
from compress.units.groups import UnitGroup

CURVE_POINTS = 200  # of a curve or spectrum, in the report
POLISHABLE = 1024  # columns K·s up to which swaps polish the chosen units


@dataclass(frozen=True)
class LayerOptions:
    """How a layer is solved; the recipe's fields of the same names."""

    solver: str = "newton"
    gap: float = 1e-6
    unit_costs: str = "path"
    selection: str = "best"
    ridge: float = 1e-6
    rank_tolerance: float = 1e-3
    round_to: int = 1
    certify: bool = True


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """What the moments of all units say about a layer, whichever of them stay.

    Attributes:
        dead, duplicates: units that never fire, and that are multiples of an earlier one.
    """

    bound: WidthBound
    dead: int
    duplicates: int

    @classmethod
    def of(cls, joint: Moments, tolerance: float) -> LayerFacts:
        """From the joint moments of all readings; `tolerance` of the numerical ranks."""
        return cls(width_bound(joint, tolerance=tolerance), int(dead_units(joint).sum()), count_duplicates(joint))


@dataclass(frozen=True, eq=False)
class LayerResult:
    """What was decided about one layer.

    Attributes:
        kept: unit numbers that stay, sorted.
        error, held_back_error: relative error after the refit, on fitting and held-back moments.
        floor: held-back error with all units, left by earlier layers.
        weights: state name -> new tensor in the original shape, removed units' columns zero.
        certificate: the lasso's solution, or None where none was asked for; `form` says of which problem.
        seconds: by stage.
        measured: width -> held-back error after the refit, of the widths that were tried.
    """

    name: str
    units: int
    kept: Tensor
    dead: int
    duplicates: int
    bound: WidthBound
    certificate: Solution | None
    form: str
    silencing_penalty: float
    curve: SelectionCurve | None
    error: float
    held_back_error: float
    floor: float
    weights: dict[str, Tensor]
    rows: int
    positions: str
    seconds: dict[str, float] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)

    def as_report(self) -> dict[str, Any]:
        """Plain data for the report."""
        certificate = self.certificate
        return {
            "name": self.name,
            "units": self.units,
            "kept": len(self.kept),
            "dead": self.dead,
            "duplicates": self.duplicates,
            "rank_features": self.bound.rank_features,
            "rank_outputs": self.bound.rank_outputs,
            "bound": self.bound.bound,
            "bound_text": self.bound.message,
            "spectra": {
                "tolerance": self.bound.tolerance,
                "features": thinned(self.bound.feature_spectrum, first=1),
                "outputs": thinned(self.bound.output_spectrum, first=1),
            },
            "curve": None if self.curve is None else thinned(self.curve.errors),
            "held_back_curve": [[width, rounded(error)] for width, error in sorted(self.measured.items())],
            "error": finite(self.error),
            "held_back_error": finite(self.held_back_error),
            "inherited_error": finite(self.floor),
            "rows": self.rows,
            "sampling": self.positions,
            "lasso": None
            if certificate is None
            else certificate_report(certificate, self.form, self.silencing_penalty),
            "seconds": dict(self.seconds),
        }


def finite(value: float) -> float | None:
    """The value, or None: an error has no measure where the outputs are zero on all samples."""
    return value if math.isfinite(value) else None


def rounded(value: float) -> float | None:
    """The value to five significant digits; None where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def thinned(values: Tensor, first: int = 0) -> list[list[float | None]]:
    """Points [place, value] of a curve (n,), at most `CURVE_POINTS` of them, evenly spread; places start at `first`."""
    count = len(values)
    steps = min(count, CURVE_POINTS)
    places = sorted({round(step * (count - 1) / max(1, steps - 1)) for step in range(steps)})
    return [[place + first, rounded(float(values[place]))] for place in places]


def layer_unit_costs(kind: str, moments: LayerMoments, state: Mapping[str, Tensor], joint: Moments) -> Tensor:
    """Unit costs c (K,), scaled to mean 1 and bounded below: "path" ‖w_k‖, "one", or "feature" sqrt(G_kk)."""
    if kind == "one":
        return joint.gram.new_ones(joint.unit_count)
    if kind == "feature":
        costs = joint.gram.diagonal().reshape(-1, joint.group_size).sum(1).clamp_min(0).sqrt()
    else:
        costs = input_norms(moments.group, state)[moments.units].to(joint.gram)
    scale = float(costs.mean())
    return (costs / scale).clamp_min(1e-6) if scale > 0 else torch.ones_like(costs)


def solve_layer(
    moments: LayerMoments,
    rule: WidthRule,
    options: LayerOptions,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    *,
    width: int | None = None,
    chosen: Tensor | None = None,
    facts: LayerFacts | None = None,
) -> LayerResult:
    """Certify, choose a width by `rule` (or take `width`), choose its units, refit the consumers.

    Args:
        original, current: states of the original network and of the one compressed so far.
        chosen: unit numbers to keep; nothing is selected then.
        facts: known from moments of all units; None: found from these.

    Raises:
        SolverError: the convex problem could not be solved at all.
    """
    clock = _Clock()
    group = moments.group
    joint = moments.joint()
    shrunk = moments.for_selection(original)
    costs = layer_unit_costs(options.unit_costs, moments, original, joint)
    facts = LayerFacts.of(joint, options.rank_tolerance) if facts is None else facts
    clock.lap("ranks")
    problem = MultitaskLasso(joint, 0.0, costs)
    silencing = problem.silencing_penalty
    certificate: Solution | None = None
    form = f"penalised at {rule.penalty:g} of the silencing penalty" if rule.penalty is not None else ""
    if rule.penalty is not None and width is None:
        certificate = solve(replace(problem, penalty=rule.penalty * silencing), options.solver, tolerance=options.gap)
        width = max(1, len(certificate.active))
    exact = rule.error == 0 and width is None
    if exact:
        certificate = solve_exact(
            joint, costs, solver=options.solver, tolerance=options.gap, range_tolerance=options.rank_tolerance
        )
        form = f"exact on the numerical range of Φ (relative singular value {options.rank_tolerance:g})"
        width = max(1, len(certificate.active))
    clock.lap("lasso")
    if chosen is not None:
        curve, width = given_units(moments, chosen), len(chosen)
    else:
        curve = select_units(shrunk, method=options.selection, unit_costs=costs, ridge=options.ridge, intercept=False)
    clock.lap("selection")

    measured: dict[int, float] = {}

    def error_at(candidate: int) -> float:
        refitted = refit_layer(moments, curve.units(candidate), options.ridge, original, current)
        measured[candidate] = refitted.held_back_error
        return refitted.held_back_error

    units = len(moments.units)
    floor = error_at(units) if moments.unchanged is None else moments.unchanged[1]
    if width is None and rule.keep is not None:
        width = count_to_keep(rule.keep, group.unit_count)
    elif width is None:
        assert rule.error is not None, "a width rule names one quantity"
        more = units if moments.unchanged is None else units + 1  # one more stands for the layer as it is
        width = smallest_width(error_at, more, rule.error, floor)
    if moments.unchanged is not None and width > units:
        return untouched(moments, facts, silencing, curve, clock.laps)
    if chosen is None:
        width = min(units, legal_width(group, round_up(width, options.round_to, units)))
    kept = curve.units(width) if chosen is not None else legal_units(group, curve, width)
    clock.lap("width")
    if (
        options.selection == "best"
        and chosen is None
        and group.blocks == 1
        and joint.gram.shape[0] <= POLISHABLE
        and width < units
    ):
        kept = polish_units(shrunk, kept, ridge=options.ridge, intercept=False)
        clock.lap("selection")
    final = refit_layer(moments, kept, options.ridge, original, current)
    clock.lap("refit")
    if options.certify and certificate is None:
        certificate, form = certify_layer(
            joint, costs, width, final.error if rule.error is not None else None, solver=options.solver, gap=options.gap
        )
        clock.lap("lasso")
    return LayerResult(
        name=group.name,
        units=group.unit_count,
        kept=moments.units[kept.cpu()],
        dead=facts.dead,
        duplicates=facts.duplicates,
        bound=facts.bound,
        certificate=certificate,
        form=form,
        silencing_penalty=silencing,
        curve=curve,
        error=final.error,
        held_back_error=final.held_back_error,
        floor=floor,
        weights=final.weights,
        rows=moments.rows,
        positions=moments.positions,
        seconds=clock.laps,
        measured=measured,
    )


def adjust_layer(
    moments: LayerMoments,
    kept: Tensor,
    options: LayerOptions,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """New tensors of a consumer whose input has changed and whose units stay; none where held-back samples do not gain.

    Args:
        kept: (m,) unit numbers that are left.
    """
    held = moments.units
    if not len(kept) or not bool(torch.isin(kept, held).all()):  # some were left out for want of memory
        return {}
    kept = torch.searchsorted(held, kept)
    found = refit_layer(moments, kept, options.ridge, original, current)
    before = held_back_error(moments, kept, original, current)
    return found.weights if found.held_back_error < before else {}


def given_units(moments: LayerMoments, chosen: Tensor) -> SelectionCurve:
    """A curve that knows one width: the given units. Raises ValueError for a unit that the moments do not hold."""
    places = {int(unit): place for place, unit in enumerate(moments.units)}
    missing = [int(unit) for unit in chosen if int(unit) not in places]
    if missing:
        raise ValueError(f"`chosen`: units {missing[:5]} are not among the {len(places)} of {moments.group.name}.")
    own = torch.tensor(sorted(places[int(unit)] for unit in chosen), dtype=torch.int64)
    rest = torch.tensor(sorted(set(range(len(places))) - set(own.tolist())), dtype=torch.int64)
    order = torch.cat([own, rest])
    unknown = torch.full((len(order) + 1,), torch.nan, dtype=torch.float64)
    return SelectionCurve(order, unknown, ("given",) * (len(order) + 1), {"given": order})


def untouched(
    moments: LayerMoments, facts: LayerFacts, silencing: float, curve: SelectionCurve, seconds: dict[str, float]
) -> LayerResult:
    """A layer left as it is, because it needs more units than the memory bound lets be weighed against each other."""
    assert moments.unchanged is not None, "only where units were left out of the moments"
    return LayerResult(
        name=moments.group.name,
        units=moments.group.unit_count,
        kept=torch.arange(moments.group.unit_count),
        dead=facts.dead,
        duplicates=facts.duplicates,
        bound=facts.bound,
        certificate=None,
        form="",
        silencing_penalty=silencing,
        curve=curve,
        error=moments.unchanged[0],
        held_back_error=moments.unchanged[1],
        floor=moments.unchanged[1],
        weights={},
        rows=moments.rows,
        positions=f"{moments.positions}; left as it is: a width above that needs more --memory",
        seconds=seconds,
    )


def legal_width(group: UnitGroup, width: int) -> int:
    """The smallest legal width that is at least `width`: equal counts in every block of a grouped layer."""
    blocks = group.blocks
    return min(group.unit_count, -(-width // blocks) * blocks)


def legal_units(group: UnitGroup, curve: SelectionCurve, width: int) -> Tensor:
    """The units (width,) to keep, sorted; in each block of a grouped layer its first ones in the nested order."""
    if group.blocks == 1:
        return curve.units(width)
    size = group.unit_count // group.blocks
    order = curve.order.tolist()
    chosen = [
        unit
        for block in range(group.blocks)
        for unit in [unit for unit in order if unit // size == block][: width // group.blocks]
    ]
    return torch.tensor(sorted(chosen))


class _Clock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now

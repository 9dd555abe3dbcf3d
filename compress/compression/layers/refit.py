"""refit_layer(): new consumer weights and constants for the kept units of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.compression.layers.nested import Errors, NestedRefits, about_the_mean, best_ridge, total_energy
from compress.convex import Moments, relative_error
from compress.convex.refit import relative, solve_ridged
from compress.convex.statistics.moments import unit_columns
from compress.recording.layer_moments import ROWS_PER_COLUMN, LayerMoments, root_mean_square
from compress.recording.readings import Reading, constant_of

STRONGER_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # tried in turn where the given one fits noise
SAFE = 8.0  # times the moments' own rounding, below which no ridge is of use
FEW_RIDGES = (1e-2, 1.0, 100.0)  # where columns are so many that each takes seconds
WIDE = 4096  # columns
AMPLE = 50  # rows for each column, below which a ridge from the middle of them is tried first


@dataclass(frozen=True, eq=False)
class LayerRefit:
    """New consumer tensors for a set of kept units, with their relative errors over all readings.

    Attributes:
        weights: state name -> new tensor in the original shape; removed units' columns are zero.
    """

    weights: dict[str, Tensor]
    error: float
    held_back_error: float


def refit_layer(
    moments: LayerMoments,
    kept: Tensor,
    ridge: float,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    places: Sequence[int] | None = None,
    *,
    settled: bool = False,
) -> LayerRefit:
    """Least-squares output weights of the kept units for every consumer, in the original shapes.

    Args:
        kept: places (|S|,) among `moments.units`.
        ridge: on the change of the weights, relative to each column's second moment.
        original, current: states of the original network and of the one compressed so far.
        places: of the ridge that each reading tries first; None: of the weakest.
        settled: these are the best ones, and no other is tried.
    """
    weights: dict[str, Tensor] = {}
    errors, held = [], []
    kept_units = moments.units[kept.cpu()]
    places = [0] * len(moments.readings) if places is None else places
    for reading, part, check, intercept, start in zip(
        moments.readings, moments.fitting, moments.held_back, moments.intercepts, places, strict=True
    ):
        rows = unit_columns(kept_units.to(part.covariance.device), reading.group_size)
        before = reading.weights(current).to(part.covariance)[rows]
        refit = refit_change(
            part.subset(kept), check.subset(kept), before, ridge, intercept=intercept, start=start, settled=settled
        )
        errors.append(refit.error)
        held.append(refit.held_back_error)
        full = before.new_zeros(reading.columns, part.output_count)
        full[rows] = refit.coefficients
        put_matrix(
            reading,
            weights,
            full,
            refit.intercept if intercept else None,
            current,
            original if moments.targets else current,
        )
    return LayerRefit(weights, root_mean_square(errors), root_mean_square(held))


def put_matrix(
    reading: Reading,
    weights: dict[str, Tensor],
    matrix: Tensor,
    constants: Tensor | None,
    current: Mapping[str, Tensor],
    bases: Mapping[str, Tensor],
) -> None:
    """Write a reading's V into its consumers' tensors, in their original shapes.

    Args:
        weights: state name -> changed tensor; those of the consumers are added, or changed again.
        matrix: V (K·s, D).
        constants: (D,) that are added to the outputs; None where they are not free.
        current: state that weights are taken from; `bases`: that constants are.
    """
    first = 0
    for applied in reading.places:
        consumer = applied[0]
        target = reading.outputs(consumer, current)
        own_outputs = slice(first, first + target.stop - target.start)
        first = own_outputs.stop
        changed = weights.get(consumer.weight, current[consumer.weight])
        weights[consumer.weight] = reading.with_matrix(consumer, changed, matrix[:, own_outputs])
        if constants is None:
            continue
        for name, sign in sorted({constant_of(each) for each in applied}):
            base = weights.get(name, bases[name]).clone()
            base[target] = (base[target].double() + sign * constants[own_outputs]).to(base)
            weights[name] = base


def nested_refits(
    moments: LayerMoments, order: Tensor, ridge: float, current: Mapping[str, Tensor]
) -> list[NestedRefits]:
    """For each reading what a refit to the first units of an order would err.

    Args:
        order: places (K,) among `moments.units`.
        ridge, current: as of `refit_layer`.
    """
    nested = []
    for reading, part, check, intercept in zip(
        moments.readings, moments.fitting, moments.held_back, moments.intercepts, strict=True
    ):
        device = part.covariance.device
        rows = unit_columns(moments.units[order].to(device), reading.group_size)
        before = reading.weights(current).to(part.covariance)[rows]
        columns, wide = unit_columns(order.to(device), reading.group_size), len(rows) > WIDE
        ridges, scarce = ridges_for(part, ridge), is_scarce(part)
        start = len(ridges) // 2 if part.count < AMPLE * len(columns) else 0
        nested.append(NestedRefits(part, check, columns, before, ridges, intercept, scarce, wide, start))
    return nested


def held_back_error(
    moments: LayerMoments, kept: Tensor, original: Mapping[str, Tensor], current: Mapping[str, Tensor]
) -> float:
    """Relative held-back error of the consumers as they are, with the kept units alone."""
    errors = []
    kept_units = moments.units[kept.cpu()]
    for reading, check, intercept in zip(moments.readings, moments.held_back, moments.intercepts, strict=True):
        rows = unit_columns(kept_units.to(check.covariance.device), reading.group_size)
        before = reading.weights(current).to(check.covariance)[rows]
        moved = []
        for consumer in reading.consumers if intercept else ():
            (name, sign), target = constant_of(consumer), reading.outputs(consumer, current)
            moved.append(sign * (current[name][target].double() - original[name][target].double()))
        errors.append(
            reading_error(check.subset(kept), before, torch.cat(moved).to(check.covariance) if moved else None)
        )
    return root_mean_square(errors)


@dataclass(frozen=True, eq=False)
class ReadingRefit:
    """Output weights (|S|·s, D) and constant (D,) of one reading, with their relative errors.

    Attributes:
        place: of the ridge, among `ridges_for`.
    """

    coefficients: Tensor
    intercept: Tensor
    error: float
    held_back_error: float
    place: int


def refit_change(
    part: Moments,
    check: Moments,
    before: Tensor,
    ridge: float,
    *,
    intercept: bool,
    start: int = 0,
    settled: bool = False,
) -> ReadingRefit:
    """min ‖Ψ − Φ(V + Δ) − 1bᵀ‖² + ridge·Σ_i G_ii‖δ_i‖² over Δ and b: the ridge pulls to the weights as they are.

    Where held-back samples err clearly more than those that were fitted, or there are fewer than `ROWS_PER_COLUMN` rows
    for each column, the samples do not determine Δ: stronger ridges are tried as long as the held-back error falls. The
    strongest leaves little but the constant to fit.

    Args:
        part, check: fitting and held-back moments of the kept units alone.
        before: V (|S|·s, D).
        start: place of the ridge that is tried first, among `ridges_for`.
        settled: no other is tried.
    """
    residual = part.residual(before).centred() if intercept else part.residual(before)
    ridges, scarce = ridges_for(part, ridge), is_scarce(part)
    total = total_energy(part, intercept=intercept)
    tried: dict[int, ReadingRefit] = {}

    def errors_at(place: int) -> Errors:
        change, used = solve_ridged(residual, ridges[place])
        constant = residual.intercept(change)
        explained = (change * residual.cross).sum() + used * (residual.gram.diagonal() @ change.square().sum(1))
        error = relative(residual.energy - float(explained), total)
        coefficients = change.add_(before)
        held_back = reading_error(check, coefficients, constant if intercept else None)
        tried[place] = ReadingRefit(coefficients, constant, error, held_back, place)
        for far in [each for each in tried if abs(each - place) > 1]:
            del tried[far]
        return Errors(error, held_back)

    place = min(start, len(ridges) - 1)
    if settled:
        errors_at(place)
    else:
        place = best_ridge(errors_at, len(ridges), place, scarce=scarce)
    best = tried[place]
    return replace(best, error=reading_error(part, best.coefficients, best.intercept if intercept else None))


def ridges_for(part: Moments, ridge: float) -> tuple[float, ...]:
    """The ridges to try, rising from the given one, or from the least that rounding allows."""
    ridge = max(ridge, SAFE * part.rounding)
    wide = part.covariance.shape[0] > WIDE
    strengths = tuple(each for each in (FEW_RIDGES if wide else STRONGER_RIDGES) if each > ridge)
    return strengths if wide and is_scarce(part) and strengths else (ridge, *strengths)


def is_scarce(part: Moments) -> bool:
    """Whether rows are too few for their columns."""
    return part.count < ROWS_PER_COLUMN * part.covariance.shape[0]


def reading_error(moments: Moments, coefficients: Tensor, bias: Tensor | None) -> float:
    """Relative error of V and b; against ‖Ψ‖ itself where no constant is free, or where Ψ is nothing but a constant."""
    spread = about_the_mean(moments, intercept=bias is not None)
    return relative_error(moments, None, coefficients, bias, intercept=spread)

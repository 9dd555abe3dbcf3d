"""Widths of all layers under budgets: the least predicted damage whose costs stay within them.

With a price on each cost the problem separates layer by layer, as every cost is multilinear in the widths: coordinate
descent over the layers, then a search over the one price that meets the budget, then the slack is spent greedily.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.compression.costs import CostModel
from compress.errors import GateError

SWEEPS = 40
PRICE_STEPS = 60


@dataclass(frozen=True, eq=False)
class DamageCurve:
    """Predicted damage of one layer by its width.

    Attributes:
        damage: predicted divergence (nats) with w units kept (K + 1,); never rising in w.
        legal: widths that may be chosen, ascending; all units among them.
        errors: relative reconstruction error by width (K + 1,).
        measured: (width, divergence) pairs that the prediction rests on.
    """

    damage: Tensor
    legal: tuple[int, ...]
    errors: Tensor
    measured: tuple[tuple[int, float], ...] = ()


def damage_curve(errors: Tensor, measured: Sequence[tuple[int, float]], legal: Sequence[int]) -> DamageCurve:
    """Damage by width from the error curve and the divergences measured at a few widths.

    Divergence is taken as a function of the squared relative error: through the measured points, piecewise linear in
    the logarithms; proportional to it below the first point (a small perturbation), with the last slope, at least
    proportional, beyond the last.

    Args:
        errors: relative error by width (K + 1,).
        measured: (width, divergence in nats).
    """
    squares = errors.double().square().clamp_min(1e-12)
    points = sorted({(float(squares[width]), max(value, 1e-9)) for width, value in measured})
    if not points:
        return DamageCurve(_never_rising(squares), tuple(legal), errors, ())
    xs = torch.tensor([math.log(x) for x, _ in points], dtype=torch.float64)
    ys = torch.cummax(torch.tensor([math.log(y) for _, y in points], dtype=torch.float64), 0).values
    position = squares.log()
    right = torch.searchsorted(xs, position).clamp(1, max(1, len(xs) - 1))
    if len(xs) == 1:
        damage = ys[0] + (position - xs[0])
    else:
        slopes = (ys[1:] - ys[:-1]) / (xs[1:] - xs[:-1])
        damage = ys[right - 1] + slopes[right - 1] * (position - xs[right - 1])
        damage = torch.where(position < xs[0], ys[0] + (position - xs[0]), damage)
        beyond = ys[-1] + slopes[-1].clamp_min(1.0) * (position - xs[-1])
        damage = torch.where(position > xs[-1], beyond, damage)
    return DamageCurve(_never_rising(damage.exp()), tuple(legal), errors, tuple(measured))


def _never_rising(values: Tensor) -> Tensor:
    """The largest value at this or any greater width."""
    return torch.cummax(values.flip(0), 0).values.flip(0)


def legal_widths(units: int, blocks: int, round_to: int) -> tuple[int, ...]:
    """Widths from one step up to all units: multiples of the step that suits both rounding and equal blocks."""
    step = math.lcm(blocks, round_to)
    return (*range(step, units, step), units)


@dataclass(frozen=True)
class Allocation:
    """Widths with what they are predicted to cost and to do.

    Attributes:
        widths: group name -> units kept.
        damage: summed predicted divergence, nats.
        costs: cost name -> fraction of the original that stays.
        price: of one unit of relative cost, nats.
    """

    widths: dict[str, int]
    damage: float
    costs: dict[str, float]
    price: float


def allocate(model: CostModel, curves: Mapping[str, DamageCurve], budgets: Mapping[str, float]) -> Allocation:
    """Widths of least predicted damage with every cost at most its budget (a fraction of the original's).

    Args:
        budgets: "macs", "params" and/or "latency" -> fraction.

    Raises:
        GateError: even the smallest legal widths exceed a budget; the message gives the best that can be had.
    """
    smallest = {name: curve.legal[0] for name, curve in curves.items()}
    floor = relative_costs(model, smallest)
    short = [name for name, limit in budgets.items() if floor[name] > limit]
    if short:
        best = ", ".join(f"{name} {floor[name]:.3f}" for name in short)
        asked = ", ".join(f"{name} {budgets[name]:g}" for name in short)
        raise GateError(f"The budget cannot be met: {asked} was asked for, {best} is the least the layers allow.")
    weights = dict.fromkeys(budgets, 1.0)
    best_found: Allocation | None = None
    for _ in range(8 if len(budgets) > 1 else 1):
        found = _search_price(model, curves, budgets, weights)
        if best_found is None or found.damage < best_found.damage:
            best_found = found
        for name, limit in budgets.items():  # the tighter budget gets the larger share of the price
            weights[name] *= (found.costs[name] / limit) ** 4
    assert best_found is not None, "there is at least one budget"
    return best_found


def _search_price(
    model: CostModel, curves: Mapping[str, DamageCurve], budgets: Mapping[str, float], weights: Mapping[str, float]
) -> Allocation:
    def fits(costs: Mapping[str, float]) -> bool:
        return all(costs[name] <= limit + 1e-12 for name, limit in budgets.items())

    low, high = 1e-12, 1e12
    widths = {name: curve.legal[0] for name, curve in curves.items()}
    for _ in range(PRICE_STEPS):
        price = math.sqrt(low * high)
        candidate = priced_widths(model, curves, {name: price * weight for name, weight in weights.items()})
        if fits(relative_costs(model, candidate)):
            widths, high = candidate, price
        else:
            low = price
    return spend_slack(model, curves, budgets, widths, high)


def priced_widths(model: CostModel, curves: Mapping[str, DamageCurve], prices: Mapping[str, float]) -> dict[str, int]:
    """Widths that minimise damage + Σ price·relative cost, by coordinate descent from all units.

    Args:
        prices: cost name -> nats for the whole original cost.
    """
    whole = {name: curve.legal[-1] for name, curve in curves.items()}
    totals = {cost: model.total(cost, whole) for cost in prices}
    widths = dict(whole)
    for _ in range(SWEEPS):
        before = dict(widths)
        for name, curve in curves.items():
            legal = torch.tensor(curve.legal)
            paid = torch.zeros(len(legal), dtype=torch.float64)
            for cost, price in prices.items():
                paid += price / totals[cost] * model.profile(cost, widths, name, curve.legal)
            widths[name] = int(legal[(curve.damage[legal] + paid).argmin()])
        if widths == before:
            break
    return widths


def spend_slack(
    model: CostModel,
    curves: Mapping[str, DamageCurve],
    budgets: Mapping[str, float],
    widths: Mapping[str, int],
    price: float,
) -> Allocation:
    """Widen layers while the budgets allow it, each time where damage falls most per relative cost."""
    current = dict(widths)
    costs = relative_costs(model, current)
    while True:
        best, best_rate = None, 0.0
        for name, curve in curves.items():
            place = curve.legal.index(current[name])
            if place + 1 == len(curve.legal):
                continue
            wider = {**current, name: curve.legal[place + 1]}
            found = relative_costs(model, wider)
            if any(found[cost] > limit for cost, limit in budgets.items()):
                continue
            saved = float(curve.damage[current[name]] - curve.damage[wider[name]])
            spent = max(sum(found[cost] - costs[cost] for cost in budgets), 1e-12)
            if saved / spent > best_rate:
                best, best_rate = wider, saved / spent
        if best is None:
            break
        current, costs = best, relative_costs(model, best)
    damage = sum(float(curve.damage[current[name]]) for name, curve in curves.items())
    return Allocation(current, damage, costs, price)


def relative_costs(model: CostModel, widths: Mapping[str, int]) -> dict[str, float]:
    """Every cost as a fraction of the original's."""
    return {cost: model.total(cost, widths) / model.original(cost) for cost in model.costs}

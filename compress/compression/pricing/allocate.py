"""Widths of all layers under budgets: the least predicted damage whose costs stay within them.

With a price on each cost the problem separates layer by layer, as every cost is multilinear in the widths: coordinate
descent over the layers and over the blocks that may go as a whole, then a search over the one price that meets the
budget, then the slack is spent greedily.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from compress.compression.pricing.costs import CostModel
from compress.errors import GateError

SWEEPS = 40
CLEARLY = 0.95  # of the predicted damage, below which a block is worth keeping: it costs more than is counted
PRICE_STEPS = 40
MOST_RETURNS = 6  # blocks that go and are tried to be kept, those of most damage first
OUT_OF_REACH = "The budget cannot be met:"  # begins what says so
FLAT = 1e-9  # nats that a layer's squared relative error is worth where no damage is predicted to fall


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

    @cached_property
    def choices(self) -> tuple[Tensor, Tensor]:
        """The legal widths (L,) and the damage (L,) at each."""
        legal = torch.tensor(self.legal)
        return legal, self.damage[legal]


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
        widths: group name -> units kept; and weight's name -> rank, 0 for none, of those that may have a low one.
        damage: summed predicted divergence, nats.
        costs: cost name -> fraction of the original that stays.
        price: of one unit of relative cost, nats.
    """

    widths: dict[str, int]
    damage: float
    costs: dict[str, float]
    price: float


@dataclass(frozen=True)
class Removal:
    """A block that may go as a whole: no unit of its groups stays then.

    Attributes:
        damage: measured divergence (nats) without it, its constant refitted and nothing else.
    """

    groups: tuple[str, ...]
    damage: float


@dataclass(frozen=True)
class Lowering:
    """A weight that may be given a low rank, at one of a few ranks.

    Attributes:
        ranks: descending; all of them save time.
        damages: measured divergence (nats) at each, nothing else refitted.
        shares: time of two layers of each rank, as a fraction of the layer's own.
    """

    weight: str
    ranks: tuple[int, ...]
    damages: tuple[float, ...]
    shares: tuple[float, ...]

    def damage(self, rank: int) -> float:
        """Predicted divergence (nats): never less at a smaller rank; none without one."""
        return max(self.damages[: self.ranks.index(rank) + 1]) if rank else 0.0

    def wider(self, rank: int) -> tuple[int, ...]:
        """The next larger rank, and the whole weight; nothing above that."""
        larger = self.ranks[: self.ranks.index(rank)] if rank else ()
        return tuple(dict.fromkeys([*larger[-1:], 0])) if rank else ()

    def without(self, rank: int) -> Lowering:
        """The same but for one rank."""
        left = [place for place, each in enumerate(self.ranks) if each != rank]
        fields = (self.ranks, self.damages, self.shares)
        return Lowering(self.weight, *(tuple(values[place] for place in left) for values in fields))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Choices:
    """What may be chosen: widths of layers, blocks that may go, weights of a low rank, and what they cost.

    Attributes:
        refused: why other layers may not have a low rank, in words.
    """

    model: CostModel
    curves: Mapping[str, DamageCurve]
    removals: tuple[Removal, ...] = ()
    lowerings: tuple[Lowering, ...] = ()
    refused: str = ""

    def narrowest(self) -> dict[str, int]:
        """The smallest widths and ranks, without every block that may go."""
        gone = {name: 0 for removal in self.removals for name in removal.groups}
        lowest = {lowering.weight: lowering.ranks[-1] for lowering in self.lowerings}
        return {**{name: curve.legal[0] for name, curve in self.curves.items()}, **lowest, **gone}

    def damage(self, widths: Mapping[str, int]) -> float:
        """Summed predicted divergence (nats)."""
        gone = [removal for removal in self.removals if is_gone(removal, widths)]
        inside = {name for removal in gone for name in removal.groups}
        damages = (float(curve.damage[widths[name]]) for name, curve in self.curves.items() if name not in inside)
        ranks = self.model.ranks(widths)
        lowered = (each.damage(ranks.get(each.weight, 0)) for each in self.lowerings)
        return sum(damages) + sum(removal.damage for removal in gone) + sum(lowered)


def is_gone(removal: Removal, widths: Mapping[str, int]) -> bool:
    """Whether no unit of the block's stays."""
    return all(widths[name] == 0 for name in removal.groups)


def allocate(choices: Choices, budgets: Mapping[str, float]) -> Allocation:
    """Widths of least predicted damage with every cost at most its budget (a fraction of the original's).

    A block goes where that does less damage than narrowing its layers and the others; each block that goes is given
    back in turn, and stays where the widths found without that choice do clearly less.

    Args:
        budgets: "macs", "params" and/or "latency" -> fraction.

    Raises:
        GateError: even the smallest legal widths exceed a budget; the message gives the best that can be had.
    """
    floor = relative_costs(choices.model, choices.narrowest())
    short = [name for name, limit in budgets.items() if floor[name] > limit]
    if short:
        best = ", ".join(f"{name} {floor[name]:.3f}" for name in short)
        asked = ", ".join(f"{name} {budgets[name]:g}" for name in short)
        raise GateError(
            f"{OUT_OF_REACH} {asked} was asked for, {best} is the least the layers allow; "
            "allow more, or see by `compress inspect` what is skipped and why."
            + (f" Of no low rank can be: {choices.refused}." if choices.refused else "")
        )
    allocation = search_prices(choices, budgets)
    waiting = list(choices.removals)
    for _ in range(MOST_RETURNS):
        gone = [removal for removal in waiting if is_gone(removal, allocation.widths)]
        if not gone:
            break
        back = max(gone, key=lambda removal: removal.damage)
        waiting.remove(back)
        fewer = replace(choices, removals=tuple(each for each in choices.removals if each is not back))
        alternative = search_prices(fewer, budgets)
        if within(alternative.costs, budgets) and alternative.damage < CLEARLY * allocation.damage:
            choices, allocation = fewer, alternative
            waiting = [removal for removal in waiting if removal in choices.removals]
    return allocation


def within(costs: Mapping[str, float], budgets: Mapping[str, float]) -> bool:
    """Whether every cost is at most its budget."""
    return all(costs[name] <= limit + 1e-12 for name, limit in budgets.items())


def search_prices(choices: Choices, budgets: Mapping[str, float]) -> Allocation:
    """The least predicted damage found under several ratios of the prices; without any within the budgets the least."""
    weights = dict.fromkeys(budgets, 1.0)
    best_found: Allocation | None = None
    for _ in range(8 if len(budgets) > 1 else 1):
        allocation = _search_price(choices, budgets, weights)
        if best_found is None or allocation.damage < best_found.damage:
            best_found = allocation
        for name, limit in budgets.items():  # the tighter budget gets the larger share of the price
            weights[name] *= (allocation.costs[name] / limit) ** 4
    assert best_found is not None, "there is at least one budget"
    return best_found


def _search_price(choices: Choices, budgets: Mapping[str, float], weights: Mapping[str, float]) -> Allocation:
    low, high = 1e-12, 1e12
    widths = choices.narrowest()
    for _ in range(PRICE_STEPS):
        price = math.sqrt(low * high)
        candidate = priced_widths(choices, {name: price * weight for name, weight in weights.items()})
        if within(relative_costs(choices.model, candidate, budgets), budgets):
            widths, high = candidate, price
        else:
            low = price
    return spend_slack(choices, budgets, widths, high)


def priced_widths(choices: Choices, prices: Mapping[str, float]) -> dict[str, int]:
    """Widths that minimise damage + Σ price·relative cost, by coordinate descent from all units.

    Each layer's width is a coordinate, and so is whether a block stays, at the widths that its layers would have.

    Args:
        prices: cost name -> nats for the whole original cost.
    """
    model, curves = choices.model, choices.curves
    whole = {
        **{name: curve.legal[-1] for name, curve in curves.items()},
        **{lowering.weight: 0 for lowering in choices.lowerings},
    }
    scaled = {cost: price / model.total(cost, whole) for cost, price in prices.items()}
    block_of = {name: removal for removal in choices.removals for name in removal.groups}
    staying = dict(whole)  # widths of all layers, those of blocks that go as they would be
    widths = dict(whole)
    for _ in range(SWEEPS):
        before = dict(widths)
        for name, curve in curves.items():
            removal = block_of.get(name)
            around = {**widths, **({} if removal is None else {each: staying[each] for each in removal.groups})}
            legal, damage = curve.choices
            paid = torch.zeros(len(legal), dtype=torch.float64)
            for cost, price in scaled.items():
                paid += price * model.profile(cost, around, name, legal)
            staying[name] = int(legal[(damage + paid).argmin()])
            if removal is None or widths[name]:
                widths[name] = staying[name]
        for removal in choices.removals:
            around = {**widths, **{name: staying[name] for name in removal.groups}}
            saved = sum(price * saved_cost(model, cost, around, removal.groups) for cost, price in scaled.items())
            narrowed = sum(float(curves[name].damage[staying[name]]) for name in removal.groups)
            goes = removal.damage - narrowed < saved
            widths.update({name: 0 if goes else staying[name] for name in removal.groups})
        for lowering in choices.lowerings:
            widths[lowering.weight] = priced_rank(model, lowering, widths, scaled)
        if widths == before:
            break
    return widths


def priced_rank(model: CostModel, lowering: Lowering, widths: Mapping[str, int], prices: Mapping[str, float]) -> int:
    """The rank of one weight that minimises damage + Σ price·cost while all widths stay; 0: none.

    Args:
        prices: cost name -> nats for a unit of it.
    """

    def paid(rank: int) -> float:
        costs = (price * model.of_weight(cost, widths, lowering.weight, rank) for cost, price in prices.items())
        return lowering.damage(rank) + sum(costs)

    return min((0, *lowering.ranks), key=paid)


def saved_cost(model: CostModel, cost: str, widths: Mapping[str, int], groups: Sequence[str]) -> float:
    """What is saved of one cost when these groups lose the units that they have left."""
    saved, current = 0.0, dict(widths)
    for name in groups:
        without, with_units = model.profile(cost, current, name, torch.tensor([0, current[name]])).tolist()
        saved += with_units - without
        current[name] = 0
    return saved


def spend_slack(choices: Choices, budgets: Mapping[str, float], widths: Mapping[str, int], price: float) -> Allocation:
    """Widen layers while the budgets allow it, each time where damage falls most per relative cost.

    Where the damage is flat (at some width no more was measured than at a smaller one) the next width that lowers it
    counts too, and of widths that lower no damage those that lower the layer's own error most. Ranks rise likewise.
    """
    model = choices.model
    current = dict(widths)
    costs = relative_costs(model, current, budgets)
    while True:
        best, best_rate = None, 0.0
        for name, width, saved in widenings(choices, current):
            wider = {**current, name: width}
            wider_costs = relative_costs(model, wider, budgets)
            if any(wider_costs[cost] > limit for cost, limit in budgets.items()):
                continue
            spent = max(sum(wider_costs[cost] - costs[cost] for cost in budgets), 1e-12)
            if saved / spent > best_rate:
                best, best_rate = wider, saved / spent
        if best is None:
            break
        current, costs = best, relative_costs(model, best, budgets)
    return Allocation(current, choices.damage(current), relative_costs(model, current), price)


def widenings(choices: Choices, current: Mapping[str, int]) -> Iterator[tuple[str, int, float]]:
    """Wider layers and larger ranks, one step from the present ones: name, width or rank, and the damage it saves."""
    for name, curve in choices.curves.items():
        for width in wider_widths(curve, current[name]) if current[name] else ():
            narrow_error, wide_error = (float(curve.errors[at]) ** 2 for at in (current[name], width))
            saved = float(curve.damage[current[name]] - curve.damage[width])
            yield name, width, saved + FLAT * max(0.0, narrow_error - wide_error)
    for lowering in choices.lowerings:
        rank = current.get(lowering.weight, 0)
        for larger in lowering.wider(rank):
            yield lowering.weight, larger, lowering.damage(rank) - lowering.damage(larger) + FLAT


def wider_widths(curve: DamageCurve, width: int) -> list[int]:
    """The next legal width, and the next one at which less damage is predicted."""
    wider = curve.legal[curve.legal.index(width) + 1 :]
    lower = next((each for each in wider if float(curve.damage[each]) < float(curve.damage[width])), None)
    return list(dict.fromkeys([*wider[:1], *([] if lower is None else [lower])]))


def relative_costs(model: CostModel, widths: Mapping[str, int], names: Iterable[str] | None = None) -> dict[str, float]:
    """Costs, all or those of the given names, as fractions of the original's."""
    wanted = model.costs if names is None else names
    return {cost: model.total(cost, widths) / model.original(cost) for cost in wanted}

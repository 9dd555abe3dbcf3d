"""Which units to keep: nested orders with their whole error curve, for a width or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, unit_norms
from compress.convex.path import penalty_grid, solve_path
from compress.convex.refit import RIDGE, normal_equations
from compress.convex.selecting.elimination import Factorised, backward_order, forward_order
from compress.convex.selecting.swaps import Polisher
from compress.convex.solve import solve
from compress.convex.statistics.eigen import eigen_decomposition
from compress.convex.statistics.factored import FactoredMoments
from compress.convex.statistics.moments import Moments


@dataclass(frozen=True, eq=False)
class SelectionCurve:
    """Relative refit error by width, and the units that reach it.

    Attributes:
        order: a nested order (K,): its first m units are a good choice for every m.
        errors: smallest relative error (K + 1,) reached with m units; never rising.
        methods: the method (K + 1,) that reaches it.
        orders: nested order of every method that ran.
        polished: units of the widths that were improved by swaps.
    """

    order: Tensor
    errors: Tensor
    methods: tuple[str, ...]
    orders: Mapping[str, Tensor]
    polished: Mapping[int, Tensor] = field(default_factory=dict)

    def units(self, width: int) -> Tensor:
        """The `width` units (width,) to keep, sorted."""
        if not 0 <= width < len(self.methods):
            raise ValueError(f"`width` must be between 0 and {len(self.methods) - 1}, got {width}.")
        if width in self.polished:
            return self.polished[width]
        return self.orders[self.methods[width]][:width].sort().values

    def width_for(self, error: float) -> int:
        """The smallest width whose relative error is at most `error`; all units if there is none."""
        fits = (self.errors <= error).nonzero()
        return int(fits[0]) if fits.numel() else len(self.methods) - 1


def lasso_order(
    moments: Moments,
    unit_costs: Tensor | None = None,
    *,
    ridge: float = RIDGE,
    intercept: bool = True,
    count: int = 40,
    smallest: float = 1e-4,
    reweightings: int = 0,
) -> Tensor:
    """Units (K,) in the order in which they enter the lasso path as λ falls; the last ones by their correlation.

    Args:
        reweightings: solve again so many times at every λ with costs c_k/(‖v_k‖/max‖v‖ + 0.01), the adaptive lasso.
    """
    fitted = moments.centred() if intercept else moments
    grid = penalty_grid(fitted, count, smallest, unit_costs)
    entered = torch.full((moments.unit_count,), float(count), dtype=torch.float64)
    strength = torch.zeros_like(entered)
    scale = fitted.gram.diagonal().reshape(-1, fitted.group_size).mean(1).clamp_min(0).sqrt()
    start: Tensor | None = None
    if reweightings == 0:
        solutions = solve_path(fitted, grid, unit_costs, tolerance=1e-5)
        supports = [solution.coefficients for solution in solutions]
    else:
        supports = []
        for penalty in grid:
            costs = MultitaskLasso(fitted, penalty, unit_costs).costs
            for _ in range(reweightings + 1):
                solution = solve(MultitaskLasso(fitted, penalty, costs), tolerance=1e-4, start=start)
                start = solution.coefficients
                norms = unit_norms(start, fitted.group_size) * scale
                if float(norms.max()) <= 0:
                    break
                base = MultitaskLasso(fitted, penalty, unit_costs).costs
                costs = base / (norms / norms.max() + 0.01)
            supports.append(solution.coefficients)
    for position, coefficients in enumerate(supports):
        norms = unit_norms(coefficients, fitted.group_size) * scale
        new = (norms > 0) & (entered == count)
        entered[new.cpu()] = position
        strength = torch.where(new.cpu(), norms.cpu(), strength)
    equations = normal_equations(moments, ridge=ridge, intercept=intercept)
    strength = torch.where(entered == count, unit_norms(equations.cross, fitted.group_size).cpu() * 1e-9, strength)
    by_strength = strength.argsort(descending=True, stable=True)
    return by_strength[entered[by_strength].argsort(stable=True)]


def magnitude_order(moments: Moments, *, intercept: bool = True) -> Tensor:
    """Units (K,) by their share of the features' energy, largest first: the baseline, not a recommendation."""
    fitted = moments.centred() if intercept else moments
    return fitted.gram.diagonal().reshape(-1, fitted.group_size).sum(1).argsort(descending=True, stable=True).cpu()


def pivoted_order(moments: Moments, *, intercept: bool = True) -> Tensor:
    """Units (K,) by pivoted QR of Φ (interpolative decomposition): each the farthest from the span of those before."""
    fitted = moments.centred() if intercept else moments
    s = fitted.group_size
    residual = fitted.gram.clone()
    order: list[int] = []
    left = torch.ones(fitted.unit_count, dtype=torch.bool)
    for _ in range(fitted.unit_count):
        energies = residual.diagonal().reshape(-1, s).sum(1).clone()
        energies[~left] = -1.0
        unit = int(energies.argmax())
        left[unit] = False
        order.append(unit)
        rows = slice(unit * s, unit * s + s)
        values, vectors = eigen_decomposition(residual[rows, rows])
        kept = values > 1e-12 * max(float(values[-1]), 1e-300)
        if bool(kept.any()) and float(values[-1]) > 0:
            half = residual[:, rows] @ (vectors[:, kept] / values[kept].sqrt())
            residual.addmm_(half, half.T, alpha=-1)
    return torch.tensor(order)


def _adaptive(moments: Moments, unit_costs: Tensor | None, ridge: float, intercept: bool) -> Tensor:
    return lasso_order(moments, unit_costs, ridge=ridge, intercept=intercept, count=30, reweightings=4)


METHODS: dict[str, Callable[[Moments, Tensor | None, float, bool], Tensor]] = {
    "backward": lambda moments, costs, ridge, intercept: backward_order(moments, ridge=ridge, intercept=intercept),
    "forward": lambda moments, costs, ridge, intercept: forward_order(moments, ridge=ridge, intercept=intercept),
    "lasso": lambda moments, costs, ridge, intercept: lasso_order(moments, costs, ridge=ridge, intercept=intercept),
    "adaptive": _adaptive,
    "pivoted": lambda moments, costs, ridge, intercept: pivoted_order(moments, intercept=intercept),
    "magnitude": lambda moments, costs, ridge, intercept: magnitude_order(moments, intercept=intercept),
}
"""Every single method, each a nested order."""

_BEST = ("backward", "forward")
_SHAKEN = 1024  # columns K·s up to which polishing goes on from shaken selections
_WIDE = 2560  # columns from which on it starts from the better order alone


def select_units(
    moments: Moments | FactoredMoments,
    *,
    method: str = "best",
    unit_costs: Tensor | None = None,
    widths: Sequence[int] | None = None,
    errors: Sequence[float] | None = None,
    ridge: float = RIDGE,
    intercept: bool = True,
) -> SelectionCurve:
    """The whole curve error(width), from one run.

    Args:
        method: one of `METHODS`, or "best": at every width the better of backward elimination and forward
            selection, with the widths asked for polished by swaps from both; see `polish_units`.
        unit_costs: c (K,) of the lasso-based methods; default 1.
        widths: widths to polish ("best" only).
        errors: relative errors: for each the smallest width that polishing can bring to it is sought ("best" only).
        ridge: relative ridge of every error; its own cost is counted in, so errors are upper bounds.
    """
    for width in () if widths is None else widths:
        if not 0 <= width <= moments.unit_count:
            raise ValueError(f"`widths` must lie between 0 and {moments.unit_count}, got {width}.")
    if isinstance(errors, float):
        raise ValueError(f"`errors` must be a sequence of relative errors, got {errors}.")
    if isinstance(moments, FactoredMoments):
        kept = moments.shortlist()
        inner = select_units(
            moments.subset(kept),
            method=method,
            unit_costs=None if unit_costs is None else unit_costs[kept],
            widths=widths,
            errors=errors,
            ridge=ridge,
            intercept=intercept,
        )
        return _spread(inner, kept, moments.unit_count)
    if method != "best" and method not in METHODS:
        raise ValueError(f"`method` must be one of best, {', '.join(METHODS)}, got {method!r}.")
    moments, unit_costs = moments.on_processor(), None if unit_costs is None else unit_costs.cpu()
    names = _BEST if method == "best" else (method,)
    factorised = Factorised.of(moments, ridge=ridge, intercept=intercept)
    orders, curves = {}, {}
    for name in names:
        if name == "forward":
            orders[name], curves[name] = factorised.forward()
            continue
        order = factorised.backward() if name == "backward" else METHODS[name](moments, unit_costs, ridge, intercept)
        orders[name], curves[name] = order, factorised.errors(order)
    table = torch.stack([curves[name] for name in names])  # (methods, K + 1)
    values, winners = table.min(0)
    methods = tuple(names[int(i)] for i in winners)
    curve = SelectionCurve(orders[names[0]], values.cummin(0).values, methods, orders)
    if method == "best" and (widths or errors):
        curve = _polished(curve, Polisher(factorised), widths or (), errors or ())
    return curve


def _polished(
    curve: SelectionCurve, polisher: Polisher, widths: Sequence[int], errors: Sequence[float]
) -> SelectionCurve:
    improved: dict[int, tuple[Tensor, float]] = {}
    count = polisher.unit_count
    columns = polisher.equations.gram.shape[0]
    small, wide = columns <= _SHAKEN, columns > _WIDE

    def improve(width: int, effort: float) -> float:
        if not 0 < width < count:
            return float(curve.errors[width])
        starts = [order[:width] for order in curve.orders.values()]
        if wide:
            starts = [curve.units(width)]
        starts += [improved[width][0]] if width in improved else []
        starts += [polisher.without_cheapest(improved[width + 1][0])] if width + 1 in improved else []
        improved[width] = polisher.polish(starts, effort=effort if small else 0.0)
        return improved[width][1]

    for width in widths:
        improve(width, 1.0)
    for error in errors:
        width = curve.width_for(error)
        step = max(1, width // 30)
        while step >= 1 and width > 0:  # the last steps are worth more work
            if width - step > 0 and improve(width - step, 1.0 if step == 1 else 0.1) <= error:
                width -= step
            else:
                step = step // 2 if small else 0
    polished, values, methods = {}, curve.errors.clone(), list(curve.methods)
    for width, (units, error) in improved.items():
        if error < float(values[width]):
            polished[width], values[width], methods[width] = units, error, "swaps"
    for width in range(1, count):  # a polished selection and one unit more is no worse than itself
        if width - 1 in polished and float(values[width]) > float(values[width - 1]):
            smaller = polished[width - 1]
            extra = next(unit for unit in curve.order.tolist() if unit not in set(smaller.tolist()))
            polished[width] = torch.cat([smaller, torch.tensor([extra])]).sort().values
            values[width], methods[width] = values[width - 1], "swaps"
    return SelectionCurve(curve.order, values, tuple(methods), curve.orders, polished)


def _spread(inner: SelectionCurve, kept: Tensor, count: int) -> SelectionCurve:
    """A curve over the shortlisted units as one over all `count`; the others come last and change no error."""
    listed = set(kept.tolist())
    unlisted = torch.tensor([k for k in range(count) if k not in listed], dtype=torch.long)

    def whole(order: Tensor) -> Tensor:
        return torch.cat([kept[order], unlisted])

    extra = count - kept.numel()
    return SelectionCurve(
        order=whole(inner.order),
        errors=torch.cat([inner.errors, inner.errors[-1:].expand(extra)]),
        methods=inner.methods + (inner.methods[-1],) * extra,
        orders={name: whole(order) for name, order in inner.orders.items()},
        polished={width: kept[units].sort().values for width, units in inner.polished.items()},
    )

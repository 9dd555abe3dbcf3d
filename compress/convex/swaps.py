"""Swap polishing: exchange units of a selection while the refit's error falls."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.convex.elimination import reduced_outputs
from compress.convex.moments import Moments, unit_columns
from compress.convex.refit import RIDGE, NormalEquations, factored, normal_equations

_RELATIVE_GAIN = 1e-9  # of the output energy: smaller improvements are left alone


def polish_units(
    moments: Moments,
    units: Tensor,
    *,
    ridge: float = RIDGE,
    intercept: bool = True,
    max_pivots: int | None = None,
) -> Tensor:
    """As many units (|S|,) as given, sorted, with a refit error that is at most theirs.

    Oscillating search: q units that lower the error most come in, the q that cost least go out (and the other way
    round), q = 1, 2, 4, …; an exchange that lowers the error is kept. Every step is exact on the moments: one block
    sweep of the tableau [G H], O((K·s)²·s).

    Args:
        max_pivots: sweeps allowed; default 5·10⁸/(K·s)², between 24 and 2000.
    """
    polisher = Polisher(moments, ridge=ridge, intercept=intercept)
    return polisher.polish(units, max_pivots=max_pivots)[0]


class Polisher:
    """The normal equations of one problem, ready to polish selections of any width."""

    def __init__(self, moments: Moments, *, ridge: float = RIDGE, intercept: bool = True) -> None:
        equations = normal_equations(moments, ridge=ridge, intercept=intercept)
        factor, used = factored(equations)
        if used > equations.ridge:
            equations.gram.diagonal().add_(used - equations.ridge)
        self.equations = equations
        self.targets = reduced_outputs(equations, factor)

    def error(self, units: Tensor) -> float:
        """Relative error of the refit on these units (ridge counted in)."""
        return _relative(self.equations, _Tableau(self.equations, self.targets, units).explained)

    def without_cheapest(self, units: Tensor) -> Tensor:
        """These units without the one whose removal raises the error least."""
        tableau = _Tableau(self.equations, self.targets, units)
        tableau.pivot(adding=False)
        return tableau.kept()

    def polish(self, units: Tensor, *, max_pivots: int | None = None) -> tuple[Tensor, float]:
        """The polished units, sorted, and their relative error."""
        equations = self.equations
        n = equations.gram.shape[0]
        count = n // equations.group_size
        budget = max(24, min(2000, int(5e8 / max(1, n) ** 2))) if max_pivots is None else max_pivots
        units = torch.unique(units).to(equations.gram.device)
        tableau = _Tableau(equations, self.targets, units)
        width = units.numel()
        best, best_explained = tableau.kept(), tableau.explained
        step, spent = 1, 0
        least = _RELATIVE_GAIN * max(equations.energy, 1e-300)
        while 0 < width < count and spent < budget and step <= min(16, width, count - width):
            improved = False
            for out_first in (False, True):
                for phase in range(2):
                    for _ in range(step):
                        tableau.pivot(adding=(phase == 1) == out_first)
                        spent += 1
                if tableau.explained > best_explained + least:
                    best, best_explained, improved = tableau.kept(), tableau.explained, True
                    break
                tableau = tableau if tableau.same(best) else _Tableau(equations, self.targets, best)
            step = 1 if improved else 2 * step
            if tableau.pivots > 200:
                tableau = _Tableau(equations, self.targets, best)  # drop the rounding of many sweeps
                best_explained = tableau.explained
        final = _Tableau(equations, self.targets, best)
        start = _Tableau(equations, self.targets, units)
        if final.explained < start.explained:
            best, final = units, start
        return best.sort().values, _relative(equations, final.explained)


def _relative(equations: NormalEquations, explained: float) -> float:
    if equations.energy <= 0:
        return 0.0
    return float(max(0.0, 1 - explained / equations.energy) ** 0.5)


class _Tableau:
    """[G H] swept on the units kept: −P and coefficients inside, Schur complement and residual correlation outside."""

    def __init__(self, equations: NormalEquations, targets: Tensor, units: Tensor) -> None:
        s = equations.group_size
        n = equations.gram.shape[0]
        self.s = s
        self.inside = torch.zeros(n // s, dtype=torch.bool, device=targets.device)
        self.inside[units] = True
        self.pivots = 0
        inside = unit_columns(self.inside.nonzero()[:, 0], s)
        outside = unit_columns((~self.inside).nonzero()[:, 0], s)
        gram = equations.gram
        self.table, self.weights = gram.clone(), targets.clone()
        self.explained = 0.0
        if inside.numel():
            factor = torch.linalg.cholesky(gram[inside[:, None], inside])
            inverse = torch.cholesky_inverse(factor)
            whitened = torch.linalg.solve_triangular(factor, targets[inside], upper=False)
            self.explained = float(whitened.square().sum())
            bridge = inverse @ gram[inside[:, None], outside]  # (|S|s, rest)
            self.table[inside[:, None], inside] = -inverse
            self.table[inside[:, None], outside] = bridge
            self.table[outside[:, None], inside] = bridge.T
            self.table[outside[:, None], outside] -= gram[outside[:, None], inside] @ bridge
            coefficients = inverse @ targets[inside]
            self.weights[outside] -= gram[outside[:, None], inside] @ coefficients
            self.weights[inside] = coefficients

    def kept(self) -> Tensor:
        return self.inside.nonzero()[:, 0]

    def same(self, units: Tensor) -> bool:
        return int(self.inside.sum()) == units.numel() and bool(self.inside[units].all())

    def pivot(self, *, adding: bool) -> None:
        """Bring in the unit that explains most, or drop the one that explains least."""
        s = self.s
        k = self.inside.shape[0]
        blocks = self.table.reshape(k, s, k, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        blocks = torch.where(self.inside[:, None, None], -blocks, blocks)
        own = self.weights.reshape(k, s, -1)
        if s == 1:
            scores = own.square().sum((1, 2)) / blocks[:, 0, 0].clamp_min(1e-300)
        else:
            factor = torch.linalg.cholesky_ex(blocks)[0]
            scores = torch.linalg.solve_triangular(factor, own, upper=False).square().sum((1, 2))
            scores = torch.nan_to_num(scores, nan=0.0)
        if adding:
            unit = int(torch.where(self.inside, -1.0, scores).argmax())
        else:
            unit = int(torch.where(self.inside, scores, torch.inf).argmin())
        self._sweep(unit)
        self.explained += float(scores[unit]) if adding else -float(scores[unit])

    def _sweep(self, unit: int) -> None:
        s = self.s
        rows = slice(unit * s, unit * s + s)
        sign = -1.0 if bool(self.inside[unit]) else 1.0
        block = self.table[rows, rows].clone()
        column = self.table[:, rows].clone()  # (n, s)
        inverse = torch.linalg.inv(block)
        scaled = column @ inverse
        own = self.weights[rows].clone()
        self.table.addmm_(scaled, column.T, alpha=-1)
        self.weights.addmm_(scaled, own, alpha=-1)
        self.table[:, rows] = sign * scaled
        self.table[rows, :] = sign * scaled.T
        self.table[rows, rows] = -(inverse + inverse.T) / 2
        self.weights[rows] = sign * (inverse @ own)
        self.inside[unit] = ~self.inside[unit]
        self.pivots += 1

"""Swap polishing: the best exchange of two units, again and again, and then a search for what that cannot reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.convex.refit import RIDGE, NormalEquations
from compress.convex.selecting.elimination import Factorised
from compress.convex.selecting.tabu import tabu_search
from compress.convex.statistics.moments import Moments, unit_columns, unit_index

_RELATIVE_GAIN = 1e-9  # of the output energy: smaller improvements are left alone
_REFRESH = 100  # sweeps after which a tableau is computed anew, to drop their rounding
_CHUNK = 2e8  # multiplications between two looks at the best exchange so far
_OVERHEAD = 1e7  # multiplications in the time that one call takes besides them
_EFFORT = 4e9  # multiplications that a search may take at `effort` 1, about a second on one core
_UNSEEN = 1e-3  # of the energy left unexplained, in outputs that the search leaves out


def polish_units(
    moments: Moments,
    units: Any,
    *,
    others: Sequence[Any] = (),
    ridge: float = RIDGE,
    intercept: bool = True,
    effort: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """As many units (|S|,) as given, sorted, such that no exchange of one for another lowers the refit's error.

    From `units` and each of `others` the best of all |S|·(K − |S|) exchanges is made while there is one (its gain is
    exact, for all pairs from one matrix product). Then a tabu search goes on through exchanges that lose, for as long
    as `effort` allows; with several columns a unit the best selection is shaken instead, a few units out at random and
    the best ones in, and descended again. What is better is kept.

    Args:
        units: numbers or a mask of the units to start from.
        others: other selections of as many units.
        effort: of the search after the descent; 0: none. Work is counted in multiplications, so the result depends on
            the input and `seed` alone.

    Raises:
        ValueError: units that do not exist, or one that is listed twice.
    """
    starts = [unit_index(own, moments.unit_count) for own in (units, *others)]
    for listed in starts:
        if len(set(listed.tolist())) < listed.numel():
            raise ValueError("`units` and `others` must list every unit once, got one that is listed twice.")
    polisher = Polisher(Factorised.of(moments.on_processor(), ridge=ridge, intercept=intercept))
    return polisher.polish(starts, effort=effort, seed=seed)[0]


class Polisher:
    """The normal equations of one problem, ready to polish selections of any width."""

    def __init__(self, factorised: Factorised) -> None:
        self.equations, self.targets = factorised.equations, factorised.targets
        explained = torch.linalg.solve_triangular(factorised.factor, self.targets, upper=False).square().sum(0)  # (d,)
        self._tails = explained.flip(0).cumsum(0).flip(0)  # (d,) explained by this output and those after it

    @property
    def unit_count(self) -> int:
        """K."""
        return self.equations.gram.shape[0] // self.equations.group_size

    def error(self, units: Tensor) -> float:
        """Relative error of the refit on these units (ridge counted in)."""
        inside = unit_columns(units.to(self.targets.device), self.equations.group_size)
        factor = torch.linalg.cholesky(self.equations.gram[inside[:, None], inside])
        whitened = torch.linalg.solve_triangular(factor, self.targets[inside], upper=False)
        return self._relative(float(whitened.square().sum()))

    def without_cheapest(self, units: Tensor) -> Tensor:
        """These units without the one whose removal raises the error least."""
        tableau = _Tableau.of(self.equations, self.targets, units)
        tableau.sweep(tableau.cheapest())
        return tableau.kept()

    def polish(self, starts: Sequence[Tensor], *, effort: float = 1.0, seed: int = 0) -> tuple[Tensor, float]:
        """The polished units, sorted, and their relative error."""
        device = self.targets.device
        selections = {tuple(torch.unique(start).tolist()) for start in starts}
        width = len(next(iter(selections)))
        if any(len(selection) != width for selection in selections):
            raise ValueError("selections to start from must have equally many units.")
        least = _RELATIVE_GAIN * max(self.equations.energy, 1e-300)
        ends: list[_Tableau] = []
        for selection in sorted(selections):
            tableau = _Tableau.of(
                self.equations, self.targets, torch.tensor(selection, dtype=torch.long, device=device)
            )
            ends.append(self._descend(tableau, least))
        ends.sort(key=lambda tableau: tableau.explained, reverse=True)
        best = ends[0]
        movable = min(width, self.unit_count - width) if self.targets.shape[1] else 0
        if movable > 0 and effort > 0 and self.equations.group_size == 1:
            best = self._search([tableau.kept() for tableau in ends], best, least, effort * _EFFORT, seed)
        elif movable > 0 and effort > 0:
            best = self._shake(best, least, effort * _EFFORT, torch.Generator().manual_seed(seed))
        units = best.kept()
        return units.sort().values.cpu(), self.error(units)

    def _descend(self, tableau: _Tableau, least: float) -> _Tableau:
        """Exchanges until none gains: the tableau at a selection that no single swap improves."""
        while True:
            gain, out, into = tableau.best_exchange(least)
            if gain <= least:
                return tableau
            before = tableau.explained
            tableau.sweep(out)
            tableau.sweep(into)
            if tableau.sweeps > _REFRESH:
                tableau = _Tableau.of(self.equations, self.targets, tableau.kept(), tableau.work)
                if tableau.explained <= before:  # gains were rounding
                    return tableau

    def _search(self, starts: list[Tensor], best: _Tableau, least: float, budget: float, seed: int) -> _Tableau:
        """The best of these ends and of what a tabu search from them leads to, descended."""
        left = max(_RELATIVE_GAIN * self.equations.energy, self.equations.energy - best.explained)
        outputs = max(1, int((self._tails > _UNSEEN * left).sum()))
        units = tabu_search(
            self.equations.gram,
            self.targets[:, :outputs],
            starts,
            budget=budget,
            floor=max(self.equations.ridge, 1e-13),
            seed=seed,
        )
        tableau = self._descend(_Tableau.of(self.equations, self.targets, units), least)
        return tableau if tableau.explained > best.explained + least else best

    def _shake(self, best: _Tableau, least: float, budget: float, generator: torch.Generator) -> _Tableau:
        width = int(best.inside.sum())
        movable = min(width, self.unit_count - width)
        patience = 10 + self.unit_count
        spent, failed = 0.0, 0
        while spent < budget and failed < patience:
            strength = min(movable, 1 + int(torch.randint(1, 4, (1,), generator=generator)))
            tableau = best.copy()
            inside = tableau.kept()
            removed = inside[torch.randperm(width, generator=generator)[:strength].to(inside.device)]
            for unit in removed.tolist():
                tableau.sweep(unit)
            tabu = removed if self.unit_count - width >= strength else removed[:0]
            for _ in range(strength):
                tableau.sweep(tableau.most_explaining(tabu))
            tableau = self._descend(tableau, least)
            spent += tableau.work
            failed += 1
            if tableau.explained > best.explained + least:
                fresh = _Tableau.of(self.equations, self.targets, tableau.kept())
                if fresh.explained > best.explained + least:
                    best, failed = fresh, 0
        return best

    def _relative(self, explained: float) -> float:
        if self.equations.energy <= 0:
            return 0.0
        return float(max(0.0, 1 - explained / self.equations.energy) ** 0.5)


@dataclass(eq=False)
class _Tableau:
    """[G H] swept on the units kept: −P and coefficients inside, Schur complement and residual correlation outside.

    Attributes:
        table: (n, n), n = K·s. weights: (n, d). inside: (K,). explained: energy that the units kept explain.
        sweeps, work: since it was computed, and multiplications since it was copied.
    """

    table: Tensor
    weights: Tensor
    inside: Tensor
    explained: float
    s: int
    sweeps: int = 0
    work: float = 0.0

    @classmethod
    def of(cls, equations: NormalEquations, targets: Tensor, units: Tensor, work: float = 0.0) -> _Tableau:
        s, n = equations.group_size, equations.gram.shape[0]
        chosen = torch.zeros(n // s, dtype=torch.bool, device=targets.device)
        chosen[units] = True
        inside = unit_columns(chosen.nonzero()[:, 0], s)
        outside = unit_columns((~chosen).nonzero()[:, 0], s)
        gram = equations.gram
        table, weights, explained = gram.clone(), targets.clone(), 0.0
        if inside.numel():
            factor = torch.linalg.cholesky(gram[inside[:, None], inside])
            inverse = torch.cholesky_inverse(factor)
            whitened = torch.linalg.solve_triangular(factor, targets[inside], upper=False)
            explained = float(whitened.square().sum())
            bridge = inverse @ gram[inside[:, None], outside]  # (|S|s, rest)
            table[inside[:, None], inside] = -inverse
            table[inside[:, None], outside] = bridge
            table[outside[:, None], inside] = bridge.T
            table[outside[:, None], outside] -= gram[outside[:, None], inside] @ bridge
            coefficients = inverse @ targets[inside]
            weights[outside] -= gram[outside[:, None], inside] @ coefficients
            weights[inside] = coefficients
        work += _OVERHEAD + inside.numel() * n * (inside.numel() + outside.numel())
        return cls(table, weights, chosen, explained, s, work=work)

    def copy(self) -> _Tableau:
        return _Tableau(
            self.table.clone(), self.weights.clone(), self.inside.clone(), self.explained, self.s, self.sweeps
        )

    def kept(self) -> Tensor:
        return self.inside.nonzero()[:, 0]

    def scores(self) -> Tensor:
        """What each unit explains (K,), coming in from outside or lost from inside."""
        k, s = self.inside.shape[0], self.s
        weights = self.weights.reshape(k, s, -1)
        blocks = self._blocks()
        if s == 1:
            return weights.square().sum((1, 2)) / blocks[:, 0, 0].clamp_min(1e-300)
        return _explained(blocks, weights @ weights.mT)

    def cheapest(self) -> int:
        """The unit inside that explains least."""
        return int(torch.where(self.inside, self.scores(), torch.inf).argmin())

    def most_explaining(self, tabu: Tensor) -> int:
        """The unit outside, and not in `tabu`, that explains most."""
        scores = torch.where(self.inside, -1.0, self.scores())
        scores[tabu[~self.inside[tabu]]] = -0.5
        return int(scores.argmax())

    def best_exchange(self, least: float) -> tuple[float, int, int]:
        """Gain in explained energy of the best exchange found, the unit that goes out and the one that comes in.

        Units are looked at for removal from the cheapest on, many at once; the search ends at the first lot with an
        exchange that gains more than `least`, or when no exchange does.
        """
        inside, outside = self.kept(), (~self.inside).nonzero()[:, 0]
        m, o, d = inside.numel(), outside.numel(), self.weights.shape[1]
        if not m or not o or not d:  # outputs that do not vary have nothing to explain
            return 0.0, 0, 0
        costs = self.scores()[inside]
        inside = inside[costs.argsort(stable=True)]
        lot = max(1, min(m, int(_CHUNK / (o * d * self.s**2))))
        best = (0.0, 0, 0)
        self.work += _OVERHEAD
        for first in range(0, m, lot):
            part = inside[first : first + lot]
            self.work += part.numel() * o * d * self.s**2
            gains = self._gains(part, outside) if self.s == 1 else self._block_gains(part, outside)
            place = int(gains.argmax())
            gain = float(gains.reshape(-1)[place])
            if gain > best[0]:
                best = (gain, int(part[place // o]), int(outside[place % o]))
            if best[0] > least:
                break
        return best

    def _gains(self, part: Tensor, outside: Tensor) -> Tensor:
        """Gain (p, o) of every exchange of a unit in `part` for one `outside`, s = 1.

        Without unit i the correlation of unit j with the residual is c_j + t·v_i, t = B_ij/P_ii, and what is left of
        φ_j has the square σ_j + t²P_ii; i itself explained ‖v_i‖²/P_ii.
        """
        diagonal = self.table.diagonal()
        p, left = -diagonal[part], diagonal[outside]  # P_ii, σ_j
        v, c = self.weights[part], self.weights[outside]
        t = self.table[part[:, None], outside] / p[:, None]
        squares = v.square().sum(1)
        numerator = torch.addmm(torch.zeros_like(t), v, c.T).mul_(2).mul_(t)
        numerator.add_(c.square().sum(1)).addcmul_(t.square(), squares[:, None].expand_as(t))
        denominator = left + t.square() * p[:, None]
        gains = numerator / denominator.clamp_min(1e-300) - (squares / p)[:, None]
        return torch.where(denominator > 1e-13, gains, -torch.inf)

    def _block_gains(self, part: Tensor, outside: Tensor) -> Tensor:
        """The same for s columns a unit: blocks in place of numbers."""
        s, d = self.s, self.weights.shape[1]
        columns = unit_columns(outside, s)
        left = self._blocks()[outside]  # (o, s, s) Σ_j
        c = self.weights[columns]  # (o·s, d)
        rows = []
        for unit in part.tolist():
            span = slice(unit * s, unit * s + s)
            inverse = torch.linalg.inv(-self.table[span, span])  # P_ii⁻¹
            inverse = (inverse + inverse.T) / 2
            bridge = self.table[span][:, columns]  # (s, o·s) B_i
            shift = inverse @ self.weights[span]  # (s, d)
            moved = torch.addmm(c, bridge.T, shift).reshape(-1, s, d)  # C_j + B_ijᵀP_ii⁻¹V_i
            blocks = bridge.T.reshape(-1, s, s)  # B_ijᵀ
            grown = left + blocks @ inverse @ blocks.mT
            lost = float((self.weights[span] * shift).sum())
            rows.append(_explained(grown, moved @ moved.mT) - lost)
        return torch.stack(rows)

    def _blocks(self) -> Tensor:
        """P_kk inside, Σ_k outside (K, s, s)."""
        k, s = self.inside.shape[0], self.s
        blocks = self.table.reshape(k, s, k, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return torch.where(self.inside[:, None, None], -blocks, blocks)

    def sweep(self, unit: int) -> None:
        """Bring a unit in from outside, or take it out."""
        s = self.s
        rows = slice(unit * s, unit * s + s)
        leaves = bool(self.inside[unit])
        sign = -1.0 if leaves else 1.0
        block = self.table[rows, rows].clone()
        column = self.table[:, rows].clone()  # (n, s)
        inverse = torch.linalg.inv(block)
        scaled = column @ inverse
        weights = self.weights[rows].clone()
        self.explained += float((weights * (inverse @ weights)).sum())  # the block is −P_kk for a unit that leaves
        self.table.addmm_(scaled, column.T, alpha=-1)
        self.weights.addmm_(scaled, weights, alpha=-1)
        self.table[:, rows] = sign * scaled
        self.table[rows, :] = sign * scaled.T
        self.table[rows, rows] = -(inverse + inverse.T) / 2
        self.weights[rows] = sign * (inverse @ weights)
        self.inside[unit] = not leaves
        self.sweeps += 1
        self.work += _OVERHEAD / 4 + 4.0 * self.table.numel() * s + 4.0 * self.weights.numel() * s


def _explained(blocks: Tensor, energies: Tensor) -> Tensor:
    """tr Σ_k⁻¹E_k (k,) for blocks Σ and E (k, s, s); 0 where Σ_k is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(blocks)
    solved: Tensor = torch.cholesky_solve(energies, factor)
    explained = solved.diagonal(dim1=1, dim2=2).sum(1)
    return torch.where((info == 0) & torch.isfinite(explained), explained, 0.0)

"""Orders of units by greedy least squares on the moments: backward elimination, forward selection, nested errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.convex.refit import RIDGE, NormalEquations, factored, normal_equations
from compress.convex.statistics.eigen import eigen_decomposition
from compress.convex.statistics.moments import Moments, unit_columns
from compress.errors import SolverError

_DELAY = 48  # columns of updates that are collected, at least
_BLOCK = 512  # columns of one block row of a triangle
_MANY_OUTPUTS = 128  # from which on products with the weights are taken for several units at once
_AT_ONCE = 8  # units
_REDUCED = 1024  # columns up to which outputs are turned by eigenvectors, which cost more than they save beyond


@dataclass(frozen=True, eq=False)
class Factorised:
    """Normal equations with what every selection starts from.

    Attributes:
        equations: with the `ridge` that the factorisation needed on the diagonal.
        factor: lower Cholesky factor (n, n).
        targets: `reduced_outputs` (n, d).
    """

    equations: NormalEquations
    factor: Tensor
    targets: Tensor

    @classmethod
    def of(cls, moments: Moments, *, ridge: float = RIDGE, intercept: bool = True) -> Factorised:
        """The equations of these moments."""
        equations = normal_equations(moments, ridge=ridge, intercept=intercept)
        factor, used = factored(equations)
        equations = replace(equations, ridge=used)
        return cls(equations, factor, reduced_outputs(equations, factor))

    def backward(self, delay: int = _DELAY) -> Tensor:
        """See `backward_order`."""
        inverse = torch.cholesky_inverse(self.factor)
        coefficients = torch.cholesky_solve(self.targets, self.factor)
        return _pivot_through(inverse, coefficients, self.equations.group_size, delay, largest=False)[0].flip(0)

    def forward(self, delay: int = _DELAY) -> tuple[Tensor, Tensor]:
        """See `forward_order`; with it the relative errors (K + 1,) that `errors` would give."""
        s = self.equations.group_size
        order, explained = _pivot_through(self.equations.gram.clone(), self.targets, s, delay, largest=True)
        return order, _error_curve(explained, self.equations.energy)

    def errors(self, order: Tensor) -> Tensor:
        """See `nested_errors`."""
        return _nested_errors(self.equations, order)


def nested_errors(moments: Moments, order: Tensor, *, ridge: float = RIDGE, intercept: bool = True) -> Tensor:
    """Relative error (len(order) + 1,) of the refit on the first 0, 1, 2, … units of `order`; one Cholesky for all.

    The ridge's own cost is counted in, so each number is an upper bound on the least-squares error.
    """
    equations = normal_equations(moments, ridge=ridge, intercept=intercept)
    return _nested_errors(equations, order)


def _nested_errors(equations: NormalEquations, order: Tensor) -> Tensor:
    s = equations.group_size
    index = unit_columns(order.to(equations.gram.device), s)
    part = NormalEquations(
        gram=equations.gram.index_select(0, index).index_select(1, index),
        cross=equations.cross.index_select(0, index),
        scale=equations.scale.index_select(0, index),
        energy=equations.energy,
        group_size=s,
        ridge=equations.ridge,
    )
    if not order.shape[0] or equations.energy <= 0:
        return _error_curve(part.cross.new_zeros(order.shape[0]), equations.energy)
    factor, _ = factored(part)
    explained = torch.linalg.solve_triangular(factor, part.cross, upper=False).square().sum(1)
    return _error_curve(explained.reshape(-1, s).sum(1), equations.energy)


def _error_curve(explained: Tensor, energy: float) -> Tensor:
    """Relative errors (n + 1,) with the first 0, 1, … units, which explain so much each (n,)."""
    errors = torch.ones(explained.shape[0] + 1, dtype=torch.float64)
    if energy <= 0:
        return errors.zero_()
    errors[1:] = (1 - explained.cumsum(0) / energy).clamp_min(0).sqrt().cpu()
    return errors


def reduced_outputs(equations: NormalEquations, factor: Tensor) -> Tensor:
    """`cross` (n, D) turned to the d ≤ min(n, D) orthogonal outputs that Φ explains, most first; changes no error.

    Directions that carry less than 1e-15 of the explained energy are dropped. Up to 16 outputs stay as they are; so do
    those of large problems, unless an eighth of the directions carries all.
    """
    cross = equations.cross
    n, d = cross.shape
    if d <= 16:
        return cross
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False)  # (n, D), the projection of Ψ on range(Φ)
    if min(n, d) > _REDUCED:
        return _few_outputs(cross, factor, whitened)
    if d <= n:
        values, vectors = eigen_decomposition(whitened.T @ whitened)
        kept = values > 1e-15 * values.clamp_min(0).sum()
        return cross @ vectors[:, kept].flip(1)
    values, vectors = eigen_decomposition(whitened @ whitened.T)
    kept = values > 1e-15 * values.clamp_min(0).sum()
    return torch.mm(factor, (vectors[:, kept] * values[kept].sqrt()).flip(1))


def _few_outputs(cross: Tensor, factor: Tensor, whitened: Tensor) -> Tensor:
    """`cross` turned to fewer outputs where an eighth of them do, or there are more than columns; else as it is.

    A random product finds the range of few (Halko, Martinsson and Tropp 2011).
    """
    n, d = cross.shape
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(n, min(n, d) // 8, generator=generator, dtype=cross.dtype).to(cross.device)
    basis = torch.linalg.qr(whitened.T @ probe)[0]  # (D, d′)
    turned = whitened @ basis
    if float(turned.square().sum()) >= (1 - 1e-13) * float(whitened.square().sum()):
        return torch.mm(cross, basis)
    if d > 1.5 * n:
        root, info = torch.linalg.cholesky_ex(whitened @ whitened.T)
        if not int(info):
            return torch.mm(factor, root)
    return cross


def backward_order(moments: Moments, *, ridge: float = RIDGE, intercept: bool = True, delay: int = _DELAY) -> Tensor:
    """Units (K,) from the last to the first removed, each removal the one that raises the refit's error least.

    With P = (Φ_AᵀΦ_A/N)⁻¹ over the units A still there and B = P·H_A, removing unit k raises ‖Ψ − ΦV‖²/N by
    tr B_kᵀ(P_kk)⁻¹B_k (optimal brain surgeon, block form for s columns a unit); P and B are then downdated by rank s.
    Updates of P are collected and applied `delay` columns at a time, so matrix products carry the O((K·s)³) cost.
    """
    return Factorised.of(moments, ridge=ridge, intercept=intercept).backward(delay)


def forward_order(moments: Moments, *, ridge: float = RIDGE, intercept: bool = True, delay: int = _DELAY) -> Tensor:
    """Units (K,) in the order of orthogonal least squares: each the one that lowers the refit's error most.

    The same recursion as backward elimination, on G and H in place of P and B and from the largest score on.
    """
    return Factorised.of(moments, ridge=ridge, intercept=intercept).forward(delay)[0]


def _pivot_through(inverse: Tensor, weights: Tensor, s: int, delay: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """Units in the order of block pivots on P (n, n) and B (n, d), each with the smallest (or largest) score.

    With them the scores (K,) that they had. P is updated on and below its block diagonal only.
    """
    if s == 1:
        return _pivot_through_columns(inverse, weights, delay, largest=largest)
    count = inverse.shape[0] // s
    names = torch.arange(count, device=inverse.device)  # of the rows still stored
    gone = torch.zeros(count, dtype=torch.bool, device=inverse.device)  # rows stored in vain
    order: list[int] = []
    had = inverse.new_zeros(count)
    wait = max(delay, 4 * s, inverse.shape[0] // 24 if delay > 1 else 1)
    while len(order) < count:
        k = names.shape[0]
        blocks = _diagonal_blocks(inverse, s)  # (k, s, s) P_kk
        blocks[gone] = torch.eye(s, dtype=blocks.dtype, device=blocks.device)
        coefficient_blocks = weights.reshape(k, s, -1)
        energies = coefficient_blocks @ coefficient_blocks.mT  # (k, s, s) B_kB_kᵀ
        energies[gone] = 0.0
        steps = min(count - len(order), max(1, wait // s))
        pending = inverse.new_empty(k * s, steps * s)  # P = inverse − pending·pendingᵀ
        shifts = inverse.new_empty(steps * s, weights.shape[1])  # B = weights − pending·shifts
        images = inverse.new_empty(steps * s, k * s)  # shifts·weightsᵀ
        products = _Products(weights, s, steps, largest=largest) if weights.shape[1] >= _MANY_OUTPUTS else None
        for step in range(steps):
            scores = _removal_costs(blocks, energies)
            scores[gone] = -math.inf if largest else math.inf
            unit = int(scores.argmax() if largest else scores.argmin())
            gone[unit] = True
            rows, done = slice(unit * s, unit * s + s), slice(0, step * s)
            pending_rows = pending[rows, done]
            root = _root(inverse[rows, rows] - pending_rows @ pending_rows.T)
            row_weights = weights[rows] - pending_rows @ shifts[done]  # (s, d) B_r
            shift = torch.linalg.solve_triangular(root, row_weights, upper=False)
            had[len(order)] = shift.square().sum()
            order.append(int(names[unit]))
            if len(order) == count:
                return torch.tensor(order), had
            # B_k B_kᵀ after B_k ← B_k − half_k·shift needs only shift·B_kᵀ, the B before this step
            new = slice(step * s, step * s + s)
            if products is None:
                torch.mm(shift, weights.T, out=images[new])
            else:
                image = torch.addmm(products.of(unit, scores), pending_rows, images[done], alpha=-1)
                images[new] = torch.linalg.solve_triangular(root, image, upper=False)
            late = torch.cat([pending_rows, shift @ shifts[done].T]) @ pending[:, done].T  # (2s, k·s)
            half = torch.linalg.solve_triangular(root, _rows(inverse, rows) - late[:s], upper=False)  # P_rr^(−½)P_r:
            mixed = images[new] - late[s:]  # (s, k·s)
            half_blocks = half.T.reshape(k, s, s)
            mixed_blocks = mixed.T.reshape(k, s, s)  # B_k·shiftᵀ
            crossed = half_blocks @ mixed_blocks.mT
            energies = energies - crossed - crossed.mT + half_blocks @ (shift @ shift.T) @ half_blocks.mT
            blocks = blocks - half_blocks @ half_blocks.mT
            blocks[gone], energies[gone] = torch.eye(s, dtype=blocks.dtype, device=blocks.device), 0.0
            pending[:, new], shifts[new] = half.T, shift
        for rows in _block_rows(inverse.shape[0], s):
            inverse[rows, : rows.stop].addmm_(pending[rows], pending[: rows.stop].T, alpha=-1)
        weights = torch.addmm(weights, pending, shifts, alpha=-1)
        if int(gone.sum()) > 0.2 * k:
            kept = (~gone).nonzero()[:, 0]
            index = unit_columns(kept, s)
            inverse = inverse[index[:, None], index]
            for rows in _block_rows(inverse.shape[0], s):
                corner = inverse[rows, rows]
                corner.copy_(corner.tril() + corner.tril(-1).T)
            weights, names = weights[index], names[kept]
            gone = gone[kept]
    return torch.tensor(order), had


def _pivot_through_columns(inverse: Tensor, weights: Tensor, delay: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The same with one column a unit: numbers and vectors in place of blocks, in half of the time."""
    count = inverse.shape[0]
    names = torch.arange(count, device=inverse.device)  # of the rows still stored
    gone = torch.zeros(count, dtype=torch.bool, device=inverse.device)  # rows stored in vain
    order: list[int] = []
    had = inverse.new_zeros(count)
    wait = max(delay, 4, count // 24 if delay > 1 else 1)
    never = -math.inf if largest else math.inf
    while len(order) < count:
        k = names.shape[0]
        blocks = inverse.diagonal().masked_fill(gone, 1.0)  # P_kk (k,)
        energies = weights.square().sum(1).masked_fill_(gone, never)  # ‖B_k‖² (k,)
        steps = min(count - len(order), wait)
        pending = inverse.new_empty(steps, k)  # P = inverse − pendingᵀ·pending
        shifts = inverse.new_empty(steps, weights.shape[1])  # B = weights − pendingᵀ·shifts
        images = inverse.new_empty(steps, k)  # shifts·weightsᵀ
        products = _Products(weights, 1, steps, largest=largest) if weights.shape[1] >= _MANY_OUTPUTS else None
        for step in range(steps):
            scores = energies / blocks
            unit = int(scores.argmax() if largest else scores.argmin())
            gone[unit] = True
            column, half = pending[:step, unit], pending[step]
            pivot = inverse[unit, unit] - column @ column
            root = float(pivot.sqrt() if pivot > 0 else _root(pivot[None, None]))
            shift = torch.addmv(weights[unit], shifts[:step].T, column, alpha=-1).div_(root)
            shifts[step] = shift
            had[len(order)] = energy = shift @ shift
            order.append(int(names[unit]))
            if len(order) == count:
                return torch.tensor(order), had
            if products is None:
                torch.mv(weights, shift, out=images[step])
            else:
                torch.sub(products.of(unit, scores)[0], images[:step].T @ column, out=images[step]).div_(root)
            end = min(k, (unit // _BLOCK + 1) * _BLOCK)
            half[:end], half[end:] = inverse[unit, :end], inverse[end:, unit]
            late = pending[:step].T @ torch.stack([column, shifts[:step] @ shift], 1)  # (k, 2)
            half.sub_(late[:, 0]).div_(root)  # P_rr^(−½)P_r:
            mixed = images[step] - late[:, 1]  # B_k·shift
            energies.addcmul_(half, mixed, value=-2).addcmul_(half, half * energy).masked_fill_(gone, never)
            blocks.addcmul_(half, half, value=-1).masked_fill_(gone, 1.0)
        for rows in _block_rows(k, 1):
            inverse[rows, : rows.stop].addmm_(pending[:, rows].T, pending[:, : rows.stop], alpha=-1)
        weights = torch.addmm(weights, pending.T, shifts, alpha=-1)
        if int(gone.sum()) > 0.2 * k:
            kept = (~gone).nonzero()[:, 0]
            inverse = inverse[kept[:, None], kept]
            for rows in _block_rows(inverse.shape[0], 1):
                corner = inverse[rows, rows]
                corner.copy_(corner.tril() + corner.tril(-1).T)
            weights, names, gone = weights[kept], names[kept], gone[kept]
    return torch.tensor(order), had


class _Products:
    """Rows weights_r·weightsᵀ (s, K·s) of units, computed for many at once: a product of matrices, not of each row.

    Units are taken in advance by their score: what will be asked for soon.
    """

    def __init__(self, weights: Tensor, s: int, steps: int, *, largest: bool) -> None:
        self.weights, self.s, self.largest = weights, s, largest
        self.wanted = steps
        self.rows: dict[int, Tensor] = {}

    def of(self, unit: int, scores: Tensor) -> Tensor:
        """The rows of this unit, the one with the best of the `scores` (K,)."""
        if unit not in self.rows:
            best = scores.topk(min(self.wanted, scores.shape[0]), largest=self.largest).indices.tolist()
            units = [unit, *(other for other in best if other != unit and other not in self.rows)]
            index = unit_columns(torch.tensor(units, device=self.weights.device), self.s)
            products = torch.split(torch.mm(self.weights[index], self.weights.T), self.s)
            self.rows |= dict(zip(units, products, strict=True))
            self.wanted = min(self.wanted, _AT_ONCE)
        return self.rows[unit]


def _block_rows(n: int, s: int) -> list[slice]:
    """Slices of about `_BLOCK` rows, whole units each."""
    size = s * max(1, _BLOCK // s)
    return [slice(first, min(n, first + size)) for first in range(0, n, size)]


def _rows(lower: Tensor, rows: slice) -> Tensor:
    """Rows (s, n) of a symmetric matrix that holds its block rows on and below the block diagonal only."""
    s = rows.stop - rows.start
    size = s * max(1, _BLOCK // s)
    end = (rows.start // size + 1) * size
    if end >= lower.shape[0]:
        return lower[rows]
    return torch.cat([lower[rows, :end], lower[end:, rows].T], 1)


def _removal_costs(blocks: Tensor, energies: Tensor) -> Tensor:
    """tr (P_kk)⁻¹ B_kB_kᵀ for every unit (k,)."""
    if blocks.shape[1] == 1:
        return (energies / blocks)[:, 0, 0]
    factor, info = torch.linalg.cholesky_ex(blocks)
    if bool(info.any()):
        jitter = 1e-10 * blocks.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
        factor = torch.linalg.cholesky_ex(blocks + jitter[:, None, None] * torch.eye(blocks.shape[1]).to(blocks))[0]
    solved: Tensor = torch.cholesky_solve(energies, factor)
    costs = solved.diagonal(dim1=1, dim2=2).sum(1)
    return torch.nan_to_num(costs, nan=0.0)


def _root(block: Tensor) -> Tensor:
    """Lower Cholesky factor of a pivot block that rounding may have made slightly indefinite."""
    block = (block + block.T) / 2
    scale = float(block.diagonal().abs().sum())
    for jitter in (0.0, 1e-14, 1e-12, 1e-10, 1e-8):
        factor, info = torch.linalg.cholesky_ex(block + jitter * scale * torch.eye(block.shape[0]).to(block))
        if not int(info):
            return torch.as_tensor(factor)
    raise SolverError(f"a pivot block of {block.shape[0]} columns lost positive definiteness; use a larger ridge.")


def _diagonal_blocks(matrix: Tensor, s: int) -> Tensor:
    k = matrix.shape[0] // s
    return matrix.reshape(k, s, k, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

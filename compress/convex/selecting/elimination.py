"""Orders of units by greedy least squares on the moments: backward elimination, forward selection, nested errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.convex.refit import RIDGE, NormalEquations, factored, normal_equations
from compress.convex.statistics.eigen import eigen_decomposition
from compress.convex.statistics.moments import Moments, unit_columns
from compress.errors import SolverError


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
    errors = torch.ones(order.shape[0] + 1, dtype=torch.float64)
    if equations.energy <= 0:
        return errors.zero_()
    if order.shape[0]:
        factor, _ = factored(part)
        explained = torch.linalg.solve_triangular(factor, part.cross, upper=False).square().sum(1)
        explained = explained.reshape(-1, s).sum(1).cumsum(0)
        errors[1:] = (1 - explained / equations.energy).clamp_min(0).sqrt().cpu()
    return errors


def reduced_outputs(equations: NormalEquations, factor: Tensor) -> Tensor:
    """`cross` (n, D) turned to the d ≤ min(n, D) orthogonal outputs that Φ explains, most first; changes no error.

    Directions that carry less than 1e-15 of the explained energy are dropped. Up to 16 outputs stay as they are.
    """
    cross = equations.cross
    n, d = cross.shape
    if d <= 16:
        return cross
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False)  # (n, D), the projection of Ψ on range(Φ)
    if d <= n:
        values, vectors = eigen_decomposition(whitened.T @ whitened)
        kept = values > 1e-15 * values.clamp_min(0).sum()
        return cross @ vectors[:, kept].flip(1)
    values, vectors = eigen_decomposition(whitened @ whitened.T)
    kept = values > 1e-15 * values.clamp_min(0).sum()
    return torch.mm(factor, (vectors[:, kept] * values[kept].sqrt()).flip(1))


def backward_order(moments: Moments, *, ridge: float = RIDGE, intercept: bool = True, delay: int = 48) -> Tensor:
    """Units (K,) from the last to the first removed, each removal the one that raises the refit's error least.

    With P = (Φ_AᵀΦ_A/N)⁻¹ over the units A still there and B = P·H_A, removing unit k raises ‖Ψ − ΦV‖²/N by
    tr B_kᵀ(P_kk)⁻¹B_k (optimal brain surgeon, block form for s columns a unit); P and B are then downdated by rank s.
    Updates of P are collected and applied `delay` columns at a time, so matrix products carry the O((K·s)³) cost.
    """
    equations = normal_equations(moments, ridge=ridge, intercept=intercept)
    factor, _ = factored(equations)
    targets = reduced_outputs(equations, factor)
    inverse = torch.cholesky_inverse(factor)
    coefficients = torch.cholesky_solve(targets, factor)
    return _pivot_through(inverse, coefficients, equations.group_size, delay, largest=False).flip(0)


def forward_order(moments: Moments, *, ridge: float = RIDGE, intercept: bool = True, delay: int = 48) -> Tensor:
    """Units (K,) in the order of orthogonal least squares: each the one that lowers the refit's error most.

    The same recursion as backward elimination, on G and H in place of P and B and from the largest score on.
    """
    equations = normal_equations(moments, ridge=ridge, intercept=intercept)
    factor, ridge_used = factored(equations)
    gram = equations.gram.clone()
    gram.diagonal().add_(ridge_used - equations.ridge)
    return _pivot_through(gram, reduced_outputs(equations, factor), equations.group_size, delay, largest=True)


def _pivot_through(inverse: Tensor, weights: Tensor, s: int, delay: int, *, largest: bool) -> Tensor:
    """Units in the order of block pivots on P (n, n) and B (n, d), each with the smallest (or largest) score."""
    count = inverse.shape[0] // s
    names = torch.arange(count, device=inverse.device)  # of the rows still stored
    gone = torch.zeros(count, dtype=torch.bool, device=inverse.device)  # rows stored in vain
    order: list[int] = []
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
        for step in range(steps):
            scores = _removal_costs(blocks, energies)
            scores[gone] = -math.inf if largest else math.inf
            unit = int(scores.argmax() if largest else scores.argmin())
            gone[unit] = True
            order.append(int(names[unit]))
            if len(order) == count:
                return torch.tensor(order)
            rows = slice(unit * s, unit * s + s)
            done = slice(0, step * s)
            column = inverse[:, rows] - pending[:, done] @ pending[rows, done].T  # (k·s, s) P_:r
            root = _root(column[rows])
            half = torch.linalg.solve_triangular(root, column.T, upper=False).T  # (k·s, s), P_:r P_rr^(−T/2)
            own = weights[rows] - pending[rows, done] @ shifts[done]  # (s, d) B_r
            shift = torch.linalg.solve_triangular(root, own, upper=False)
            new = slice(step * s, step * s + s)
            # B_k B_kᵀ after B_k ← B_k − half_k·shift needs only shift·B_kᵀ, the B before this step
            mixed = shift @ weights.T - (shift @ shifts[done].T) @ pending[:, done].T  # (s, k·s)
            half_blocks = half.reshape(k, s, s)
            mixed_blocks = mixed.T.reshape(k, s, s)  # B_k·shiftᵀ
            crossed = half_blocks @ mixed_blocks.mT
            energies = energies - crossed - crossed.mT + half_blocks @ (shift @ shift.T) @ half_blocks.mT
            blocks = blocks - half_blocks @ half_blocks.mT
            blocks[gone], energies[gone] = torch.eye(s, dtype=blocks.dtype, device=blocks.device), 0.0
            pending[:, new], shifts[new] = half, shift
        inverse.addmm_(pending, pending.T, alpha=-1)
        weights = torch.addmm(weights, pending, shifts, alpha=-1)
        if int(gone.sum()) > 0.2 * k:
            kept = (~gone).nonzero()[:, 0]
            index = unit_columns(kept, s)
            inverse = inverse[index[:, None], index]
            weights, names = weights[index], names[kept]
            gone = gone[kept]
    return torch.tensor(order)


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

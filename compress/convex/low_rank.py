"""Reduced-rank regression on second moments (Izenman 1975): of all maps of rank r the one whose outputs are nearest.

The least squares fit V comes first; of its outputs ΦV the r principal directions U stay. V U Uᵀ is optimal, as the
error of any W is that of V plus ‖ΦV − ΦW‖², and of that the first r directions are the least (Eckart and Young).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex.refit import RIDGE, relative_error, solve_ridged
from compress.convex.statistics.moments import Moments


@dataclass(frozen=True, eq=False)
class ReducedRank:
    """A linear map of low rank.

    Attributes:
        coefficients: W (K·s, D), of rank r at most.
        intercept: b (D,), zero without an intercept.
        error: ‖Ψ − ΦW − 1bᵀ‖_F over ‖Ψ − mean(Ψ)‖_F (over ‖Ψ‖_F without an intercept), on these moments.
    """

    coefficients: Tensor
    intercept: Tensor
    error: float


def reduced_rank(moments: Moments, rank: int, *, ridge: float = RIDGE, intercept: bool = True) -> ReducedRank:
    """W = argmin ‖Ψ − ΦW − 1bᵀ‖²_F/N + ridge·Σ_i G_ii‖w_i‖² over W of rank `rank` at most, and b.

    Raises:
        ValueError: the rank is below 1.
        MomentsError: the moments are not those of one set of samples.
    """
    fitted = moments.centred() if intercept else moments
    full, used = solve_ridged(fitted, ridge)
    low = truncated(fitted, full, rank, ridge=used)
    bias = fitted.intercept(low)
    return ReducedRank(low, bias, relative_error(fitted, None, low, bias, intercept=intercept))


def truncated(moments: Moments, coefficients: Tensor, rank: int, *, ridge: float = RIDGE) -> Tensor:
    """W (K·s, D) of rank `rank` at most whose outputs are nearest to those of V = `coefficients` (K·s, D).

    min tr (V − W)ᵀ(C + ridge·diag C)(V − W), with the moments C of Φ as they stand, centred or not.
    """
    directions = output_directions(moments, coefficients, rank, ridge)
    return (coefficients @ directions) @ directions.T


def output_directions(moments: Moments, coefficients: Tensor, rank: int, ridge: float) -> Tensor:
    """The principal directions (D, r) of the outputs ΦV, orthonormal, the first ones first."""
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    inputs, outputs = coefficients.shape
    basis, within = None, coefficients
    if outputs > inputs:  # the outputs lie in as many dimensions as there are inputs
        basis, upper = torch.linalg.qr(coefficients.T)  # (D, n), (n, n)
        within = upper.T
    energy = within.T @ (moments.gram @ within + ridge * moments.gram.diagonal()[:, None] * within)
    vectors: Tensor = torch.linalg.eigh((energy + energy.T) / 2).eigenvectors.flip(1)[:, :rank]
    return vectors if basis is None else basis @ vectors


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (n, r) and B (r, D) with AB nearest to the matrix (n, D), and AᵀA = BBᵀ: both factors are of one scale."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]

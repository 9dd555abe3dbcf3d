"""Attraction and repulsion on hidden representations (Jacot et al. 2022), representation cost and aligned units.

Rows are samples. A layer's least weights that turn features Φ (N, p) into pre-activations Z (N, n), bias free, cost
½‖W‖² = ½ tr(Zᵀ(ΦΦᵀ)⁺Z) with Z and Φ centred over the samples. Each hidden representation stands in two such terms:
its own pulls it to the origin, the next layer's pushes it away; they agree at a stationary point of the regularised
loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex import Moments
from compress.convex.statistics.eigen import eigen_decomposition

RELATIVE = 1e-10  # eigenvalues of a kernel below this fraction of the largest count as zero


@dataclass(frozen=True, eq=False)
class Forces:
    """Attraction and repulsion (N, n), both per unit of the weight-decay coefficient.

    `residual` is ‖attraction − repulsion‖_F / ‖attraction‖_F: 0 at a stationary point.
    """

    attraction: Tensor
    repulsion: Tensor

    @property
    def residual(self) -> float:
        """Relative to the attraction."""
        return float((self.attraction - self.repulsion).norm() / self.attraction.norm().clamp_min(1e-300))


def hidden_forces(below: Tensor, hidden: Tensor, slopes: Tensor, features: Tensor, above: Tensor) -> Forces:
    """Forces on the pre-activations of one hidden layer, on all training samples.

    With A = (CΦ₋Φ₋ᵀC)⁺ and B = (CΦΦᵀC)⁺ (C centres over samples): attraction A·Z, repulsion σ'(Z) ∘ (B·Y·Yᵀ·B·Φ).
    They agree at a minimum if each layer has at least N − 1 linearly independent features: with fewer, the
    representations that the layer can reach are confined and the forces differ outside of them.

    Args:
        below: Φ₋ (N, p), the features that this layer reads. hidden: Z (N, n). slopes: σ'(Z) (N, n).
        features: Φ = σ(Z) (N, n). above: Y (N, m), the next layer's pre-activations.
    """
    below, hidden, features, above = (_centred(value.double()) for value in (below, hidden, features, above))
    pull = kernel_inverse(below) @ hidden  # (N, n)
    pushed = kernel_inverse(features) @ above  # (N, m)
    return Forces(pull, slopes.double() * (pushed @ (pushed.T @ features)))


def kernel_inverse(features: Tensor) -> Tensor:
    """(ΦΦᵀ)⁺ (N, N)."""
    values, vectors = torch.linalg.eigh(features @ features.T)
    kept = values > RELATIVE * values[-1]
    inverse: Tensor = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    return inverse


def representation_cost(moments: Moments, weights: Tensor, tolerance: float = 1e-6) -> Tensor:
    """‖v_k‖² (K,) of the least weights that give the same outputs on the data: V projected on the range of ΦᵀΦ.

    Its sum is Jacot's ‖Z_ℓ(Z_{ℓ−1}^σ)⁺‖²_F, at most ‖V‖²_F. `tolerance` is a relative singular value of Φ.
    """
    values, vectors = eigen_decomposition(moments.gram)
    kept = vectors[:, values > tolerance**2 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)]
    least = kept @ (kept.T @ weights.to(kept))  # (K·s, D)
    squares: Tensor = least.reshape(moments.unit_count, -1).square().sum(1)
    return squares


def aligned_units(gram: Tensor, tolerance: float = 1e-9) -> list[list[int]]:
    """Groups of units whose features are positive multiples of one another, from their uncentred ΦᵀΦ (K, K).

    Two features count as aligned from a cosine of 1 − `tolerance`. Units that are zero on the data are in no group.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 1e-24 * diagonal.max().clamp_min(torch.finfo(gram.dtype).tiny)
    scale = torch.where(alive, diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt(), 0.0)
    close = gram * scale[:, None] * scale > 1 - tolerance
    groups: list[list[int]] = []
    taken: set[int] = set()
    for unit in range(len(gram)):
        if unit not in taken and bool(alive[unit]):
            members = [other for other in close[unit].nonzero()[:, 0].tolist() if other not in taken]
            taken.update(members)
            if len(members) > 1:
                groups.append(members)
    return groups


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(0)

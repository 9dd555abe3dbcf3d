"""OSSCAR's local search (Meng et al., ICML 2024, arXiv 2403.12983), written from the description of the method.

After an elimination that removes the unit of least exact cost each time, rounds of exchanges: the `size` kept units of
least removal cost go out together, then the `size` units outside of largest gain come in together, scored from what
the others explain. A round that does not lower the error is undone. The size is halved then, down to one, which is more
search than one fixed size; the original stops at the first round that fails.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.convex.statistics.moments import unit_columns

ROUNDS = 20  # at every size


def osscar_search(gram: Tensor, targets: Tensor, units: Tensor, group_size: int = 1, *, largest: int = 64) -> Tensor:
    """Units (|S|,), sorted, after the search from `units`; `gram` (n, n) is ridged, `targets` are (n, D)."""
    kept, count = units.sort().values, gram.shape[0] // group_size
    best = _explained(gram, targets, kept, group_size)
    size = min(largest, max(1, kept.numel() // 4), count - kept.numel())
    while size:
        for _ in range(ROUNDS):
            trial = _exchange(gram, targets, kept, group_size, size)
            explained = _explained(gram, targets, trial, group_size)
            if explained <= best * (1 + 1e-12):
                break
            kept, best = trial, explained
        size //= 2
    return kept


def _exchange(gram: Tensor, targets: Tensor, kept: Tensor, s: int, size: int) -> Tensor:
    inside = unit_columns(kept, s)
    inverse = torch.linalg.inv(gram[inside[:, None], inside])
    weights = inverse @ targets[inside]
    left = kept[_scores(inverse, weights, s).argsort(stable=True)[size:]].sort().values
    rest = torch.ones(gram.shape[0] // s, dtype=torch.bool).index_fill_(0, left, False).nonzero()[:, 0]
    inside, outside = unit_columns(left, s), unit_columns(rest, s)
    bridge = gram[outside[:, None], inside] @ torch.linalg.inv(gram[inside[:, None], inside])
    schur = gram[outside[:, None], outside] - bridge @ gram[inside[:, None], outside]
    residual = targets[outside] - bridge @ targets[inside]
    gains = _scores(schur, residual, s)
    return torch.cat([left, rest[gains.argsort(descending=True, stable=True)[:size]]]).sort().values


def _scores(blocks: Tensor, rows: Tensor, s: int) -> Tensor:
    """tr R_kᵀ(B_kk)⁻¹R_k of every unit k."""
    k = rows.shape[0] // s
    corner = blocks.reshape(k, s, k, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = rows.reshape(k, s, -1)
    return (parts * torch.linalg.solve(corner, parts)).sum((1, 2))


def _explained(gram: Tensor, targets: Tensor, units: Tensor, s: int) -> float:
    index = unit_columns(units, s)
    factor = torch.linalg.cholesky(gram[index[:, None], index])
    return float(torch.linalg.solve_triangular(factor, targets[index], upper=False).square().sum())

"""Steps on weight matrices that move all their directions alike: momentum made orthogonal.

Adam moves each number by about the rate. Numbers of a row that move the same way add up in what the layer gives, the
more so the more inputs it has and the larger their mean is, so that the rate of a deep network without normalisation is
set by its widest layers and the others hardly move. A step with orthogonal rows has one size in every direction,
whatever the width (K. Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOMENTUM = 0.95
ROUNDS = 5
QUINTIC = 3.4445, -4.7750, 2.0315  # Jordan's: five rounds bring singular values of 1 % and more to .7 … 1.2
SIDES = 8, 512  # shorter side of a matrix; below there is little to turn, above it costs more than the network's pass


def is_matrix(shape: torch.Size) -> bool:
    """Whether weights of this shape (D, K, …) are one matrix (D, K·…) of a size that is worth it.

    Those with one input a unit are not: maps that leave channels apart.
    """
    if len(shape) < 2 or shape[1] == 1:
        return False
    return SIDES[0] <= min(shape[0], math.prod(shape[1:])) <= SIDES[1]


def orthogonal_step(gradient: Tensor) -> Tensor:
    """A step (D, K, …) for a gradient (or its running mean) of that shape: as a matrix, about orthogonal.

    Its numbers' root mean square is about 1, as Adam's are about 1 each; zeros stay zeros.
    """
    turned = orthogonalised(gradient.flatten(1))
    return (turned * math.sqrt(max(turned.shape))).view_as(gradient)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest orthogonal matrix (D, K): its singular vectors, with singular values near 1.

    By a Newton–Schulz iteration, in 32 bits at least; directions of less than about 1 % of the largest stay behind.
    """
    numbers = matrix if matrix.dtype == torch.float64 else matrix.float()
    wide: Tensor = numbers if numbers.shape[0] <= numbers.shape[1] else numbers.T
    wide = wide / torch.linalg.vector_norm(wide).clamp_min(1e-30)
    first, third, fifth = QUINTIC
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = first * wide + (third * gram + fifth * gram @ gram) @ wide
    turned: Tensor = wide if numbers.shape[0] <= numbers.shape[1] else wide.T
    return turned.to(matrix.dtype)

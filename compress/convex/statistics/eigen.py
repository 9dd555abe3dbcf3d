"""Eigenvalues of Gram matrices, also of those that a divide-and-conquer routine gives up on."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def eigen_decomposition(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), rising, and eigenvectors (n, n), as columns, of a symmetric float64 matrix.

    Some LAPACK builds fail on small, mostly zero matrices (dead units) that others solve; NumPy's own is tried then.
    """
    try:
        values, vectors = torch.linalg.eigh(gram)
    except RuntimeError:
        values, vectors = (torch.from_numpy(part).to(gram) for part in numpy.linalg.eigh(gram.cpu().numpy()))
    return values, vectors


def eigen_values(gram: Tensor) -> Tensor:
    """Eigenvalues (n,) alone, rising."""
    try:
        values: Tensor = torch.linalg.eigvalsh(gram)
    except RuntimeError:
        values = torch.from_numpy(numpy.linalg.eigvalsh(gram.cpu().numpy())).to(gram)
    return values

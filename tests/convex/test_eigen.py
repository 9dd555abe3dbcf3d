"""Eigenvalues of Gram matrices that are mostly zero."""

from __future__ import annotations

import pytest
import torch

from compress.convex.statistics.eigen import eigen_decomposition, eigen_values


@pytest.mark.parametrize("scale", [1e-1, 4e-3, 1e-6])
def test_the_gram_matrix_of_mostly_dead_units_is_decomposed_at_every_scale(scale: float) -> None:
    alive = torch.arange(4, 864, 14)  # the other columns are zero; at 4e-3 one LAPACK build gives up on this matrix
    features = torch.randn(40, len(alive), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    gram = torch.zeros(864, 864, dtype=torch.float64)
    gram[alive[:, None], alive] = features.T @ features / 40
    values, vectors = eigen_decomposition(gram)
    top = float(values[-1])
    assert float((vectors * values @ vectors.T - gram).abs().max()) < 1e-13 * top
    assert float((eigen_values(gram) - values).abs().max()) < 1e-13 * top

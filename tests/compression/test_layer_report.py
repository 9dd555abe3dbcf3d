"""What a layer's report holds for its charts."""

from __future__ import annotations

import pytest
import torch

from compress.compression.layer import CURVE_POINTS, thinned
from compress.convex import Moments, width_bound


def test_a_long_curve_keeps_its_ends_and_few_points() -> None:
    values = torch.linspace(1, 0, 5000, dtype=torch.float64)
    points = thinned(values)
    assert len(points) == CURVE_POINTS
    assert points[0] == (0, 1.0)
    assert points[-1] == (4999, 0.0)
    assert all(value == pytest.approx(float(values[place]), rel=1e-4) for place, value in points if place is not None)


def test_the_spectra_are_the_relative_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    outputs = features @ torch.randn(6, 3, generator=generator, dtype=torch.float64)
    found = width_bound(Moments.of(features, outputs))
    for spectrum, matrix in ((found.feature_spectrum, features), (found.output_spectrum, outputs)):
        singular = torch.linalg.svdvals(matrix)
        assert torch.allclose(spectrum[: len(singular)], singular / singular[0], atol=1e-7)

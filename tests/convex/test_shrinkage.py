"""Moments of few samples: shrinkage tells chance from what the features have in common."""

from __future__ import annotations

import torch

from compress.convex import Moments, relative_error, select_units, shrink_moments, shrinkage_intensity


def sample(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Features (rows, columns) of which the second half nearly repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(rows, columns // 2, generator=generator, dtype=torch.float64)
    return torch.cat([half, half + 0.5 * torch.randn(half.shape, generator=generator, dtype=torch.float64)], 1)


def test_shrunk_moments_are_those_of_rows_with_noise_added() -> None:
    features, weights = sample(30, 8, 0), torch.randn(8, 3, dtype=torch.float64)
    moments = Moments.of(features, features @ weights)
    intensity = shrinkage_intensity(moments.gram, moments.count)
    noise = (intensity / (1 - intensity) * 30 * moments.gram.diagonal()).sqrt().diag()  # eight rows more
    augmented = torch.cat([features, noise])
    expected = Moments.of(augmented, augmented @ weights)
    found = shrink_moments(moments, weights)
    torch.testing.assert_close(found.gram, expected.gram * 38 / 30)
    torch.testing.assert_close(found.cross, expected.cross * 38 / 30)
    assert abs(found.energy - expected.energy * 38 / 30) < 1e-9 * found.energy
    assert relative_error(found, None, weights, intercept=False) < 1e-6


def test_intensity_falls_with_the_number_of_rows_and_is_whole_without_correlations() -> None:
    found = [shrinkage_intensity(Moments.of(sample(n, 40, 1), torch.zeros(n, 0)).gram, n) for n in (20, 200, 20_000)]
    assert 1 > found[0] > found[1] > found[2] > 0
    assert found[2] < 5e-3
    assert shrinkage_intensity(torch.eye(5, dtype=torch.float64), 100) == 1.0


def test_intensity_does_not_depend_on_the_scale_of_a_unit() -> None:
    features = sample(50, 10, 2)
    scaled = features * torch.logspace(-3, 3, 10, dtype=torch.float64)
    first, second = (Moments.of(each, torch.zeros(50, 0)).gram for each in (features, scaled))
    assert abs(shrinkage_intensity(first, 50) - shrinkage_intensity(second, 50)) < 1e-9


def test_with_fewer_rows_than_units_the_shrunk_curve_is_close_to_that_of_many_rows() -> None:
    weights = torch.randn(60, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    few, many = (Moments.of(each, each @ weights) for each in (sample(40, 60, 3), sample(20_000, 60, 5)))
    truth = select_units(many, intercept=False).errors[45]
    blind = select_units(few, intercept=False).errors[45]
    shrunk = select_units(shrink_moments(few, weights), intercept=False).errors[45]
    assert blind < 0.01 < truth
    assert 0.5 * truth < shrunk < 2 * truth


def test_a_dead_column_stays_dead() -> None:
    features = sample(20, 6, 6)
    features[:, 2] = 0
    weights = torch.ones(6, 2, dtype=torch.float64)
    assert float(shrink_moments(Moments.of(features, features @ weights), weights).gram[2, 2]) == 0

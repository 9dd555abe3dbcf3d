"""Reduced-rank regression against descents, singular values and the sizes that its factors should have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.convex import Moments, reduced_rank
from compress.convex.low_rank import balanced_factors, output_directions, truncated


def problem(samples: int, inputs: int, outputs: int, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Φ (N, n), of the given rank, and noisy Ψ (N, D) with means."""
    generator = torch.Generator().manual_seed(samples + inputs)
    mixing = torch.randn(rank or inputs, inputs, generator=generator, dtype=torch.float64)
    features = torch.randn(samples, rank or inputs, generator=generator, dtype=torch.float64) @ mixing + 0.7
    weights = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return features, features @ weights + noise - 1.3


def objective(features: Tensor, targets: Tensor, weights: Tensor, bias: Tensor, ridge: float) -> Tensor:
    centred = features - features.mean(0)
    left = (targets - features @ weights - bias).square().sum() / len(features)
    penalty: Tensor = left + ridge * (centred.square().mean(0) * weights.square().sum(1)).sum()
    return penalty


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 5), (4, 9)])
@pytest.mark.parametrize("ridge", [1e-8, 0.3])
def test_no_descent_finds_a_better_map_of_the_rank(inputs: int, outputs: int, ridge: float) -> None:
    features, targets = problem(80, inputs, outputs)
    found = reduced_rank(Moments.of(features, targets), 2, ridge=ridge)
    best = float(objective(features, targets, found.coefficients, found.intercept, ridge))
    reached = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(inputs, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        right = torch.randn(2, outputs, generator=generator, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(outputs, dtype=torch.float64, requires_grad=True)
        descent = torch.optim.LBFGS(
            [left, right, bias], max_iter=3000, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            descent.zero_grad()  # noqa: B023
            value = objective(features, targets, left @ right, bias, ridge)  # noqa: B023
            value.backward()
            return value

        descent.step(loss)  # type: ignore[no-untyped-call]
        reached.append(float(loss().detach()))
    assert best <= min(reached) * (1 + 1e-9)
    assert best == pytest.approx(min(reached), rel=1e-6)


def test_with_white_features_it_is_the_truncated_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.linalg.qr(torch.randn(40, 7, generator=generator, dtype=torch.float64)).Q
    weights = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    found = reduced_rank(Moments.of(features, features @ weights), 3, ridge=0.0, intercept=False)
    left, values, right = torch.linalg.svd(weights, full_matrices=False)
    assert torch.allclose(found.coefficients, (left[:, :3] * values[:3]) @ right[:3], atol=1e-10)
    assert found.error == pytest.approx(float(values[3:].norm() / values.norm()))
    assert not found.intercept.any()


@pytest.mark.parametrize("outputs", [5, 12])
def test_rank_deficient_features_have_finite_maps_of_the_rank(outputs: int) -> None:
    features, targets = problem(60, 8, outputs, rank=3)
    features[:, 5] = 0.0
    found = reduced_rank(Moments.of(features, targets), 2)
    assert bool(torch.isfinite(found.coefficients).all())
    assert int(torch.linalg.matrix_rank(found.coefficients, rtol=1e-8)) == 2
    assert not found.coefficients[5].any()


def test_a_rank_that_nothing_is_cut_off_by_leaves_the_least_squares_fit() -> None:
    moments = Moments.of(*problem(60, 4, 6)).centred()
    full = reduced_rank(moments, 4)
    weights = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(truncated(moments, weights, 4), weights, atol=1e-10)
    assert full.error < reduced_rank(moments, 3).error < reduced_rank(moments, 1).error


def test_rescaled_features_change_no_output() -> None:
    features, targets = problem(60, 5, 4)
    scale = torch.tensor([1e-3, 1.0, 20.0, 300.0, 1.0], dtype=torch.float64)
    one, other = (reduced_rank(Moments.of(each, targets), 2, ridge=0.1) for each in (features, features * scale))
    assert torch.allclose(features @ one.coefficients, features * scale @ other.coefficients, atol=1e-8)


def test_the_directions_are_orthonormal_and_a_rank_below_one_is_refused() -> None:
    moments = Moments.of(*problem(60, 4, 9)).centred()
    weights = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    directions = output_directions(moments, weights, 3, 0.0)
    assert torch.allclose(directions.T @ directions, torch.eye(3, dtype=torch.float64), atol=1e-12)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        reduced_rank(moments, 0)


def test_factors_multiply_to_the_matrix_and_are_of_one_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = 100 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    matrix = matrix @ torch.randn(3, 5, generator=generator, dtype=torch.float64)
    left, right = balanced_factors(matrix, 3)
    assert torch.allclose(left @ right, matrix)
    assert torch.allclose(left.T @ left, right @ right.T, atol=1e-8)

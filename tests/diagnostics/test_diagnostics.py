"""Diagnostics against independent formulas: Jacobian norms, forces at a stationary point, cost, aligned units."""

import json

import pytest
import torch

from compress.cli import main
from compress.convex import Moments
from compress.demo import CHECKPOINT
from compress.diagnostics.forces import aligned_units, hidden_forces, representation_cost
from compress.diagnostics.lipschitz import jacobian_norms
from compress.models import digits_net, mlp


@pytest.mark.parametrize(("build", "shape"), [(lambda: mlp((6, 9, 7, 4)), (5, 6)), (digits_net, (3, 1, 8, 8))])
def test_the_jacobian_norm_is_the_largest_singular_value(build, shape):
    torch.manual_seed(0)
    module, inputs = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    exact = []
    for sample in inputs:
        jacobian = torch.autograd.functional.jacobian(lambda x: module(x[None])[0], sample)
        exact.append(torch.linalg.matrix_norm(jacobian.flatten(1), 2))
    found = jacobian_norms(module, inputs, iterations=2000, tolerance=1e-12)
    assert torch.allclose(found, torch.stack(exact), rtol=1e-6)


def linear_layer(power):
    """A linear hidden layer over whitened inputs with outputs Y = U S² Rᵀ and Z = U S^power Qᵀ, centred."""
    generator = torch.Generator().manual_seed(0)
    below = torch.eye(6, dtype=torch.float64)  # CXXᵀC = C
    centred = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(centred - centred.mean(0))[0]
    right, mixing = (torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64))[0] for n in (4, 5))
    scale = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    return below, left * scale**power @ mixing.T, left * scale**2 @ right.T


def test_attraction_equals_repulsion_where_the_squared_weights_are_least():
    """‖W₁‖² + ‖W₂‖² subject to XW₁W₂ = Y is least (a nuclear norm) where Z takes the square root of Y's spectrum."""
    below, hidden, above = linear_layer(1.0)
    forces = hidden_forces(below, hidden, torch.ones_like(hidden), hidden, above)
    assert forces.residual < 1e-10
    assert float(forces.attraction.norm()) > 0.1
    below, hidden, above = linear_layer(1.5)
    assert hidden_forces(below, hidden, torch.ones_like(hidden), hidden, above).residual > 0.1


def test_the_forces_are_the_gradients_of_the_two_costs():
    torch.manual_seed(0)
    below, above = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    hidden = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)

    def cost(features, outputs):
        features, outputs = features - features.mean(0), outputs - outputs.mean(0)
        return 0.5 * (torch.linalg.pinv(features) @ outputs).square().sum()

    (pull,) = torch.autograd.grad(cost(below, hidden), hidden)
    (push,) = torch.autograd.grad(cost(torch.tanh(hidden), above), hidden)
    with torch.no_grad():
        features = torch.tanh(hidden)
        forces = hidden_forces(below, hidden, 1 - features**2, features, above)
    assert torch.allclose(forces.attraction, pull, rtol=1e-6, atol=1e-9)
    assert torch.allclose(forces.repulsion, -push, rtol=1e-6, atol=1e-9)


def test_the_representation_cost_is_that_of_the_least_norm_weights():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator, dtype=torch.float64) @ torch.randn(
        4, 7, generator=generator, dtype=torch.float64
    )
    weights = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    least = torch.linalg.pinv(features) @ (features @ weights)
    cost = representation_cost(Moments.of(features, features @ weights), weights)
    assert torch.allclose(cost, least.square().sum(1), rtol=1e-6)
    assert float(cost.sum()) < float(weights.square().sum())


def test_positive_multiples_are_found_and_negative_ones_are_not():
    base = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = torch.stack([base[:, 0], base[:, 1], 2.5 * base[:, 0], -base[:, 1], 0.1 * base[:, 0], 0 * base[:, 0]], 1)
    assert aligned_units(features.T @ features) == [[0, 2, 4]]


def test_inspect_deep_reports_what_the_layers_learned(capsys):
    code = main(["inspect", str(CHECKPOINT), "--data", "digits", "--calibration-samples", "64", "--deep",
                 "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["jacobian_norms"]["largest"] >= found["jacobian_norms"]["median"] > 0
    for layer in found["layers"]:
        if layer["skipped"] is None:
            assert 0 < layer["representation_cost"] <= layer["output_squares"] * (1 + 1e-9)
            assert 0 <= layer["force_residual"] <= 1
            assert layer["spectrum_features"][0] == pytest.approx(1)

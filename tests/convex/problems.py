"""Seeded problems of every kind, and an independent check of certificates."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from compress.convex import Moments, MultitaskLasso

KINDS = (
    "well-posed",
    "dead unit",
    "twin units",
    "rank-deficient",
    "tiny penalty",
    "conv groups",
    "one output",
    "one unit",
)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem_of_kind(kind: str, seed: int = 0) -> MultitaskLasso:
    generator = torch.Generator().manual_seed(seed)
    units, outputs, size, rows, fraction = 12, 4, 1, 40, 0.1
    if kind == "conv groups":
        units, size = 8, 3
    if kind == "one output":
        outputs = 1
    if kind == "one unit":
        units = 1
    if kind == "tiny penalty":
        fraction = 1e-4
    features = normal(generator, rows, units * size)
    if kind == "dead unit":
        features[:, 3] = 0
    if kind == "twin units":
        features[:, 5] = 2 * features[:, 2]
        features[:, 7] = -features[:, 2]
    if kind == "rank-deficient":
        features = normal(generator, rows, 5) @ normal(generator, 5, units * size)
    outputs_ = features @ normal(generator, units * size, outputs) + 0.3 * normal(generator, rows, outputs)
    moments = Moments.of(features, outputs_, group_size=size)
    costs = 0.5 + torch.rand(units, generator=generator, dtype=torch.float64)
    top = MultitaskLasso(moments, 0.0, costs).lambda_max
    return MultitaskLasso(moments, fraction * top, costs)


def independent_certificate(problem: MultitaskLasso, coefficients: Tensor) -> tuple[float, float]:
    """Primal value and a lower bound of the minimum, written from the definition with numpy alone.

    The dual of min ½‖Ψ − ΦV‖²/N + λΣc‖v_k‖ is max ½‖Ψ‖²/N − ½‖Ψ − θ‖²/N over ‖Φ_kᵀθ‖/N ≤ λc_k; θ = t(Ψ − ΦV).
    """
    moments = problem.moments
    gram, cross = moments.gram.numpy(), moments.cross.numpy()
    v, energy, s = coefficients.numpy(), moments.energy, moments.group_size
    costs = problem.costs.numpy()
    norms = numpy.array([numpy.linalg.norm(v[k * s : k * s + s]) for k in range(costs.size)])
    quadratic, linear = float(numpy.sum(v * (gram @ v))), float(numpy.sum(v * cross))
    residual = energy - 2 * linear + quadratic
    primal = residual / 2 + problem.penalty * float(costs @ norms)
    correlation = cross - gram @ v
    ratios = [numpy.linalg.norm(correlation[k * s : k * s + s]) / costs[k] for k in range(costs.size)]
    t = min(1.0, problem.penalty / max(ratios)) if max(ratios) > 0 else 1.0
    # ‖Ψ − θ‖² = ‖(1 − t)Ψ + tΦV‖²
    far = (1 - t) ** 2 * energy + 2 * t * (1 - t) * linear + t**2 * quadratic
    return primal, (energy - far) / 2

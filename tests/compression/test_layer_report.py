"""What a layer's report holds for its charts, and that a layer's result is the same value when it is read again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from compress.compression.layers.decisions import Within, same_for_all
from compress.compression.layers.layer import LayerOptions
from compress.compression.layers.result import CURVE_POINTS, Settled, thinned
from compress.compression.sweep import sweep
from compress.convex import Moments, width_bound
from compress.progress import SilentProgress
from tests.compression.test_schedule import make_problem


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


def test_a_result_that_is_kept_for_a_later_run_comes_back_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    problem = make_problem(module, 6)
    (layer,) = sweep(problem, same_for_all(problem.groups, Within(0.3)), LayerOptions(), SilentProgress()).results
    tensors, about = Settled.of(layer).to_file()
    again = Settled.from_file(tensors, json.loads(json.dumps(about)))
    assert again is not None
    assert again.layer is not None
    assert (again.layer.report, again.layer.lacks_memory) == (layer.report, layer.lacks_memory)
    assert torch.equal(again.layer.kept, layer.kept)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in layer.weights.items())

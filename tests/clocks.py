"""A clock that counts parameters, for tests: what a real one says depends on what else the machine does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from compress.graph.cost import Latency, count_parameters

CALL = 0.2  # milliseconds of a network without parameters


def use_steady_clock(patch: pytest.MonkeyPatch) -> None:
    """A linear map takes a microsecond a weight, a network one a parameter and `CALL`."""
    patch.setattr(
        "compress.compression.pricing.latency.time_once", lambda _map, _shape, weight, _: 1e-3 * weight.numel()
    )
    for place in ("pricing.latency", "pricing.pairs", "searching.search"):
        patch.setattr(f"compress.compression.{place}.measure_latency", count)


def count(modules: Sequence[nn.Module], inputs: Sequence[Tensor], **_: Any) -> list[Latency]:
    """In the place of `measure_latency`."""
    times = [CALL + 1e-3 * count_parameters(module) for module in modules]
    return [Latency(time, len(inputs[0]), 1, "cpu", 1, time) for time in times]

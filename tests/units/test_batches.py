"""How many samples a batch may have where single tensors are large."""

from __future__ import annotations

import pytest
from torch import nn

import compress.units.network as network
from tests.compression.test_schedule import make_problem


def test_a_batch_is_halved_until_its_largest_tensor_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = make_problem(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).eval(), 8).network
    assert traced.batch_within(48) == 48
    monkeypatch.setattr(network, "LARGEST", 4 * 64 * 12)
    assert traced.batch_within(48) == 12
    monkeypatch.setattr(network, "LARGEST", 1)
    assert traced.batch_within(48) == 3
    assert traced.batch_within(2) == 2

"""Allocation of widths under budgets."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.compression.pricing.allocate import (
    Choices,
    DamageCurve,
    allocate,
    damage_curve,
    legal_widths,
    relative_costs,
)
from compress.compression.pricing.costs import CostModel, SizedTensor
from compress.errors import GateError


def chain(units: list[int]) -> CostModel:
    """A multilayer perceptron 3 → units… → 2 whose hidden layers are the groups a, b, …."""
    names = "abcdef"[: len(units)]
    sizes = [3, *units, 2]
    groups = [None, *names, None]
    tensors = tuple(
        SizedTensor(
            f"w{index}",
            (sizes[index + 1], sizes[index]),
            tuple(((group, 1),) if group else () for group in (groups[index + 1], groups[index])),
            1,
        )
        for index in range(len(sizes) - 1)
    )
    return CostModel(dict(zip(names, units, strict=True)), tensors)


def curve(errors: list[float], scale: float = 1.0) -> DamageCurve:
    """Damage proportional to the squared error."""
    values = torch.tensor(errors, dtype=torch.float64)
    return damage_curve(values, [(1, scale * float(values[1]) ** 2)], legal_widths(len(errors) - 1, 1, 1))


def falling(count: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return [1.0, *torch.rand(count, generator=generator).sort(descending=True).values.tolist()]


def test_costs_are_those_of_the_smaller_network() -> None:
    model = chain([5, 4])
    assert model.parameters({}) == 3 * 5 + 5 * 4 + 4 * 2
    assert model.parameters({"a": 2, "b": 3}) == 3 * 2 + 2 * 3 + 3 * 2
    assert model.slope("params", {"a": 5, "b": 3}, "a") == 3 + 3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.25, 0.9))
def test_every_budget_is_kept_and_the_damage_is_near_the_best(seed: int, limit: float) -> None:
    model = chain([6, 5])
    curves = {"a": curve(falling(6, seed)), "b": curve(falling(5, seed + 1), 3.0)}
    found = allocate(Choices(model, curves), {"params": limit})
    assert relative_costs(model, found.widths)["params"] <= limit + 1e-12
    best = min(
        float(curves["a"].damage[a] + curves["b"].damage[b])
        for a, b in itertools.product(range(1, 7), range(1, 6))
        if relative_costs(model, {"a": a, "b": b})["params"] <= limit
    )
    assert best - 1e-12 <= found.damage <= 2.5 * best + 0.05


def test_two_budgets_are_kept_together() -> None:
    model = chain([8, 8])
    curves = {"a": curve(falling(8, 1)), "b": curve(falling(8, 2))}
    found = allocate(Choices(model, curves), {"params": 0.6, "macs": 0.5})
    costs = relative_costs(model, found.widths)
    assert costs["params"] <= 0.6
    assert costs["macs"] <= 0.5


def test_an_impossible_budget_says_what_can_be_had() -> None:
    model = chain([4, 4])
    curves = {"a": curve(falling(4, 1)), "b": curve(falling(4, 2))}
    with pytest.raises(GateError, match=r"params 0\.1 was asked for, params 0\.1\d+ is the least"):
        allocate(Choices(model, curves), {"params": 0.1})


def test_a_more_sensitive_layer_stays_wider() -> None:
    model = chain([8, 8])
    errors = falling(8, 3)
    found = allocate(Choices(model, {"a": curve(errors), "b": curve(errors, 100.0)}), {"params": 0.5})
    assert found.widths["b"] > found.widths["a"]


def test_damage_goes_through_the_measured_points_and_never_rises() -> None:
    errors = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64)
    found = damage_curve(errors, [(2, 0.3), (4, 0.004)], (1, 2, 3, 4, 5))
    assert float(found.damage[2]) == pytest.approx(0.3)
    assert float(found.damage[4]) == pytest.approx(0.004)
    assert bool((found.damage[1:] <= found.damage[:-1]).all())


@pytest.mark.parametrize(
    ("units", "blocks", "multiple", "expected"),
    [(8, 1, 1, (1, 2, 3, 4, 5, 6, 7, 8)), (10, 1, 4, (4, 8, 10)), (12, 3, 2, (6, 12)), (3, 1, 8, (3,))],
)
def test_legal_widths_suit_rounding_and_blocks(
    units: int, blocks: int, multiple: int, expected: tuple[int, ...]
) -> None:
    assert legal_widths(units, blocks, multiple) == expected


def test_slack_is_spent_where_the_measured_damage_is_flat() -> None:
    model = chain([8, 6])
    errors = torch.linspace(1, 0, 9, dtype=torch.float64)
    flat = damage_curve(errors, [(2, 0.5), (6, 0.5)], legal_widths(8, 1, 1))  # no worse at 2 units than at 6
    found = allocate(Choices(model, {"a": flat, "b": curve(falling(6, 0), 30.0)}), {"params": 0.8})
    assert found.widths == {"a": 6, "b": 6}

"""Errors at every width from one factorisation: those of a refit to each width alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.compression.layers.nested import Errors, NestedRefits, best_ridge
from compress.compression.layers.refit import is_scarce, refit_change, ridges_for
from compress.convex import Moments
from compress.convex.statistics.moments import unit_columns

RIDGE = 1e-8


def halves(rows: int) -> tuple[Moments, Moments, Tensor]:
    """Fitting and held-back moments of 15 units of two columns, one constant, and weights as they are (30, 5)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2 * rows, 30, dtype=torch.float64, generator=generator).relu() + 0.5
    features[:, 7] = 0
    weights = torch.randn(30, 5, dtype=torch.float64, generator=generator)
    outputs = features @ weights + torch.randn(2 * rows, 5, dtype=torch.float64, generator=generator)
    first, second = (Moments.of(features[half::2], outputs[half::2], group_size=2) for half in (0, 1))
    return first, second, weights + torch.randn(30, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("rows", [60, 2000])
@pytest.mark.parametrize("intercept", [False, True])
def test_every_width_errs_as_its_own_refit_does(intercept: bool, rows: int, spare: bool) -> None:
    part, check, before = halves(rows)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    columns, ridges, scarce = unit_columns(order, 2), ridges_for(part, RIDGE), is_scarce(part)
    nested = NestedRefits(part, check, columns, before[columns], ridges, intercept, scarce, spare=spare)
    for width in (15, 2, 9, 1):
        kept = order[:width].sort().values
        rows_kept = unit_columns(kept, 2)
        refit = refit_change(part.subset(kept), check.subset(kept), before[rows_kept], RIDGE, intercept=intercept)
        nested.place, nested._settled = refit.place, False
        assert nested.errors(width, refit.place).fitting == pytest.approx(refit.error, abs=1e-8)
        assert nested.errors(width, refit.place).held_back == pytest.approx(refit.held_back_error, abs=1e-8)
        assert nested.held_back_error(width) <= refit.held_back_error + 1e-8


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("rows", [60, 2000])
def test_all_widths_of_a_tail_err_as_each_alone_does(
    rows: int, intercept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, check, before = halves(rows)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    assert 3 in order[2:].tolist()  # the unit with the constant column is of the tail
    columns, ridges = unit_columns(order, 2), ridges_for(part, RIDGE)
    together, alone = (
        NestedRefits(part, check, columns, before[columns], ridges, intercept, is_scarce(part)) for _ in range(2)
    )
    monkeypatch.setattr(together, "_is_tail", lambda width: True)
    monkeypatch.setattr(alone, "_is_tail", lambda width: False)
    for place in (0, 3, 5):
        for width in (10, 14, 3, 12, 1, 15, 7):
            found, wanted = together.errors(width, place), alone.errors(width, place)
            assert found.fitting == pytest.approx(wanted.fitting, rel=1e-9)
            assert found.held_back == pytest.approx(wanted.held_back, rel=1e-9)
        assert len(together._tails[place]) == 14


def test_widths_near_all_units_come_from_one_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(400, columns, dtype=torch.float64, generator=generator) for columns in (64, 64, 32, 32)]
    part, check = (Moments.of(rows[half], rows[half + 2], group_size=1) for half in (0, 1))
    nested = NestedRefits(part, check, torch.arange(64), torch.zeros(64, 32).double(), (1e-8, 1e-2), True, False)
    refit, widths = nested._refit, []
    monkeypatch.setattr(nested, "_refit", lambda width, place: widths.append(width) or refit(width, place))
    for width in (64, 58, 63, 57, 60, 8):
        nested.errors(width, 0)
    assert widths == [64, 8]


@pytest.mark.parametrize("start", range(6))
def test_the_best_ridge_is_reached_from_any_other(start: int) -> None:
    held_back = (5.0, 4.0, 3.0, 2.0, 3.0, 4.0)
    assert best_ridge(lambda place: Errors(1.0, held_back[place]), 6, start) == 3


def test_where_no_noise_is_fitted_the_weakest_ridge_is_taken_at_once() -> None:
    tried: list[int] = []

    def errors_at(place: int) -> Errors:
        tried.append(place)
        return Errors(1.0, 1.01 - 0.001 * place)

    assert best_ridge(errors_at, 6) == 0
    assert tried == [0]
    assert best_ridge(errors_at, 6, scarce=True) == 5


def test_where_memory_is_spared_each_ridge_is_factored_for_few_widths() -> None:
    part, check, before = halves(60)
    columns, ridges = torch.arange(30), ridges_for(part, RIDGE)
    nested = NestedRefits(part, check, columns, before, ridges, True, is_scarce(part), spare=True)
    nested.held_back_error(9)
    place = nested.place
    for width in (3, 12, 6):
        assert nested.held_back_error(width) == nested.errors(width, place).held_back

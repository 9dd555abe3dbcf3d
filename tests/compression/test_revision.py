"""The allocation revised once by what the first sweep measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compress.compression.layers.layer import LayerOptions
from compress.compression.pricing.allocate import DamageCurve, allocate
from compress.compression.searching.curves import Search, prepare_search
from compress.compression.searching.damage import measure_divergences
from compress.compression.searching.revision import (
    corrected,
    damages_together,
    error_factors,
    revised_allocation,
    with_less_damage,
    worth_a_sweep,
)
from compress.compression.searching.search import revised, search_widths
from compress.compression.sweep import Compressed
from compress.progress import SilentProgress
from tests.compression.test_schedule import make_problem

BUDGETS = {"macs": 0.6}


@pytest.fixture(scope="module")
def search() -> Search:
    """Curves of a network of four linear maps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU()]
        return prepare_search(
            make_problem(nn.Sequential(*layers, nn.Linear(24, 4)), 12), LayerOptions(), SilentProgress()
        )


def swept(search: Search, factors: tuple[float, ...]) -> Compressed:
    """A sweep in which each layer errs so many times as much as its curve says at half of its width."""
    results = []
    for (name, curve), factor in zip(search.damages.items(), factors, strict=True):
        fit = SimpleNamespace(held_back_error=factor * float(curve.errors[12]))
        results.append(SimpleNamespace(name=name, kept=torch.arange(12), is_cut=True, report=SimpleNamespace(fit=fit)))
    return Compressed(results, {}, None, None)  # type: ignore[arg-type]


def scored(held_back: float, fitting: float | None = None) -> Compressed:
    """A result with these distances, on 20 held-back and 80 fitting samples."""

    def score(distance: float | None, samples: int) -> Any:
        return None if distance is None else SimpleNamespace(distance=distance, samples=samples)

    return Compressed([], {}, score(fitting, 80), score(held_back, 20))


def test_what_all_layers_err_more_moves_no_width(search: Search) -> None:
    factors = error_factors(search, swept(search, (1.5, 1.5, 1.5)))
    assert list(factors.values()) == pytest.approx([1.0, 1.0, 1.0])
    tried = allocate(search.choices, BUDGETS)
    assert revised_allocation(search, tried, swept(search, (1.5, 1.5, 1.5)), BUDGETS) is None


def test_widths_stand_where_the_layers_damages_add_up_to_what_was_measured(search: Search) -> None:
    tried, compressed = allocate(search.choices, BUDGETS), swept(search, (0.6, 0.6, 2.5))
    for factor, stands in ((1.1, True), (1.5, False)):
        measured = replace(compressed, held_back=scored(factor * tried.damage).held_back)
        assert (revised_allocation(search, tried, measured, BUDGETS) is None) is stands


def test_a_layer_that_erred_more_than_the_others_gets_more_units(search: Search) -> None:
    tried = allocate(search.choices, BUDGETS)
    found = revised_allocation(search, tried, swept(search, (0.6, 0.6, 2.5)), BUDGETS)
    assert found is not None
    last = list(search.damages)[-1]
    assert found.widths[last] > tried.widths[last]
    assert found.costs["macs"] <= BUDGETS["macs"]


def test_all_layers_cut_at_once_lose_what_the_network_with_their_refits_does(search: Search) -> None:
    tried = allocate(search.choices, BUDGETS).widths
    one = {name: 12 if number == 1 else 24 for number, name in enumerate(tried)}
    whole, alone, several = damages_together(search, [dict.fromkeys(tried, 24), one, tried], LayerOptions())
    name = list(tried)[1]
    measured = measure_divergences(
        search.problem,
        search.moments,
        search.curves,
        {name: [12]},
        LayerOptions(),
        samples=search.problem.held_back.count,
    )
    assert whole == pytest.approx(0.0, abs=1e-9)
    assert alone == pytest.approx(measured[name][0][1])
    assert several > 0


def test_widths_that_lose_more_when_all_are_cut_at_once_are_not_swept(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = (allocate(search.choices, {"macs": share}) for share in (0.4, 0.8))
    narrow_damage, wide_damage = damages_together(search, [narrow.widths, wide.widths], LayerOptions())
    swept_wide, swept_narrow = scored(wide_damage), scored(narrow_damage)
    assert worth_a_sweep(search, narrow, swept_narrow, wide, LayerOptions())
    assert not worth_a_sweep(search, wide, swept_wide, narrow, LayerOptions())
    assert worth_a_sweep(search, wide, scored(wide_damage / 2), narrow, LayerOptions())  # refits took half of it back
    assert worth_a_sweep(replace(search, moments={}), wide, swept_wide, narrow, LayerOptions())
    whole = search_widths(search, LayerOptions(), SilentProgress(), budgets={"macs": 0.8}, wanted=None)
    first = replace(whole, allocation=wide, compressed=swept_wide)
    monkeypatch.setattr("compress.compression.searching.search.revised_allocation", lambda *_: narrow)
    assert revised(first, BUDGETS, LayerOptions(), lambda _: pytest.fail("a sweep was made")) is first


def test_one_layer_alone_tells_nothing(search: Search) -> None:
    only = swept(search, (2.0, 2.0, 2.0))
    assert error_factors(search, replace(only, results=only.results[:1])) == {}


def test_a_curve_moves_along_its_own_errors_and_never_rises() -> None:
    errors = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    curve = DamageCurve(errors.square(), (1, 2, 3), errors)
    assert corrected(curve, 2.0).damage.tolist() == pytest.approx([4.0, 1.0, 0.25, 0.0])
    assert corrected(curve, 0.5).damage.tolist() == pytest.approx([0.25, 0.0625, 0.015625, 0.0])
    assert torch.equal(corrected(curve, 1.0).damage, curve.damage)


@pytest.mark.parametrize(
    ("first", "second", "less"),
    [
        (scored(0.2), scored(0.1), True),
        (scored(0.1), scored(0.2), False),
        (scored(0.1, 0.3), scored(0.12, 0.2), True),
        (scored(0.1, 0.3), scored(0.12), False),
        (Compressed([], {}, None, None), scored(0.1), False),
    ],
)
def test_all_samples_that_both_were_scored_on_decide(first: Compressed, second: Compressed, less: bool) -> None:
    assert with_less_damage(first, second) is less


def test_the_better_of_both_sweeps_is_taken_and_comes_last_among_the_trials(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search_widths(search, LayerOptions(), SilentProgress(), budgets=BUDGETS, wanted=None)
    other = replace(whole.allocation, widths={**whole.allocation.widths})
    monkeypatch.setattr("compress.compression.searching.search.revised_allocation", lambda *_: other)
    monkeypatch.setattr("compress.compression.searching.search.worth_a_sweep", lambda *_: True)
    for distance, taken in ((0.1, 1), (9.0, 0)):
        trials: list[Any] = ["first"]
        first = replace(whole, compressed=scored(1.0), trials=trials)
        second = replace(whole, compressed=scored(distance), trials=trials)

        def attempt(_: Any, trials: list[Any] = trials, second: Any = second) -> Any:
            trials.append("second")
            return second

        assert revised(first, BUDGETS, LayerOptions(), attempt) is (second if taken else first)
        assert trials[-1] == ("second" if taken else "first")

"""What a decision about a layer comes to."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.compression.layers.decisions import count_to_keep, largest_error, round_up, smallest_width


@given(st.floats(1e-3, 5000), st.integers(1, 4096))
def test_a_count_to_keep_is_always_possible(keep: float, units: int) -> None:
    assert 1 <= count_to_keep(keep, units) <= units


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 512))
def test_rounding_never_narrows_and_never_exceeds_all_units(width: int, multiple: int, units: int) -> None:
    width = min(width, units)
    rounded = round_up(width, multiple, units)
    assert width <= rounded <= units
    assert rounded == units or rounded % multiple == 0


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=40),
    st.floats(0.001, 0.9),
    st.floats(0, 0.5),
    st.none() | st.integers(0, 50),
)
def test_the_smallest_width_passes_and_one_less_does_not(
    drops: list[float], allowed: float, floor: float, guess: int | None
) -> None:
    errors = sorted((floor + drop for drop in drops), reverse=True)
    errors[-1] = floor  # with all units, only the unavoidable error is left
    width = smallest_width(lambda units: errors[units - 1], len(errors), allowed, floor, guess)
    limit = largest_error(allowed, floor) * (1 + 1e-9)
    assert errors[width - 1] <= limit
    assert width == 1 or errors[width - 2] > limit


def test_an_error_that_falls_geometrically_takes_few_tries() -> None:
    tried: list[int] = []

    def error(width: int) -> float:
        tried.append(width)
        return math.exp(-6 * width / 1024)

    width = smallest_width(error, 1024, 0.1, error(1024), guess=300)
    assert error(width) <= largest_error(0.1, error(1024)) < error(width - 1)
    assert len(set(tried)) <= 8  # halving takes ten


def test_a_bad_fit_of_all_units_does_not_excuse_a_small_width() -> None:
    errors = [0.64, 0.51, 0.44, 0.36, 0.17, 0.12, 0.1, 0.09, 0.09, 0.49]
    assert smallest_width(lambda units: errors[units - 1], 10, 0.1, errors[-1]) == 6


@given(st.floats(1e-3, 0.9), st.floats(0, 1))
def test_what_an_error_may_add_is_a_share_of_what_all_units_explain(allowed: float, floor: float) -> None:
    explained = 1 - floor**2
    left = 1 - largest_error(allowed, floor) ** 2
    assert left == pytest.approx((1 - allowed**2) * explained, abs=1e-12)


def test_few_units_do_not_pass_because_earlier_cuts_left_little_to_explain() -> None:
    errors = [0.9011, 0.8972, 0.8965, 0.8959, 0.8958]  # as of 3, 7, 15, 25 and all 64 units
    assert smallest_width(lambda units: errors[units - 1], 5, 0.05, errors[-1]) == 4

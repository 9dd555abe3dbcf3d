"""What more samples would bring a recovery."""

from __future__ import annotations

import numpy as np
import pytest

from compress.training.forecast import FURTHER, Point, forecast

COUNTS = (180, 540, 1800)


def points(power: float, noise: float, held_back: int = 200, counts: tuple[int, ...] = COUNTS) -> list[Point]:
    """Distances that fall as a power of the samples, each held-back sample with a size of its own."""
    drawn = np.random.default_rng(0)
    own = drawn.exponential(size=held_back)
    return [Point(count, own * count**-power * np.exp(noise * drawn.normal(size=held_back))) for count in counts]


def test_a_power_law_is_carried_on_within_its_range() -> None:
    found = forecast(points(0.2, 0.1))
    assert found is not None
    assert found.left == pytest.approx(FURTHER**-0.2, abs=0.03)
    assert found.low <= FURTHER**-0.2 <= found.high
    assert [samples for samples, _ in found.points] == list(COUNTS)


def test_more_noise_widens_the_range() -> None:
    quiet, loud = (forecast(points(0.2, noise)) for noise in (0.05, 0.3))
    assert quiet is not None
    assert loud is not None
    assert loud.high - loud.low > 2 * (quiet.high - quiet.low)


@pytest.mark.parametrize(
    "given",
    [
        points(0.0, 0.3),
        points(-0.1, 0.05),
        points(0.02, 0.5),
        points(0.2, 0.1, held_back=20),
        points(0.2, 0.1, counts=COUNTS[:2]),
        points(0.2, 3.0),
        [Point(count, np.zeros(200)) for count in COUNTS],
        [Point(count, np.full(200, np.nan)) for count in COUNTS],
    ],
    ids=["flat", "rising", "lost in noise", "few held back", "two points", "wide", "nothing left", "no numbers"],
)
def test_nothing_is_said_where_the_points_do_not_tell(given: list[Point]) -> None:
    assert forecast(given) is None

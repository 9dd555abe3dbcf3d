"""What more samples without labels would bring a recovery, from what parts of those at hand brought.

How far the outputs lie from the original's on samples held back falls about as a power of the number of samples that a
network is adjusted on (Hestness et al., 2017, of learning curves in general). The power is fitted to recoveries of the
same number of epochs on nested parts; held-back samples drawn again with replacement say how sure it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 500  # of the held-back samples
CONFIDENCE = 0.9
FURTHER = 5  # times the samples at hand, that a forecast is made for
FEWEST_POINTS = 3
FEWEST_HELD_BACK = 50  # samples whose mean says something
CERTAIN = 0.25  # widest range of the forecast share of the distance that is told


@dataclass(frozen=True, eq=False)
class Point:
    """A recovery on a part of the samples: how many, and how far each held-back sample (N,) lies from the original."""

    samples: int
    distances: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """What `FURTHER` times the samples would bring.

    Attributes:
        points: (samples, mean distance) that it was fitted to, the last with all samples at hand.
        left: share of the distance with all samples at hand that would be left; `low` and `high` bound it at 90 %.
    """

    points: tuple[tuple[int, float], ...]
    left: float
    low: float
    high: float


def forecast(points: Sequence[Point], *, seed: int = 0) -> Forecast | None:
    """The distance with `FURTHER` times the samples of the last point; None where the points do not tell.

    They do not where there are too few points or held-back samples, where the distance does not fall from each point to
    the next, where it may as well not fall at all, or where the range is wide.
    """
    if len(points) < FEWEST_POINTS or len(points[0].distances) < FEWEST_HELD_BACK:
        return None
    rows = np.stack([point.distances for point in points])  # (P, N)
    means = rows.mean(1)
    if not np.isfinite(rows).all() or not (means > 0).all() or not (np.diff(means) < 0).all():
        return None
    logs = np.log([point.samples for point in points])
    power = float(powers(logs, means[:, None])[0])
    drawn = np.random.default_rng(seed).integers(0, rows.shape[1], (DRAWS, rows.shape[1]))
    resampled = np.stack([row[drawn].mean(1) for row in rows])  # (P, DRAWS)
    if not (resampled > 0).all():
        return None
    margin = (1 - CONFIDENCE) / 2
    weak, strong = np.quantile(powers(logs, resampled), (margin, 1 - margin))
    if weak <= 0:
        return None
    left, low, high = (float(FURTHER**-each) for each in (power, strong, weak))
    if high - low > CERTAIN:
        return None
    known = tuple((point.samples, float(mean)) for point, mean in zip(points, means, strict=True))
    return Forecast(known, left, low, high)


def powers(logs: np.ndarray, means: np.ndarray) -> np.ndarray:
    """p (R,) of the least-squares line through the logarithms of means (P, R) over logarithms of counts (P,)."""
    centred = logs - logs.mean()
    exponents: np.ndarray = -(centred @ np.log(means)) / (centred @ centred)
    return exponents

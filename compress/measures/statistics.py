"""Two networks on the same samples: how much a figure changed, how sure that is, and whether it stays within a bound.

Right or wrong answers are compared by the flips alone: McNemar's exact test, and Tango's score interval for a
difference of paired proportions (Tango 1998, Statistics in Medicine 17), which holds for few samples and for none that
flips. Any other figure is compared by the paired bootstrap, with percentiles widened for few samples (Hesterberg 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special  # scipy.stats and scipy.optimize take a second to import

from compress.measures.figures import Figure
from compress.recipe import Bound

CONFIDENCE = 0.95
RESAMPLES = 2000
CELLS = 2**22  # of bootstrap weights held at a time
SORTED = 2**28  # scores that a bootstrap of an AUC looks at
MOST_SAMPLES = 10**9
CHANCE_LEVEL = 0.05  # of the test against guessing
SLACK = 1e-9  # relative and in points, for a bound that is met exactly


@dataclass(frozen=True)
class Change:
    """What a figure lost, positive where the compressed network is worse: points of a share, else its own unit.

    Attributes:
        interval: two-sided, at `confidence`.
        bound: the loss that is not exceeded with `confidence`, one-sided; infinite for a single sample.
        flips: samples (right before and wrong now, wrong before and right now), where answers are right or wrong.
        p_value: of McNemar's exact test that both flips are as likely.
    """

    loss: float
    interval: tuple[float, float]
    bound: float
    confidence: float
    samples: int
    method: Literal["Tango's score interval", "paired bootstrap"]
    flips: tuple[int, int] | None = None
    p_value: float | None = None


def compare_figure(figure: Figure, confidence: float = CONFIDENCE, *, seed: int = 0) -> Change:
    """The change of a figure between two networks, from its paired samples."""
    hits = figure.hits
    if hits is not None:
        lost, won = int((hits[0] & ~hits[1]).sum()), int((~hits[0] & hits[1]).sum())
        return compare_flips(lost, won, len(hits[0]), confidence)
    return bootstrap_change(figure, confidence, seed)


def compare_flips(lost: int, won: int, samples: int, confidence: float = CONFIDENCE) -> Change:
    """Points lost by `lost` samples right before and wrong now, and `won` the other way, of so many."""
    two_sided, one_sided = (float(special.ndtri(level)) for level in ((1 + confidence) / 2, confidence))
    low, high = (100 * score_limit(lost, won, samples, z) for z in (-two_sided, two_sided))
    return Change(
        loss=100 * (lost - won) / samples,
        interval=(low, high),
        bound=100 * score_limit(lost, won, samples, one_sided),
        confidence=confidence,
        samples=samples,
        method="Tango's score interval",
        flips=(lost, won),
        p_value=min(1.0, 2 * float(special.bdtr(min(lost, won), lost + won, 0.5))),
    )


def score_limit(lost: float, won: float, samples: float, z: float) -> float:
    """The loss (a share) from which the observed one differs by z standard errors: Tango's score limit.

    Solves (b − c − nΔ)² = z²·n·(2q + Δ(1 − Δ)), q being the likeliest share of gains if the loss were Δ; counts may be
    fractions.
    """

    def distance(loss: float) -> float:
        first = -lost - won + (2 * samples - lost + won) * loss
        root = math.sqrt(max(first * first + 8 * samples * won * loss * (1 - loss), 0.0))
        gains = (root - first) / (4 * samples)
        variance = samples * (2 * gains + loss * (1 - loss))
        return (lost - won - samples * loss) / math.sqrt(max(variance, 1e-300)) + z

    observed, edge = (lost - won) / samples, 1 - 1e-12
    if z >= 0:
        return 1.0 if observed >= edge or distance(edge) > 0 else root(distance, observed, edge)
    return -1.0 if observed <= -edge or distance(-edge) < 0 else root(distance, -edge, observed)


def root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between `low` and `high`, by halving to the last digit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return middle


def bootstrap_change(figure: Figure, confidence: float, seed: int) -> Change:
    """The change of a figure with percentiles of resampled pairs."""
    samples = len(figure.numerators[0])
    loss = figure.worsening
    if samples < 2:
        return Change(loss, (-math.inf, math.inf), math.inf, confidence, samples, "paired bootstrap")
    generator = np.random.default_rng(seed)
    resampled: list[np.ndarray] = []
    resamples = RESAMPLES if figure.key != "auc" else max(200, min(RESAMPLES, SORTED // figure.numerators[0].size))
    rows = max(1, min(resamples, CELLS // samples))
    while sum(map(len, resampled)) < resamples:
        drawn = generator.integers(samples, size=(rows, samples))
        drawn += samples * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)
        before, after = (figure.resampled(which, weights) for which in (0, 1))
        resampled.append((before - after) if figure.meaning.higher else (after - before))
    losses = np.concatenate(resampled)[:resamples] * (100 if figure.meaning.share else 1)
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return Change(loss, (-math.inf, math.inf), math.inf, confidence, samples, "paired bootstrap")
    wider = math.sqrt(samples / (samples - 1))
    levels = [
        float(special.ndtr(wider * special.stdtrit(samples - 1, level)))
        for level in ((1 - confidence) / 2, (1 + confidence) / 2, confidence)
    ]
    low, high, bound = (float(value) for value in np.quantile(losses, levels))
    return Change(loss, (low, high), bound, confidence, samples, "paired bootstrap")


@dataclass(frozen=True)
class Verdict:
    """Whether a loss stays within a bound.

    Attributes:
        passed: decides.
        needed: samples that would do if the flips stayed as frequent, where there were too few; None otherwise.
    """

    passed: bool
    measured: str
    needed: int | None = None


def most_lost(figure: Figure, bound: Bound) -> float:
    """What a bound allows a figure to lose: points of a share, else its own unit."""
    before = figure.values[0]
    return bound.allowed(100 * before if figure.meaning.share else before)


def shown_loss(figure: Figure, loss: float) -> str:
    """A loss in words: points of a share, else a number."""
    return f"{loss:.2f} points" if figure.meaning.share else f"{loss:.4g}"


def judge(change: Change, most: float, unit: str = " points", *, tested: bool) -> Verdict:
    """Whether at most `most` was lost: by the point estimate, or (`tested`) as a non-inferiority test.

    The test passes where the one-sided bound lies within `most`, fails where the estimate itself does not, and
    otherwise there were too few samples.
    """
    form = ".2f" if unit else ".4g"
    shown = f"{change.loss:{form}}{unit} lost"
    if not tested:
        return Verdict(change.loss <= most + SLACK, shown)
    sure = f"{shown}, at most {change.bound:{form}} with {100 * change.confidence:g} % confidence"
    if change.bound <= most + SLACK:
        return Verdict(True, sure)
    if change.loss > most + SLACK:
        return Verdict(False, sure)
    return Verdict(False, sure, samples_needed(change, most))


def samples_needed(change: Change, most: float) -> int | None:
    """Samples with which the bound would lie within `most`, shares staying as observed; None: no number would do."""
    if change.loss >= most or not math.isfinite(change.bound):
        return None
    if change.flips is None:
        shrink = (change.bound - change.loss) / (most - change.loss)
        return math.ceil(change.samples * shrink * shrink)
    z = float(special.ndtri(change.confidence))
    shares = [count / change.samples for count in change.flips]
    low, high = change.samples, 2 * change.samples
    while high < MOST_SAMPLES and 100 * score_limit(shares[0] * high, shares[1] * high, high, z) > most:
        low, high = high, 2 * high
    if high >= MOST_SAMPLES:
        return None
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        if 100 * score_limit(shares[0] * middle, shares[1] * middle, middle, z) > most:
            low = middle
        else:
            high = middle
    return high


def guesses_as_well(hits: int, samples: int, share: float) -> bool:
    """Whether right answers could come of guessing that is right with that `share`: one-sided binomial test."""
    return hits < 1 or bool(special.betainc(hits, samples - hits + 1, share) > CHANCE_LEVEL)

"""How sure a change is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from compress.measures.figures import Figure
from compress.measures.statistics import compare_figure, compare_flips, guesses_as_well, judge, score_limit


def figure(key: str, before: np.ndarray, after: np.ndarray, counts: np.ndarray | None = None) -> Figure:
    counts = np.ones_like(before) if counts is None else counts
    return Figure(key, "output", (before, after), (counts, counts))


@pytest.mark.parametrize(("lost", "won", "samples"), [(12, 5, 200), (0, 0, 40), (3, 0, 30), (0, 4, 25)])
@pytest.mark.parametrize("z", [1.0, 1.96])
def test_the_limit_is_where_the_score_statistic_reaches_z(lost: int, won: int, samples: int, z: float) -> None:
    """The nuisance share is found here by maximising the likelihood, there in closed form."""
    limit = score_limit(lost, won, samples, z)

    def surprise(gains: float) -> float:
        shares = (gains + limit, gains, 1 - 2 * gains - limit)
        counts = (lost, won, samples - lost - won)
        return -sum(count * np.log(max(share, 1e-300)) for count, share in zip(counts, shares, strict=True) if count)

    edges = (max(0.0, -limit), (1 - limit) / 2)
    gains = minimize_scalar(surprise, bounds=edges, method="bounded", options={"xatol": 1e-12}).x
    error = np.sqrt((2 * gains + limit - limit**2) / samples)
    assert (limit - (lost - won) / samples) / error == pytest.approx(z, rel=2e-3)


def test_losses_and_gains_mirror_each_other() -> None:
    one, other = compare_flips(9, 4, 150), compare_flips(4, 9, 150)
    assert one.loss == -other.loss
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p_value == other.p_value


def test_the_one_sided_bound_is_exceeded_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    truth, samples = (0.03, 0.01), 400
    counts = generator.multinomial(samples, (*truth, 1 - sum(truth)), 400)
    above = [compare_flips(lost, won, samples, 0.9).bound < 100 * (truth[0] - truth[1]) for lost, won, _ in counts]
    assert 0.05 < np.mean(above) < 0.16


def test_right_and_wrong_answers_are_compared_by_flips() -> None:
    before = np.array([1, 1, 1, 0, 0, 1.0])[:, None]
    after = np.array([1, 0, 0, 1, 0, 1.0])[:, None]
    change = compare_figure(figure("top1", before, after))
    assert change.flips == (2, 1)
    assert change.loss == pytest.approx(100 / 6)
    assert change.p_value == 1.0


def test_the_bootstrap_agrees_with_the_normal_interval_of_paired_differences() -> None:
    generator = np.random.default_rng(1)
    before = generator.normal(2, 1, (500, 1))
    after = before + generator.normal(0.1, 0.5, (500, 1))
    change = compare_figure(figure("loss", before, after))
    error = float((after - before).std() / np.sqrt(500))
    mean = float((after - before).mean())
    assert change.loss == pytest.approx(mean)
    assert change.interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert change == compare_figure(figure("loss", before, after))


def test_a_mean_iou_is_resampled_as_a_whole() -> None:
    generator = np.random.default_rng(2)
    union = generator.integers(5, 20, (60, 3)).astype(float)
    both = np.floor(union * 0.8)
    worse = np.floor(union * 0.7)
    change = compare_figure(figure("mean_iou", both, worse, union))
    wanted = 100 * float((both.sum(0) / union.sum(0)).mean() - (worse.sum(0) / union.sum(0)).mean())
    assert change.loss == pytest.approx(wanted)
    assert change.interval[0] < wanted < change.interval[1]


def test_one_sample_says_nothing() -> None:
    change = compare_figure(figure("loss", np.ones((1, 1)), np.zeros((1, 1))))
    assert change.bound == float("inf")


@pytest.mark.parametrize(
    ("flips", "samples", "most", "passed", "enough"),
    [((2, 2), 10_000, 0.5, True, True), ((1, 0), 200, 0.6, False, False), ((30, 0), 1000, 0.5, False, True)],
)
def test_a_tested_bound_is_kept_missed_or_undecided(
    flips: tuple[int, int], samples: int, most: float, passed: bool, enough: bool
) -> None:
    verdict = judge(compare_flips(*flips, samples), most, tested=True)
    assert verdict.passed is passed
    assert (verdict.needed is None) is enough
    if verdict.needed is not None:
        lost, won = (count * verdict.needed / samples for count in flips)
        assert 100 * score_limit(lost, won, verdict.needed, norm.ppf(0.95)) <= most


def test_the_estimate_decides_where_no_confidence_is_asked_for() -> None:
    assert judge(compare_flips(1, 0, 200), 0.5, tested=False).passed
    assert not judge(compare_flips(2, 0, 200), 0.5, tested=False).passed


def test_guessing_is_told_from_knowing() -> None:
    assert guesses_as_well(12, 100, 0.1)
    assert not guesses_as_well(25, 100, 0.1)

"""Selection is greedy exactly, nested, and the default is no worse than any single method."""

from itertools import combinations

import pytest
import torch

from compress.convex import (
    METHODS,
    FactorAccumulator,
    FactoredMoments,
    Moments,
    backward_order,
    forward_order,
    nested_errors,
    polish_units,
    refit,
    relative_error,
    select_units,
)
from compress.convex.selecting import elimination
from compress.convex.selecting.tabu import Chains
from tests.convex.problems import normal


def layer(units=16, size=1, outputs=4, seed=0, rows=300, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    features = normal(generator, rows, units * size).relu()
    targets = features @ normal(generator, units * size, outputs) + noise * normal(generator, rows, outputs) + 2
    return Moments.of(features, targets, group_size=size)


def greedy(moments, *, backward):
    count = moments.unit_count
    kept, order = list(range(count)) if backward else [], []
    for _ in range(count):
        options = kept if backward else [k for k in range(count) if k not in kept]
        trials = {k: [u for u in kept if u != k] if backward else [*kept, k] for k in options}
        unit = min(options, key=lambda k: refit(moments, torch.tensor(trials[k], dtype=torch.long)).error)
        kept = trials[unit]
        order.append(unit)
    return order[::-1] if backward else order


@pytest.mark.parametrize(("units", "size", "outputs"), [(10, 1, 3), (7, 3, 4), (6, 2, 40)])
def test_backward_elimination_removes_what_costs_least_each_time(units, size, outputs):
    moments = layer(units, size, outputs)
    assert backward_order(moments).tolist()[1:] == greedy(moments, backward=True)[1:]


@pytest.mark.parametrize(("units", "size", "outputs"), [(10, 1, 3), (7, 3, 4), (6, 2, 40)])
def test_forward_selection_adds_what_explains_most_each_time(units, size, outputs):
    moments = layer(units, size, outputs)
    assert forward_order(moments).tolist()[:-1] == greedy(moments, backward=False)[:-1]


@pytest.mark.parametrize("size", [1, 2])
def test_products_taken_for_many_units_at_once_change_no_order(size, monkeypatch):
    moments = layer(150 // size, size, 140)
    together = [backward_order(moments).tolist(), forward_order(moments).tolist()]
    monkeypatch.setattr(elimination, "_MANY_OUTPUTS", 10**6)
    assert together == [backward_order(moments).tolist(), forward_order(moments).tolist()]


@pytest.mark.parametrize(("outputs", "rank", "left"), [(80, 4, 7), (40, 40, 40), (120, 120, 60)])
def test_turning_the_outputs_of_a_large_problem_changes_no_order(outputs, rank, left, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    features = normal(generator, 400, 60).relu()
    targets = features @ normal(generator, 60, rank) @ normal(generator, rank, outputs)
    moments = Moments.of(features, targets)
    usual = elimination.Factorised.of(moments)
    monkeypatch.setattr(elimination, "_REDUCED", 16)
    turned = elimination.Factorised.of(moments)
    assert turned.targets.shape == (60, left)
    assert turned.backward().tolist() == usual.backward().tolist()
    torch.testing.assert_close(turned.forward()[1], usual.forward()[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("delay", [1, 5, 200])
def test_collecting_updates_changes_no_order(delay):
    moments = layer(40, 2, 5)
    assert backward_order(moments, delay=delay).tolist() == backward_order(moments).tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_the_curve_is_the_error_of_the_refit(size):
    moments = layer(12, size)
    order = backward_order(moments)
    for width, error in enumerate(nested_errors(moments, order).tolist()):
        assert refit(moments, order[:width]).error == pytest.approx(error, abs=1e-7)


def test_the_refit_is_least_squares_with_a_bias():
    generator = torch.Generator().manual_seed(0)
    features, targets = normal(generator, 80, 6) + 1, normal(generator, 80, 2) - 4
    result = refit(Moments.of(features, targets), torch.tensor([4, 1]), ridge=0.0)
    design = torch.cat([features[:, [4, 1]], torch.ones(80, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, targets).solution
    torch.testing.assert_close(torch.cat([result.coefficients, result.intercept[None]]), expected)
    residual = targets - design @ expected
    assert result.error == pytest.approx(float(residual.norm() / (targets - targets.mean(0)).norm()))


def test_the_error_on_held_back_moments_is_that_of_held_back_samples():
    generator = torch.Generator().manual_seed(0)
    features, targets = normal(generator, 80, 6) + 1, normal(generator, 80, 2) - 4
    result = refit(Moments.of(features[:50], targets[:50]), torch.tensor([4, 1]))
    held_back = Moments.of(features[50:], targets[50:])
    residual = targets[50:] - features[50:, [4, 1]] @ result.coefficients - result.intercept
    expected = float(residual.norm() / (targets[50:] - targets[50:].mean(0)).norm())
    measured = relative_error(held_back, torch.tensor([4, 1]), result.coefficients, result.intercept)
    assert measured == pytest.approx(expected)


def test_without_an_intercept_the_denominator_is_the_whole_energy():
    moments = layer()
    result = refit(moments, torch.arange(0), intercept=False)
    assert result.error == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_rescaling_a_unit_changes_no_choice_and_no_error(scale):
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 200, 12).relu()
    targets = features @ normal(generator, 12, 3) + normal(generator, 200, 3)
    scaled = features.clone()
    scaled[:, 4] *= scale
    a, b = select_units(Moments.of(features, targets)), select_units(Moments.of(scaled, targets))
    assert a.order.tolist() == b.order.tolist()
    torch.testing.assert_close(a.errors, b.errors, rtol=1e-6, atol=1e-9)


def test_dead_constant_and_duplicate_units_go_first():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 200, 10).relu()
    features[:, 2], features[:, 5], features[:, 7] = 0, 3.5, features[:, 1]
    moments = Moments.of(features, features @ normal(generator, 10, 3))
    curve = select_units(moments)
    assert not {2, 5} & set(curve.units(7).tolist())
    assert len({1, 7} & set(curve.units(7).tolist())) == 1
    assert float(curve.errors[7]) < 1e-3


@pytest.mark.parametrize("size", [1, 2])
def test_swaps_never_raise_the_error_and_keep_the_number_of_units(size):
    moments = layer(20, size)
    generator = torch.Generator().manual_seed(0)
    for width in (1, 5, 12, 19, 20):
        start = torch.randperm(20, generator=generator)[:width]
        polished = polish_units(moments, start, effort=0.05)
        assert polished.unique().numel() == width
        assert refit(moments, polished).error <= refit(moments, start).error * (1 + 1e-9)


def exchanges(moments, units):
    """Errors of every selection that differs from `units` in one unit."""
    rest = [unit for unit in range(moments.unit_count) if unit not in set(units.tolist())]
    for place in range(units.numel()):
        for unit in rest:
            other = units.clone()
            other[place] = unit
            yield refit(moments, other).error


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("effort", [0.0, 0.02])
def test_no_exchange_of_one_unit_improves_a_polished_selection(size, effort):
    moments = layer(14, size, 5)
    for width in (1, 4, 9, 13):
        start = torch.randperm(14, generator=torch.Generator().manual_seed(width))[:width]
        polished = polish_units(moments, start, effort=effort)
        assert refit(moments, polished).error <= min(exchanges(moments, polished)) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_polished_selections_of_correlated_features_are_the_best_of_all_subsets(seed):
    generator = torch.Generator().manual_seed(seed)
    features = (normal(generator, 200, 4) @ normal(generator, 4, 10)).relu() + normal(generator, 200, 1)
    moments = Moments.of(features, features @ normal(generator, 10, 3) + 0.2 * normal(generator, 200, 3))
    curve = select_units(moments)
    for width in (2, 4, 6):
        starts = [order[:width] for order in curve.orders.values()]
        polished = polish_units(moments, starts[0], others=starts[1:], effort=0.1)
        least = min(refit(moments, torch.tensor(units)).error for units in combinations(range(10), width))
        assert refit(moments, polished).error <= least * (1 + 1e-6)


def test_polishing_gives_the_same_units_each_time():
    moments = layer(30, 1, 5, noise=0.1)
    start = torch.arange(8)
    assert torch.equal(polish_units(moments, start, effort=0.05), polish_units(moments, start, effort=0.05))


def test_selections_that_cannot_be_are_refused():
    moments = layer()
    with pytest.raises(ValueError, match="equally many"):
        polish_units(moments, [0, 1], others=[[2]])
    with pytest.raises(ValueError, match="twice"):
        polish_units(moments, [1, 1, 2])
    with pytest.raises(ValueError, match="widths"):
        select_units(moments, widths=[1000])
    with pytest.raises(ValueError, match="errors"):
        select_units(moments, errors=0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_keeps_no_more_units_than_any_single_method(seed):
    moments = layer(40, 1, 6, seed=seed, noise=0.1)
    levels = (0.5, 0.3, 0.1, 0.05)
    best = select_units(moments, errors=levels)
    for name in METHODS:
        single = select_units(moments, method=name)
        for level in levels:
            assert best.width_for(level) <= single.width_for(level), name


def test_units_of_a_curve_reach_its_error():
    moments = layer(30, 1, 5, noise=0.1)
    curve = select_units(moments, widths=(5, 12), errors=(0.3,))
    for width in range(31):
        units = curve.units(width)
        assert units.numel() == width
        assert refit(moments, units).error <= float(curve.errors[width]) * (1 + 1e-6) + 1e-7
    assert refit(moments, curve.units(12)).error == pytest.approx(float(curve.errors[12]), rel=1e-5)
    assert bool((curve.errors.diff() <= 0).all())


@pytest.mark.parametrize("method", ["best", *METHODS])
def test_every_method_orders_every_unit_once(method):
    curve = select_units(layer(12, 2), method=method)
    assert sorted(curve.order.tolist()) == list(range(12))
    assert curve.units(12).tolist() == list(range(12))
    with pytest.raises(ValueError, match="width"):
        curve.units(13)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method"):
        select_units(layer(), method="random")


def test_factored_moments_with_all_rows_are_exact():
    generator = torch.Generator().manual_seed(0)
    features, targets = normal(generator, 30, 80) + 1, normal(generator, 30, 2) - 3
    factored = FactoredMoments.of(features, targets, group_size=2)
    units = torch.tensor([3, 30, 7])
    expected = Moments.of(features, targets, group_size=2).subset(units)
    assert factored.exact
    torch.testing.assert_close(factored.subset(units).gram, expected.gram)
    torch.testing.assert_close(factored.subset(units).cross, expected.cross)
    assert factored.subset(units).energy == pytest.approx(expected.energy)
    assert refit(factored, units).error == pytest.approx(refit(expected).error)


def test_a_sketch_is_close_says_so_and_repeats_by_seed():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 4000, 60) + 1
    targets = features @ normal(generator, 60, 3)
    found = []
    for _ in range(2):
        accumulator = FactorAccumulator(rows=1000, seed=5)
        for rows in torch.arange(4000).split(900):
            accumulator.add(features[rows], targets[rows])
        found.append(accumulator.moments())
    assert found[0].factor.numpy().tobytes() == found[1].factor.numpy().tobytes()
    assert not found[0].exact
    assert "sketch of 4000 rows" in found[0].message
    whole = Moments.of(features, targets).centred()
    near = found[0].subset(torch.arange(60)).centred()
    assert float((near.gram - whole.gram).norm() / whole.gram.norm()) < 0.3


def test_selection_on_factored_moments_finds_the_units_that_matter():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 120, 400)
    matter = [5, 111, 222, 333]
    targets = features[:, matter] @ normal(generator, 4, 3) + 0.01 * normal(generator, 120, 3)
    factored = FactoredMoments.of(features, targets)
    assert factored.memory_units < 400
    curve = select_units(factored)
    assert curve.units(4).tolist() == matter
    assert sorted(curve.order.tolist()) == list(range(400))


def test_equal_input_selects_equal_bytes():
    first, second = (select_units(layer(30), errors=(0.3,)) for _ in range(2))
    assert first.errors.numpy().tobytes() == second.errors.numpy().tobytes()
    assert first.order.tolist() == second.order.tolist()


def test_the_search_gains_of_exchanges_are_what_exchanges_gain():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 300, 40)
    targets = features @ normal(generator, 40, 7)
    gram, cross = features.T @ features / 300, features.T @ targets / 300
    units = torch.stack([torch.randperm(40, generator=generator)[:8] for _ in range(3)])
    chains = Chains(gram, cross, units, 1e-9)
    for _ in range(50):
        gains = chains.gains()
        choice = torch.stack([part.reshape(-1).topk(20).indices[step] for step, part in enumerate(gains)])
        out, into = choice // 40, choice % 40
        before = chains.explained
        chains.exchange(out, into)
        expected = gains.reshape(3, -1)[torch.arange(3), choice]
        torch.testing.assert_close(chains.explained - before, expected, rtol=1e-9, atol=1e-9)
    afresh = Chains(gram, cross, chains.units.clone(), 1e-9)
    for name in ("inverse", "bridge", "weights", "left", "mixed", "schur", "squares", "explained", "inside"):
        torch.testing.assert_close(getattr(chains, name), getattr(afresh, name), rtol=1e-9, atol=1e-9)


def test_the_search_leaves_a_selection_that_no_exchange_improves():
    moments = layer(60, 1, 6, seed=3, noise=0.1)
    descended = polish_units(moments, torch.arange(12), effort=0.0)
    assert refit(moments, polish_units(moments, descended, effort=0.0)).error == refit(moments, descended).error
    assert refit(moments, polish_units(moments, descended, effort=0.2)).error < refit(moments, descended).error


@pytest.mark.parametrize("ridge", [1e-8, 1e-15])
def test_the_search_copes_with_units_that_depend_on_each_other(ridge):
    generator = torch.Generator().manual_seed(1)
    base = normal(generator, 200, 12).relu()
    features = torch.cat([base, base, base[:, :6] + base[:, 6:], torch.ones(200, 2)], 1)
    moments = Moments.of(features, features @ normal(generator, 32, 3))
    for width in (4, 11, 20):
        polished = polish_units(moments, torch.arange(width), ridge=ridge, effort=0.1)
        assert polished.unique().numel() == width
        assert refit(moments, polished, ridge=ridge).error <= refit(moments, torch.arange(width), ridge=ridge).error

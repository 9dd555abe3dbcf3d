"""Moments stream, merge, centre and select exactly."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.convex import (
    FactorAccumulator,
    MomentAccumulator,
    Moments,
    MultitaskLasso,
    contributions,
    refit,
    solve,
    solve_path,
    stack_consumers,
    width_bound,
)
from compress.errors import MomentsError, NonFiniteError
from tests.convex.problems import normal


def sample(seed=0, rows=50, columns=12, outputs=3):
    generator = torch.Generator().manual_seed(seed)
    return normal(generator, rows, columns) + 0.5, normal(generator, rows, outputs) - 1


def assert_same(a, b):
    for name in ("gram", "cross", "feature_mean", "output_mean", "output_gram"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-12)
    assert a.energy == pytest.approx(b.energy, rel=1e-12)
    assert a.count == b.count


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 49), st.integers(0, 1000))
def test_merging_two_shards_equals_one_pass(cut, seed):
    features, outputs = sample(seed)
    whole = Moments.of(features, outputs)
    parts = Moments.of(features[:cut], outputs[:cut]).merge(Moments.of(features[cut:], outputs[cut:]))
    assert_same(parts, whole)


def test_streaming_batches_equals_one_pass():
    features, outputs = sample(rows=1000, columns=600)
    accumulator = MomentAccumulator(output_gram=True)
    for rows in torch.arange(1000).split(77):
        accumulator.add(features[rows], outputs[rows])
    assert_same(accumulator.moments(), Moments.of(features, outputs))


def test_moments_are_the_products_they_name():
    features, outputs = sample(columns=530)
    moments = Moments.of(features, outputs)
    torch.testing.assert_close(moments.gram, features.T @ features / 50)
    torch.testing.assert_close(moments.cross, features.T @ outputs / 50)
    assert moments.energy == pytest.approx(float(outputs.square().sum()) / 50)


def test_a_weight_of_two_equals_a_repeated_sample():
    features, outputs = sample()
    weights = torch.ones(50)
    weights[7] = 2
    repeated = Moments.of(torch.cat([features, features[7:8]]), torch.cat([outputs, outputs[7:8]]))
    assert_same(Moments.of(features, outputs, weights=weights), repeated)


def test_centring_equals_moments_of_centred_data():
    features, outputs = sample()
    expected = Moments.of(features - features.mean(0), outputs - outputs.mean(0))
    centred = Moments.of(features, outputs).centred()
    torch.testing.assert_close(centred.gram, expected.gram)
    torch.testing.assert_close(centred.cross, expected.cross)
    assert centred.energy == pytest.approx(expected.energy)


def test_a_subset_needs_no_data():
    features, outputs = sample()
    units = torch.tensor([4, 0, 3])
    columns = torch.tensor([8, 9, 0, 1, 6, 7])
    expected = Moments.of(features[:, columns], outputs, group_size=2)
    assert_same(Moments.of(features, outputs, group_size=2).subset(units), expected)


def test_outputs_of_given_weights_follow_from_the_gram():
    features, _ = sample()
    weights = normal(torch.Generator().manual_seed(3), 12, 5)
    expected = Moments.of(features, features @ weights)
    assert_same(Moments.of(features, features[:, :1]).with_outputs(weights), expected)


def test_all_reduce_of_one_rank_is_the_identity(tmp_path):
    features, outputs = sample()
    sums = MomentAccumulator(output_gram=True)
    for rows in torch.arange(50).split(13):
        sums.add(features[rows], outputs[rows])
    before = sums.moments()
    sums.all_reduce()  # without a process group: nothing
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sums.all_reduce()
        assert_same(sums.moments(), before)
    finally:
        torch.distributed.destroy_process_group()


def test_stacked_consumers_have_the_sum_of_their_errors():
    first, second = Moments.of(*sample(1), group_size=3), Moments.of(*sample(2, columns=8, outputs=2), group_size=2)
    stacked = stack_consumers([first, second], [0.7, 2.0])
    kept = torch.tensor([0, 2])
    expected = 0.7 * first.centred_energy * refit(first, kept, ridge=0).error ** 2
    expected += 2.0 * second.centred_energy * refit(second, kept, ridge=0).error ** 2
    assert stacked.energy * refit(stacked, kept, ridge=0).error ** 2 == pytest.approx(expected)


def test_half_precision_input_is_accumulated_in_float64():
    features, outputs = sample()
    moments = Moments.of(features.half(), outputs.half())
    assert moments.gram.dtype == torch.float64
    torch.testing.assert_close(moments.gram, features.half().double().T @ features.half().double() / 50)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_are_an_error(value):
    features, outputs = sample()
    features[3, 3] = value
    with pytest.raises(NonFiniteError):
        Moments.of(features, outputs)


def test_shapes_that_do_not_fit_are_refused():
    features, outputs = sample()
    with pytest.raises(ValueError, match="equally many rows"):
        Moments.of(features, outputs[:4])
    with pytest.raises(ValueError, match="group_size"):
        Moments.of(features, outputs, group_size=5)
    with pytest.raises(ValueError, match="must be a matrix"):
        Moments.of(features, outputs[:, 0])
    with pytest.raises(ValueError, match="real"):
        Moments.of(features, outputs.to(torch.complex128))
    with pytest.raises(ValueError, match="at least 1"):
        Moments.of(features, outputs, group_size=0)
    with pytest.raises(ValueError, match="numbers"):
        Moments.of(features, numpy.array([["a"]] * 50, dtype=object))
    with pytest.raises(ValueError, match="negative"):
        Moments.of(features, outputs, weights=-torch.ones(50))


def test_moments_of_nothing_are_a_fault_that_a_run_can_report():
    for empty in (MomentAccumulator(), FactorAccumulator()):
        with pytest.raises(MomentsError, match="no sample came"):
            empty.moments()


def shifted_sample(mean, seed=0, rows=400, columns=20):
    """ReLU features, a third of them far from zero, and outputs of them."""
    generator = torch.Generator().manual_seed(seed)
    features = normal(generator, rows, columns).relu()
    features[:, ::3] += mean
    outputs = features @ normal(generator, columns, 3) + normal(generator, rows, 3)
    return features, outputs


@pytest.mark.parametrize("mean", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("cut", [1, 37, 399])
def test_spread_under_a_large_mean_survives_streaming_and_merging(mean, cut):
    features, outputs = shifted_sample(mean)
    about = [value.numpy().astype(numpy.longdouble) for value in (features, outputs)]
    about = [value - value.mean(0) for value in about]
    expected = torch.from_numpy((about[0].T @ about[0] / 400).astype(float))
    crossed = torch.from_numpy((about[0].T @ about[1] / 400).astype(float))
    streamed = MomentAccumulator()
    for rows in torch.arange(400).split(cut):
        streamed.add(features[rows], outputs[rows])
    merged = Moments.of(features[:cut], outputs[:cut]).merge(Moments.of(features[cut:], outputs[cut:]))
    for found in (streamed.moments(), merged):
        accuracy = 1e-14 + 1e-15 * mean
        torch.testing.assert_close(found.covariance, expected, rtol=0, atol=accuracy * float(expected.abs().max()))
        torch.testing.assert_close(found.cross_covariance, crossed, rtol=0, atol=accuracy * float(crossed.abs().max()))


@pytest.mark.parametrize("mean", [1.0, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e12])
@pytest.mark.parametrize("fraction", [0.1, 1e-3])
def test_a_claimed_gap_covers_the_true_one_from_the_rows(mean, fraction):
    features, outputs = shifted_sample(mean)
    moments = Moments.of(features, outputs).centred()
    penalty = fraction * MultitaskLasso(moments, 0.0).lambda_max
    solution = solve(MultitaskLasso(moments, penalty), tolerance=1e-10)
    phi, psi = (value.numpy().astype(numpy.longdouble) for value in (features, outputs))
    phi, psi = phi - phi.mean(0), psi - psi.mean(0)
    left = psi - phi @ solution.coefficients.numpy()
    norms = numpy.sqrt((solution.coefficients.numpy() ** 2).sum(1))
    largest = numpy.sqrt(((phi.T @ left / 400) ** 2).sum(1)).max()
    primal = (left**2).sum() / 800 + penalty * norms.sum()
    dual = (psi**2).sum() / 800 - ((psi - min(1, penalty / largest) * left) ** 2).sum() / 800
    assert (primal - dual) / primal <= solution.gap * (1 + 1e-6) + 1e-15
    assert solution.certified or "rounding" in solution.message or solution.gap > 1e-10


@pytest.mark.parametrize("constant", [0.0, 6.0, 0.1, -1e20, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_have_no_spread_and_no_rank(constant, dtype):
    features, outputs = sample(rows=200)
    features, outputs = features.to(dtype), outputs.to(dtype)
    features[:, 4:9] = constant
    streamed = MomentAccumulator(output_gram=True)
    for rows in torch.arange(200).split(7):
        streamed.add(features[rows], outputs[rows])
    parts = FactorAccumulator(rows=100)
    parts.add(features, outputs)
    for moments in (streamed.moments(), parts.moments().subset(torch.arange(12))):
        assert not moments.covariance[4:9].any()
        assert not moments.cross_covariance[4:9].any()
        assert width_bound(moments.centred()).rank_features == 7
        top = MultitaskLasso(moments.centred(), 0.0).lambda_max
        for solution in solve_path(moments.centred(), [0.1 * top, 1e-3 * top]):
            assert solution.certified
            assert not solution.coefficients[4:9].any()


def test_a_layer_of_constants_alone_has_rank_zero_and_a_solution():
    moments = Moments.of(torch.full((30, 5), 0.3), torch.full((30, 2), 7.1)).centred()
    assert width_bound(moments).rank_features == 0
    assert refit(moments).error == 0
    assert solve(MultitaskLasso(moments, 1.0)).certified


def test_arrays_of_numpy_and_masks_are_taken():
    features, outputs = sample()
    frozen = features.numpy().copy()
    frozen.flags.writeable = False
    assert_same(Moments.of(frozen, outputs.numpy()[::-1][::-1]), Moments.of(features, outputs))
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[2, 7]] = True
    expected = Moments.of(features, outputs).subset(torch.tensor([2, 7]))
    for units in (mask, mask.numpy(), [2, 7], numpy.array([2, 7], dtype=numpy.int32)):
        assert_same(Moments.of(features, outputs).subset(units), expected)
    whole = Moments.of(features, outputs)
    assert refit(whole, mask).coefficients.shape == (2, 3)


@pytest.mark.parametrize("units", [[0.5], [12], [-1], [True, False], [[1, 2]]])
def test_units_that_are_none_are_refused(units):
    with pytest.raises(ValueError, match="units"):
        Moments.of(*sample()).subset(units)


def test_contributions_are_the_moments_of_what_each_unit_gives():
    features, outputs = sample()
    weights = normal(torch.Generator().manual_seed(3), 12, 2)
    given = torch.cat([features[:, 4 * k : 4 * k + 4] @ weights[4 * k : 4 * k + 4] for k in range(3)], 1)
    expected = Moments.of(given, outputs, group_size=2)
    assert_same(contributions(Moments.of(features, outputs, group_size=4), weights), expected)


def test_no_refit_on_contributions_is_better_than_one_on_the_features():
    features, _ = sample()
    weights = normal(torch.Generator().manual_seed(3), 12, 2)
    moments = Moments.of(features, features @ weights, group_size=4)
    for units in ([0], [1, 2]):
        reduced = refit(contributions(moments, weights), torch.tensor(units)).error
        assert reduced >= refit(moments, torch.tensor(units)).error - 1e-9
    assert refit(contributions(moments, weights)).error < 1e-3


def test_single_precision_products_are_near_and_say_what_they_round():
    features, outputs = sample(rows=400)
    accumulator = MomentAccumulator(output_gram=True, single=True)
    for rows in torch.arange(400).split(77):
        accumulator.add(features[rows].float(), outputs[rows].float())
    moments, exact = accumulator.moments(), Moments.of(features.float(), outputs.float())
    torch.testing.assert_close(moments.gram, exact.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.cross, exact.cross, rtol=1e-5, atol=1e-6)
    assert moments.rounding == torch.finfo(torch.float32).eps
    assert exact.rounding == torch.finfo(torch.float64).eps
    assert moments.merge(exact).rounding == moments.subset(torch.tensor([1])).rounding == moments.rounding


def test_rows_in_double_precision_are_never_multiplied_in_less():
    features, outputs = sample()
    accumulator = MomentAccumulator(single=True)
    accumulator.add(features, outputs)
    torch.testing.assert_close(accumulator.moments().gram, Moments.of(features, outputs).gram, rtol=1e-12, atol=1e-12)
    assert accumulator.moments().rounding == torch.finfo(torch.float64).eps


def test_a_certificate_knows_how_the_moments_were_rounded():
    features, outputs = sample(rows=400)
    accumulator = MomentAccumulator(single=True)
    accumulator.add(features.float(), outputs.float())
    rough, exact = accumulator.moments(), Moments.of(features.float(), outputs.float())
    solutions = [solve(MultitaskLasso(moments, 0.1), tolerance=1e-9) for moments in (rough, exact)]
    assert solutions[0].rounding > 1e8 * solutions[1].rounding
    assert solutions[0].gap >= solutions[0].rounding
    assert solutions[1].certified
    assert not solutions[0].certified


def test_stacked_consumers_keep_the_rank_of_their_outputs():
    features, outputs = sample()
    twice = torch.cat([outputs, outputs[:, :1]], 1)
    parts = [Moments.of(features, twice).centred(), Moments.of(features, outputs).centred()]
    stacked = stack_consumers(parts)
    assert stacked.output_gram is not None
    assert width_bound(stacked).rank_outputs == 6
    assert float(stacked.output_gram.trace()) == pytest.approx(stacked.energy)


def test_what_overflows_is_not_taken_for_constant():
    features = normal(torch.Generator().manual_seed(0), 20, 3) * 1e200
    with pytest.raises(NonFiniteError):
        Moments.of(features, features[:, :1] * 1e-200)

"""Moments stream, merge, centre and select exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.convex import MomentAccumulator, Moments, refit, stack_consumers
from compress.errors import NonFiniteError
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
    with pytest.raises(ValueError, match="no samples"):
        MomentAccumulator().moments()
    with pytest.raises(ValueError, match="negative"):
        Moments.of(features, outputs, weights=-torch.ones(50))

"""Batches, subsets, splits, hashes and overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import DataSource, Preprocessing, draw_indices, open_data, overlap, split_held_back
from compress.data.arrays import make_array_source
from tests.data.test_sources import make_images, write, write_folder


def source_of(images: np.ndarray, labels: np.ndarray | None = None) -> DataSource:
    arrays = {"images": images} if labels is None else {"images": images, "labels": labels}
    return make_array_source("memory", None, arrays)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
def test_batches_cover_every_sample_once_in_order(batch_size: int) -> None:
    source = source_of(make_images(), np.arange(10))
    batches = list(source.batches(batch_size))
    assert [len(batch.inputs) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.cat([batch.labels for batch in batches if batch.labels is not None]).tolist() == list(range(10))


def test_indices_choose_samples_and_their_order() -> None:
    source = source_of(make_images(), np.arange(10))
    batch = next(iter(source.batches(5, torch.tensor([7, 2, 2]))))
    assert batch.labels is not None
    assert batch.labels.tolist() == [7, 2, 2]
    whole = next(iter(source.batches(10)))
    assert torch.equal(batch.inputs, whole.inputs[[7, 2, 2]])


@pytest.mark.parametrize("indices", [[10], [-1], [0, 99]])
def test_indices_out_of_range_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="must lie in 0…9"):
        next(iter(source_of(make_images()).batches(2, indices)))


def test_normalisation_is_that_of_torchvision() -> None:
    from torchvision.transforms import functional

    images = make_images(2)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    found = Preprocessing(mean=mean, std=std).apply(images)
    for image, own in zip(images, found, strict=True):
        assert torch.allclose(own, functional.normalize(functional.to_tensor(image), mean, std), atol=1e-6)


def test_preprocessing_survives_json() -> None:
    import json

    value = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), resize=(9, 8), crop=7, interpolation="bicubic")
    assert Preprocessing.from_dict(json.loads(json.dumps(value.as_dict()))) == value


@pytest.mark.parametrize("values", [{"mean": (0.5,)}, {"mean": (0.5,), "std": (0.0,)}, {"interpolation": "lanczos"}])
def test_impossible_preprocessing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Preprocessing(**values)  # type: ignore[arg-type]


def test_overlap_counts_equal_samples_whatever_the_file(tmp_path: Path) -> None:
    images = make_images(10)
    folder = open_data(str(write_folder(tmp_path / "train", images[:6], np.zeros(6, int))))
    arrays = open_data(str(write("npz", tmp_path, images=images[4:])))
    assert overlap(folder, arrays) == 2
    assert overlap(arrays, folder) == 2


def test_overlap_does_not_look_at_labels_or_preprocessing() -> None:
    images = make_images(4)
    first = make_array_source("a", Preprocessing(crop=3), {"images": images, "labels": np.zeros(4, int)})
    second = make_array_source("b", None, {"images": images, "labels": np.ones(4, int)})
    assert overlap(first, second) == 4


def test_different_data_do_not_overlap() -> None:
    assert overlap(source_of(make_images(seed=1)), source_of(make_images(seed=2))) == 0


def test_the_fingerprint_changes_with_samples_order_and_labels() -> None:
    images, labels = make_images(), np.arange(10)
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 1
    sources = [
        source_of(images, labels), source_of(changed, labels), source_of(images[::-1], labels),
        source_of(images, labels[::-1].copy()), source_of(images),
    ]  # fmt: skip
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert source_of(images.copy(), labels.copy()).fingerprint == sources[0].fingerprint


def test_a_limited_source_is_a_seeded_draw_without_repeats(tmp_path: Path) -> None:
    path = str(write("npz", tmp_path, images=make_images(50), labels=np.arange(50)))
    draws = [next(iter(open_data(path, limit=20, seed=seed).batches(50))).labels for seed in (0, 0, 1)]
    assert all(draw is not None and len(set(draw.tolist())) == 20 for draw in draws)
    assert draws[0] is not None
    assert draws[1] is not None
    assert draws[2] is not None
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_limit_above_the_count_changes_nothing(tmp_path: Path) -> None:
    path = str(write("npz", tmp_path, images=make_images()))
    assert open_data(path, limit=99).fingerprint == open_data(path).fingerprint


@given(count=st.integers(2, 300), fraction=st.floats(0.01, 0.6), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_split_is_disjoint_complete_and_deterministic(count: int, fraction: float, seed: int) -> None:
    if round(count * fraction) >= count:
        return
    fitting, held = split_held_back(count, fraction, seed)
    assert sorted(fitting.tolist() + held.tolist()) == list(range(count))
    assert len(held) == max(1, round(count * fraction))
    assert torch.equal(held, split_held_back(count, fraction, seed)[1])


@pytest.mark.parametrize(("count", "fraction"), [(10, 0.0), (10, 1.0), (1, 0.5)])
def test_impossible_splits_are_refused(count: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"must lie between|cannot be split"):
        split_held_back(count, fraction, 0)


def test_a_draw_of_everything_is_every_number() -> None:
    assert draw_indices(5, None, 0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least 1"):
        draw_indices(5, 0, 0)

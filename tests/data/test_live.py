"""Batches that a program holds: from any iterable, split into inputs and answers as the network's forward() says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress.data.live import collect_batches
from compress.errors import DataError


class One(nn.Module):
    def forward(self, values: Tensor, scale: float = 1.0) -> Tensor:
        return values * scale


class Two(nn.Module):
    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return image.flatten(1).sum(1) + features.sum(1)


class Nested(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["a"] + batch["b"]


ROWS = torch.arange(30, dtype=torch.float32).reshape(10, 3)
LABELS = torch.arange(10)


def test_a_loader_of_pairs_gives_inputs_and_labels() -> None:
    source = collect_batches(DataLoader(TensorDataset(ROWS, LABELS), 4), One(), limit=100)
    assert source.sample_count == 10
    assert source.call.is_plain
    assert source.labels is not None
    assert source.labels.tolist() == LABELS.tolist()
    (batch,) = source.batches(3, [7, 1, 1])
    assert torch.equal(batch.inputs, ROWS[[7, 1, 1]])


def test_a_mapping_behind_a_list_is_an_input_and_no_label() -> None:
    source = collect_batches([([ROWS, ROWS + 1], {"features": ROWS})], Two(), limit=100)
    assert (source.call.count, source.labels, source.targets) == (3, None, None)


def test_a_data_set_of_single_samples_is_put_into_batches() -> None:
    pairs = TensorDataset(torch.randn(70, 5), torch.arange(70) % 3)
    source = collect_batches(pairs, nn.Linear(5, 3), limit=66)
    assert source.tensors[0].shape == (66, 5)
    assert source.labels is not None
    assert source.labels.tolist() == [number % 3 for number in range(66)]


def test_a_generator_is_read_no_further_than_the_limit() -> None:
    given: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        for number in range(100):
            given.append(number)
            yield np.full((4, 2), number, dtype=np.float32)

    assert collect_batches(batches(), One(), limit=10).sample_count == 10
    assert given == [0, 1, 2]


@pytest.mark.parametrize(
    "batch",
    [
        (ROWS[:, None], ROWS),
        (ROWS[:, None], ROWS, LABELS),
        ((ROWS[:, None], ROWS), LABELS),
        {"image": ROWS[:, None], "features": ROWS, "name": "ignored"},
        {"features": ROWS, "image": ROWS[:, None], "labels": LABELS},
    ],
)
def test_several_inputs_are_found_by_place_or_by_name(batch: object) -> None:
    source = collect_batches([batch], Two(), limit=100)
    (read,) = source.batches(10)
    args, keywords = source.call.arguments(read.tensors)
    torch.testing.assert_close(Two()(*args, **keywords), Two()(ROWS[:, None], ROWS))


def test_a_mapping_that_is_the_argument_itself_stays_one() -> None:
    source = collect_batches([{"a": ROWS, "b": ROWS, "y": ROWS[:, 0]}], Nested(), limit=100)
    (read,) = source.batches(10)
    args, keywords = source.call.arguments(read.tensors)
    torch.testing.assert_close(Nested()(*args, **keywords), 2 * ROWS)
    assert source.targets is not None


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "gave no sample"),
        (iter(()), "gave no sample"),
        (3, "an iterable of batches was expected"),
        ("folder", "an iterable of batches was expected"),
        ([(ROWS, LABELS[:3])], "3, 10 samples"),
        ([ROWS, torch.zeros(4, 5)], "samples of shape"),
        ([(ROWS, LABELS), ROWS], "some without"),
        ([(ROWS, ROWS, ROWS, ROWS)], "a tuple of 4"),
        ([object()], "tensors"),
        ([torch.tensor(1.0)], "batch dimension"),
    ],
)
def test_what_is_no_batch_is_said_in_one_line(batches: object, said: str) -> None:
    with pytest.raises(DataError, match=said) as fault:
        collect_batches(batches, One(), limit=100)
    assert "\n" not in str(fault.value)


def test_a_mapping_that_lacks_an_input_names_it() -> None:
    with pytest.raises(DataError, match="lacks features"):
        collect_batches([{"image": ROWS, "z": ROWS}], Two(), limit=100)


def test_what_a_loader_raises_is_a_fault_of_the_data() -> None:
    def batches() -> Iterator[Tensor]:
        yield ROWS
        raise KeyError("row 17")

    with pytest.raises(DataError, match="row 17"):
        collect_batches(batches(), One(), limit=100)

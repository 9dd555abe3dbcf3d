"""Samples that belong together are found, whatever they are, and are on one side of a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.data import DataSource, open_data
from compress.data.related import LOOKED, hold_back


class Given(DataSource):
    """Samples (N, …) in memory; counts what is read."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__("given", None, None)
        self.inputs = inputs
        self.read = 0

    @property
    def sample_count(self) -> int:
        return len(self.inputs)

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        self.read += len(numbers)
        return self.inputs[torch.from_numpy(numbers)]

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        return [self.inputs[number].numpy().tobytes() for number in numbers]


def scenes(count: int, height: int, width: int) -> Tensor:
    """Smooth random pictures (N, 3, H, W)."""
    drawn = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, height // 4, width // 4, generator=drawn)
    fine = torch.randn(count, 3, height, width, generator=drawn) * torch.rand(count, 3, 1, 1, generator=drawn)
    spread = 2 * torch.rand(count, 3, 1, 1, generator=drawn)
    return spread * torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") + 0.3 * fine


def crops(count: int) -> Tensor:
    """Three overlapping windows of each of so many pictures."""
    wide = scenes(count, 32, 48)
    return torch.stack([wide[..., start : start + 32] for start in (0, 8, 16)], 1).flatten(0, 1)


def frames(count: int) -> Tensor:
    """Windows sliding over a few long pictures."""
    wide = scenes(4, 32, 32 + count // 4)
    return torch.cat([wide[..., start : start + 32] for start in range(count // 4)])[torch.arange(count)]


def token_windows(length: int, step: int) -> Callable[[int], Tensor]:
    """Windows of a text in which words are about as frequent as in a language."""

    def windows(count: int) -> Tensor:
        numbers = np.random.default_rng(0).zipf(1.2, count * step + length) % 5000
        return torch.from_numpy(numbers).unfold(0, length, step)[:count]

    return windows


def copies(count: int) -> Tensor:
    """Rows of numbers, each three times with a little noise."""
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(count // 3, 64, generator=drawn).repeat_interleave(3, 0) + 0.2 * torch.randn(
        count // 3 * 3, 64, generator=drawn
    )


def split(inputs: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Random order, so many held back."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    return hold_back(Given(inputs), order, count, 16)


def leaking(fitting: Tensor, held: Tensor, of: Callable[[Tensor], Tensor]) -> float:
    """Share of the held-back samples that have a sample of the same thing among those fitted to."""
    return float(torch.isin(of(held), of(fitting)).double().mean())


@pytest.mark.parametrize("make", [lambda: crops(100), lambda: copies(300)], ids=["crops", "copies"])
def test_samples_of_one_thing_are_on_one_side(make: Callable[[], Tensor]) -> None:
    fitting, held, related = split(make(), 30)
    assert len(held) == 30
    assert sorted([*fitting.tolist(), *held.tolist()]) == list(range(300))
    assert related > 150
    assert leaking(fitting, held, lambda numbers: numbers // 3) < 0.25
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert leaking(order[30:], order[:30], lambda numbers: numbers // 3) > 0.9


def test_few_samples_are_not_torn_apart() -> None:
    fitting, held, related = split(copies(120), 6)
    assert related >= 48
    assert len(held) == 6
    assert leaking(fitting, held, lambda numbers: numbers // 3) == 0


def test_overlapping_windows_of_a_text_are_on_one_side() -> None:
    fitting, held, related = split(token_windows(64, 16)(600), 60)
    assert related > 300
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))

    def beside(numbers: Tensor, others: Tensor) -> float:
        return float((torch.isin(numbers + 1, others) | torch.isin(numbers - 1, others)).double().mean())

    assert beside(held, fitting) < 0.6 * beside(order[:60], order[60:])


def test_where_all_hang_together_held_back_samples_come_from_several_places() -> None:
    inputs = torch.cat([scenes(1, 32, 32 + 512)[..., start : start + 32] for start in range(512)])
    _, held, related = split(inputs, 48)
    assert related > 400
    assert len(held) == 48
    runs = 1 + int((held.sort().values.diff() > 8).sum())
    assert 4 <= runs <= 16, "a run for each place, not one for each sample"


@pytest.mark.parametrize(
    "inputs",
    [
        scenes(300, 32, 32),
        token_windows(64, 64)(300),
        torch.randn(300, 64, generator=torch.Generator().manual_seed(0)),
        torch.rand(300, 6, generator=torch.Generator().manual_seed(0)),
        torch.ones(300, 3, 16, 16),
        torch.full((300, 20), torch.nan),
        torch.randn(300, 2, 12, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.randn(300, 400, generator=torch.Generator().manual_seed(0)),
        torch.randn(300, 3, 64, generator=torch.Generator().manual_seed(0)),
        torch.randint(0, 255, (200, 3, 40, 40), generator=torch.Generator().manual_seed(0)),
        1e38 * scenes(200, 32, 32),
        crops(30),
    ],
    ids=[
        "pictures",
        "texts",
        "numbers",
        "few numbers",
        "equal",
        "nan",
        "films",
        "long",
        "signals",
        "bytes",
        "huge",
        "too few",
    ],
)
def test_where_hardly_any_are_related_the_first_are_held_back(inputs: Tensor) -> None:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(3))
    fitting, held, related = hold_back(Given(inputs), order, 20, 16)
    assert related == 0
    assert torch.equal(held, order[:20])
    assert torch.equal(fitting, order[20:])


def test_dense_data_have_no_related_samples() -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert hold_back(open_data("digits", None), order, 100, 64)[2] == 0


def test_of_many_samples_a_part_is_read_unless_some_are_related() -> None:
    plain = Given(torch.randn(3 * LOOKED, 32, generator=torch.Generator().manual_seed(0)))
    order = torch.randperm(plain.sample_count, generator=torch.Generator().manual_seed(1))
    assert hold_back(plain, order, 10, 64)[2] == 0
    assert plain.read <= LOOKED
    related = Given(copies(3 * LOOKED))
    fitting, held, number = hold_back(related, order, 300, 64)
    assert number > 2 * LOOKED
    assert leaking(fitting, held, lambda numbers: numbers // 3) < 0.05


def test_samples_of_several_shapes_are_divided_as_they_come() -> None:
    class Ragged(Given):
        def read_inputs(self, numbers: np.ndarray) -> Tensor:
            return super().read_inputs(numbers)[:, : 40 + int(numbers[0]) % 2]

    assert hold_back(Ragged(copies(300)), torch.arange(300), 20, 1)[2] == 0

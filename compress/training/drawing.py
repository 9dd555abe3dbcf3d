"""Batches for gradient steps: samples in a new order each epoch, on an accelerator once, images moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.compression.problem import SampleStream

SHIFT = 8  # an image is shifted by up to this part of its side: 4 of 32 pixels, as is common
SMALLEST_IMAGE = 16  # pixels a side
STEP_VALUES = 2**27  # numbers that a batch of more than the fewest makes in the network, at most: gradients need them
ON_CPU = 16, 64, 200  # fewest and most samples in a batch, and steps of an epoch where these let
ON_DEVICE = 32, 256, 100
HELD_SHARE = 0.25  # of an accelerator's free memory, that inputs may take


@dataclass(frozen=True, eq=False)
class Moves:
    """How each of B images is moved.

    Attributes:
        flips: (B,) whether it is mirrored.
        shifts: (2, B) pixels down and to the right, counted from the largest shift the other way.
    """

    flips: Tensor
    shifts: Tensor

    @classmethod
    def draw(cls, count: int, sides: Sequence[int], generator: torch.Generator) -> Moves:
        """Of so many images with these sides (height, width)."""
        flips = torch.rand(count, generator=generator) < 0.5
        shifts = [torch.randint(0, 2 * reach(side) + 1, (count,), generator=generator) for side in sides]
        return cls(flips, torch.stack(shifts))

    def to(self, device: torch.device) -> Moves:
        """On a device."""
        return Moves(self.flips.to(device), self.shifts.to(device))

    def part(self, first: int, count: int) -> Moves:
        """Of some of the images."""
        last = first + count
        return Moves(self.flips[first:last], self.shifts[:, first:last])


@dataclass(eq=False)
class Drawn:
    """Batches of a stream in random order, every sample once an epoch; on the device.

    What is random in an epoch goes to the device at its start, so that no step waits for a copy.

    Attributes:
        images: flip and shift the samples.
        inputs: all of the stream's, where they are on an accelerator; else they are read batch by batch.
    """

    stream: SampleStream
    device: torch.device
    images: bool
    seed: int
    inputs: tuple[Tensor, ...] | None = None
    _order: Tensor | None = None
    _moves: Moves | None = None
    _done: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def next(self) -> list[Tensor]:
        """Inputs of the next batch."""
        if self._order is None or self._done >= len(self._order):
            order = torch.randperm(self.stream.count, generator=self._generator)
            self._order, self._done = order if self.inputs is None else order.to(self.device), 0
            self._moves = None
        numbers = self._order[self._done : self._done + self.stream.batch_size]
        if self.inputs is None:
            batch = [tensor.to(self.device) for tensor in self.stream.of_samples(numbers)]
        else:
            batch = [tensor.index_select(0, numbers) for tensor in self.inputs]
        if self.images:
            if self._moves is None:
                drawn = Moves.draw(self.stream.count, batch[0].shape[2:], self._generator)
                self._moves = drawn.to(self.device)
            batch[0] = moved(batch[0], self._moves.part(self._done, len(numbers)))
        self._done += len(numbers)
        return batch


@dataclass(frozen=True, eq=False)
class Placed:
    """A stream whose batches come on the device; from its memory where `inputs` holds them all."""

    stream: SampleStream
    device: torch.device
    inputs: tuple[Tensor, ...] | None = None

    @property
    def count(self) -> int:
        """Samples."""
        return self.stream.count

    def first(self, count: int) -> Placed:
        """The first samples alone."""
        stream = replace(self.stream, indices=self.stream.indices[:count])
        inputs = None if self.inputs is None else tuple(tensor[:count] for tensor in self.inputs)
        return Placed(stream, self.device, inputs)

    def sizes(self) -> list[int]:
        """Samples in each batch."""
        return self.stream.sizes()

    def batch(self, number: int):  # type: ignore[no-untyped-def]
        """One batch: inputs, labels, targets, as they are read."""
        return self.stream.batch(number)

    def read(self, number: int) -> tuple[Tensor, ...]:
        """Inputs of one batch."""
        if self.inputs is None:
            return tuple(tensor.to(self.device) for tensor in self.stream.read(number))
        size = self.stream.batch_size
        return tuple(tensor[number * size : (number + 1) * size] for tensor in self.inputs)

    def drawn(self, *, images: bool, seed: int) -> Drawn:
        """Its batches in random order."""
        return Drawn(self.stream, self.device, images, seed, self.inputs)


def placed(stream: SampleStream, device: torch.device) -> Placed:
    """The stream with its batches on the device; copied there at once where that is another and has room."""
    if device.type != "cuda" or not stream.count:
        return Placed(stream, device)
    first = stream.read(0)
    size = sum(tensor[0].numel() * tensor.element_size() for tensor in first) * stream.count
    if size > HELD_SHARE * torch.cuda.mem_get_info(device)[0]:
        return Placed(stream, device)
    batches = [[tensor.to(device) for tensor in stream.read(number)] for number in range(len(stream.sizes()))]
    return Placed(stream, device, tuple(torch.cat(list(parts)) for parts in zip(*batches, strict=True)))


def takes_images(examples: Sequence[Tensor]) -> bool:
    """Whether samples are images alone: one or three channels of at least `SMALLEST_IMAGE` pixels a side."""
    probe = examples[0]
    return (
        len(examples) == 1
        and probe.is_floating_point()
        and probe.ndim == 4
        and probe.shape[1] in (1, 3)
        and min(probe.shape[2:]) >= SMALLEST_IMAGE
    )


def step_batch(probe: Tensor, samples: int, values: int) -> int:
    """Samples in a batch that gradients are taken of: few where each fills much memory, and few where there are few.

    More on an accelerator, where a step takes about as long whatever is in it.

    Args:
        values: numbers that one sample makes on its way through the network.
    """
    fewest, most, steps = ON_CPU if probe.device.type == "cpu" else ON_DEVICE
    largest = max(fewest, min(most, STEP_VALUES // max(1, values)))
    wanted = 1 << (max(1, samples // steps).bit_length() - 1)  # a power of two
    return max(fewest, min(largest, wanted))


def reach(side: int) -> int:
    """Pixels that an image of such a side is shifted by, at most."""
    return max(1, side // SHIFT)


def moved(images: Tensor, moves: Moves) -> Tensor:
    """Images (B, C, H, W), each flipped or not and shifted; the border is mirrored in."""
    flipped = torch.where(moves.flips[:, None, None, None], images.flip(3), images)
    high, wide = images.shape[2:]
    padded = nn.functional.pad(flipped, (reach(wide), reach(wide), reach(high), reach(high)), mode="reflect")
    rows, columns = (
        torch.arange(side, device=images.device) + shift[:, None]
        for side, shift in zip((high, wide), moves.shifts, strict=True)
    )  # (B, H), (B, W)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

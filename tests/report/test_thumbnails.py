"""Thumbnails: images become PNGs that another decoder reads back; other tensors become nothing."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from compress.report.thumbnails import SIDE, encode_png, thumbnail


def decode(uri: str) -> Image.Image:
    """The image in a data URI, read by Pillow."""
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_exactly_its_pixels(channels: int) -> None:
    pixels = torch.randint(256, (5, 7, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.open(io.BytesIO(encode_png(pixels)))
    found = torch.from_numpy(np.array(image)).reshape(5, 7, channels)
    assert torch.equal(found, pixels)


def test_a_normalisation_is_undone() -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    normalised = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    uri = thumbnail(normalised, {"mean": mean, "std": std})
    assert uri is not None
    found = torch.from_numpy(np.array(decode(uri))).permute(2, 0, 1) / 255
    assert float((found - image).abs().max()) < 0.5 / 255 + 1e-5


def test_a_large_image_shrinks_and_keeps_its_proportions() -> None:
    uri = thumbnail(torch.rand(3, 128, 256, generator=torch.Generator().manual_seed(0)))
    assert uri is not None
    assert decode(uri).size == (SIDE, SIDE // 2)


@pytest.mark.parametrize("shape", [(10,), (5, 8, 8), (3, 2, 8), (3, 4, 8, 8)])
def test_what_is_no_image_has_no_thumbnail(shape: tuple[int, ...]) -> None:
    assert thumbnail(torch.zeros(shape)) is None

"""A sample as a small PNG inside a data URI, where it is an image."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 64  # pixels at most
SMALLEST = 4  # pixels; below that a tensor is no picture
SLACK = 0.02  # how far outside [0, 1] values may lie once a normalisation is undone


def thumbnail(inputs: Tensor, preprocessing: Mapping[str, Any] | None = None) -> str | None:
    """`data:image/png;base64,…` of one sample (C, H, W) with one or three channels; None where it is no such image.

    The recorded normalisation is undone; where that does not lead back to [0, 1], the values are stretched to it.
    """
    if inputs.ndim != 3 or inputs.shape[0] not in (1, 3) or min(inputs.shape[1:]) < SMALLEST:
        return None
    if not inputs.is_floating_point() or not bool(torch.isfinite(inputs).all()):
        return None
    image = inputs.detach().cpu().to(torch.float32)
    mean, std = ((preprocessing or {}).get(name) for name in ("mean", "std"))
    if mean and std and len(mean) in (1, len(image)):
        image = image * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    low, high = float(image.min()), float(image.max())
    if low < -SLACK or high > 1 + SLACK:
        image = (image - low) / (high - low)
    scale = SIDE / max(image.shape[1:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = functional.interpolate(image[None], size=size, mode="area")[0]
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()  # (H, W, C)
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode("ascii")


def encode_png(pixels: Tensor) -> bytes:
    """A PNG file of pixels (H, W, 1 or 3) uint8, eight bits a channel, no filter (W3C PNG, third edition)."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, -1).numpy()
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 9)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

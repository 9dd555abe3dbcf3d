"""From raw samples to what a network reads: resize, crop, scale to [0, 1], normalise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import DataError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
MOST_PIXELS = 1 << 14  # of a side


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Preprocessing:
    """How images (uint8, 0…255) become inputs: (resize → centre crop → x / 255 − mean) / std, per channel.

    Float `inputs` of a data set are fed as they are: nothing here applies to them.

    Attributes:
        mean, std: per channel, in units of the [0, 1] scale; one value serves every channel. None: no normalisation.
        resize: pixels of the shorter side, or (height, width).
        crop: side of the centred square, or (height, width).
        interpolation: of the resize, antialiased: nearest, bilinear or bicubic.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and not (isinstance(values, tuple) and all(is_number(value) for value in values)):
                raise ValueError(f"`{name}` must be numbers, one a channel, got {values!r:.60}.")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
            if size is not None and not all(type(side) is int and 1 <= side <= MOST_PIXELS for side in sides):
                raise ValueError(f"`{name}` must be one or two sides of 1 to {MOST_PIXELS} pixels, got {size!r:.60}.")
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` must be given together.")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ValueError(f"`std` must be positive, got {self.std}.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The value that `as_dict` described. Raises ValueError."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"Unknown preprocessing options: {', '.join(sorted(unknown))}.")
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)

    def shape(self, image: Any) -> Any:
        """Resize and crop a PIL image or a uint8 tensor (…, C, H, W)."""
        if self.resize is None and self.crop is None:
            return image
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as transforms

        if self.resize is not None:
            size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            mode = InterpolationMode(self.interpolation)
            image = transforms.resize(image, size, interpolation=mode, antialias=True)
        if self.crop is not None:
            size = [self.crop, self.crop] if isinstance(self.crop, int) else list(self.crop)
            image = transforms.center_crop(image, size)
        return image

    def normalise(self, images: Tensor) -> Tensor:
        """Inputs (B, C, H, W) float32 of images (B, C, H, W) uint8. Raises DataError on a wrong channel count."""
        inputs = images.to(torch.float32).div_(255)
        if self.mean is None or self.std is None:
            return inputs
        channels = images.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise DataError(f"--{name} has {len(values)} values, the images have {channels} channels.")
        mean = torch.tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return inputs.sub_(mean).div_(std)

    def apply(self, images: np.ndarray) -> Tensor:
        """Inputs (B, C, H, W) float32 of images (B, H, W, C) uint8."""
        channels_first = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
        return self.normalise(self.shape(channels_first))

"""What a network reads: the shape of one sample and the published preprocessing, where the name says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.checkpoint.folders import timm_inputs
from compress.data.preprocessing import Preprocessing
from compress.models import REFERENCE_NETS
from compress.models.plain import chain_input_shape


def describe_inputs(spec: str, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Shape of one sample and the published preprocessing, where known."""
    scheme, _, name = spec.partition(":")
    if scheme == "compress":
        net = REFERENCE_NETS[name]
        shape = net.input_shape(arguments)
        mean, std = net.normalisation.mean, net.normalisation.std
        fitting = len(shape) == 3 and len(mean) in (1, shape[0])
        return shape, Preprocessing(mean=mean, std=std) if fitting else None
    if scheme == "torchvision":
        return describe_torchvision(name)
    if scheme == "timm":
        return describe_timm(name, arguments)
    if scheme == "chain":
        return chain_input_shape(arguments), None
    return None, None


def describe_torchvision(name: str) -> tuple[tuple[int, ...], Preprocessing | None]:
    """Input shape and transforms of a torchvision model's default weights (only their description is read)."""
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    side = transforms.crop_size[0]
    preprocessing = Preprocessing(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        resize=transforms.resize_size[0] if len(transforms.resize_size) == 1 else tuple(transforms.resize_size),
        crop=side if len(transforms.crop_size) == 1 else tuple(transforms.crop_size),
        interpolation=transforms.interpolation.value,
    )
    return (3, side, side), preprocessing


def describe_timm(name: str, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Input shape and transforms of a timm model's default weights (only their description is read).

    Arguments that change the inputs count: `img_size` and `in_chans`, whose statistics are not known.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None, None
    described = dict(vars(config))
    channels, *sides = described["input_size"]
    size = arguments.get("img_size", sides)
    described["input_size"] = (arguments.get("in_chans", channels), *((size, size) if isinstance(size, int) else size))
    shape, preprocessing = timm_inputs(described)
    if preprocessing is not None and shape is not None and len(preprocessing.mean or ()) not in (1, shape[0]):
        return shape, None
    return shape, preprocessing

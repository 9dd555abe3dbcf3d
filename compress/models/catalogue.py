"""The reference nets by name, with what a file does not say: input shape, normalisation, arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import nn

from compress.models.chains import alexnet_cifar10, digits_net, lenet_300_100, mlp, mlp_factorized, mnist_cnn
from compress.models.chains import vgg19_cifar10 as vgg19
from compress.models.resnet import resnet_cifar10

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, on the [0, 1] scale, of a data set's training images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MNIST = Normalisation((0.1307,), (0.3081,))
DIGITS = Normalisation((0.3060,), (0.3762,))


@dataclass(frozen=True)
class ReferenceNet:
    """A published network.

    Attributes:
        build: makes the module from keyword arguments.
        infer: keyword arguments (plain data) of the net that a state dict's shapes could belong to, None if they
            cannot; KeyError and IndexError mean None. The caller compares all names and shapes afterwards.
        input_shape: shape of one sample, from the arguments.
        normalisation: of the data set it was published with.
    """

    build: Callable[..., nn.Module]
    infer: Callable[[Shapes], dict[str, Any] | None]
    input_shape: Callable[[Mapping[str, Any]], tuple[int, ...]]
    normalisation: Normalisation


def infer_vgg19(shapes: Shapes) -> dict[str, Any] | None:
    """VGG-19 with or without BatchNorm, with three linear layers or one."""
    batch_norm = "features.1.running_mean" in shapes
    single = "classifier.weight" in shapes
    head = "classifier.weight" if single else "classifier.6.weight"
    hidden = 0 if single else shapes["classifier.1.weight"][0]
    channels = shapes["features.0.weight"][1]
    return {"num_classes": shapes[head][0], "channels": channels, "batch_norm": batch_norm, "hidden": hidden}


def infer_alexnet(shapes: Shapes) -> dict[str, Any] | None:
    """AlexNet with a 3×3 first convolution."""
    first = shapes["features.0.weight"]
    classes, hidden = shapes["classifier.6.weight"]
    return {"num_classes": classes, "channels": first[1], "hidden": hidden}


def infer_resnet(shapes: Shapes) -> dict[str, Any] | None:
    """Three stages of equally many blocks with two convolutions."""
    blocks = sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in shapes)
    width, channels = shapes["conv1.weight"][:2]
    return {"depth": 6 * blocks + 2, "num_classes": shapes["linear.weight"][0], "channels": channels, "width": width}


def infer_lenet(shapes: Shapes) -> dict[str, Any] | None:
    """Three linear layers fc1, fc2, fc3."""
    hidden = [shapes["fc1.weight"][0], shapes["fc2.weight"][0]]
    return {"num_classes": shapes["fc3.weight"][0], "inputs": shapes["fc1.weight"][1], "hidden": hidden}


def infer_mlp(shapes: Shapes) -> dict[str, Any] | None:
    """Linear layers layers.0, layers.2, …"""
    weights = _ordered(shapes, ".weight")
    widths = [shapes[weights[0]][1], *(shapes[name][0] for name in weights)]
    return {"widths": widths, "bias": "layers.0.bias" in shapes}


def infer_mlp_factorized(shapes: Shapes) -> dict[str, Any] | None:
    """Pairs of linear layers layers.0.0, layers.0.1, layers.2.0, …"""
    first, second = _ordered(shapes, ".0.weight"), _ordered(shapes, ".1.weight")
    widths = [shapes[first[0]][1], *(shapes[name][0] for name in second)]
    return {"widths": widths, "hidden": shapes[first[0]][0]}


def infer_mnist_cnn(shapes: Shapes) -> dict[str, Any] | None:
    """Convolutions features.0, .3, .6 and linear layers classifier.0, .2; the image side follows from the flatten."""
    widths = [shapes[f"features.{index}.weight"][0] for index in (0, 3, 6)]
    hidden, flat = shapes["classifier.0.weight"]
    side = isqrt(flat // widths[-1])
    known = {3: 28, 4: 32, 1: 8}
    return {
        "num_classes": shapes["classifier.2.weight"][0],
        "channels": shapes["features.0.weight"][1],
        "widths": widths,
        "hidden": hidden,
        "side": known.get(side, 8 * side),
    }


def infer_digits(shapes: Shapes) -> dict[str, Any] | None:
    """The packaged example."""
    return {"num_classes": shapes["classifier.4.weight"][0]}


def _ordered(shapes: Shapes, ending: str) -> list[str]:
    names = [name for name in shapes if name.startswith("layers.") and name.endswith(ending)]
    return sorted(names, key=lambda name: int(name.split(".")[1]))


def _cifar_shape(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    return (arguments.get("channels", 3), 32, 32)


def flat_shape(inputs: int) -> tuple[int, ...]:
    """A grey square image where the number of inputs is a square, else a vector."""
    side = isqrt(inputs)
    return (1, side, side) if side * side == inputs else (inputs,)


def _widths_shape(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    return flat_shape(arguments.get("widths", (784,))[0])


REFERENCE_NETS: dict[str, ReferenceNet] = {
    "vgg19_cifar10": ReferenceNet(vgg19, infer_vgg19, _cifar_shape, CIFAR10),
    "alexnet_cifar10": ReferenceNet(alexnet_cifar10, infer_alexnet, _cifar_shape, CIFAR10),
    "resnet_cifar10": ReferenceNet(resnet_cifar10, infer_resnet, _cifar_shape, CIFAR10),
    "lenet_300_100": ReferenceNet(
        lenet_300_100, infer_lenet, lambda arguments: flat_shape(arguments.get("inputs", 784)), MNIST
    ),
    "mnist_cnn": ReferenceNet(
        mnist_cnn,
        infer_mnist_cnn,
        lambda arguments: (arguments.get("channels", 1), *2 * (arguments.get("side", 28),)),
        MNIST,
    ),
    "mlp": ReferenceNet(mlp, infer_mlp, _widths_shape, MNIST),
    "mlp_factorized": ReferenceNet(mlp_factorized, infer_mlp_factorized, _widths_shape, MNIST),
    "digits_net": ReferenceNet(digits_net, infer_digits, lambda _: (1, 8, 8), DIGITS),
}

"""Reference nets without branches: VGG-19, AlexNet, LeNet-300-100, MLP-L-K, the small MNIST CNN, the digits net."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

VGG19_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


class ConvNet(nn.Module):
    """`features`, flattened, into `classifier`: images (B, C, H, W) to scores (B, classes)."""

    def __init__(self, features: nn.Sequential, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(torch.flatten(self.features(images), 1))
        return scores


def vgg_features(channels: int, batch_norm: bool) -> nn.Sequential:
    """The sixteen 3×3 convolutions of VGG-19 with five 2×2 max pools; 0 stands for a pool."""
    layers: list[nn.Module] = []
    for width in VGG19_WIDTHS:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*layers)


def vgg19_cifar10(num_classes: int = 10, channels: int = 3, batch_norm: bool = True, hidden: int = 512) -> nn.Module:
    """VGG-19 (Simonyan & Zisserman 2015) for 32×32 images, classifier 512-hidden-hidden-classes.

    Shenouda et al. 2024 cut its last hidden layer from 512 to 47 units. `hidden=0` is the form with a single linear
    layer as the classifier (kuangliu/pytorch-cifar, used by Yang et al. 2022, PathProx).
    """
    classifier: nn.Module
    if hidden:
        classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(512, hidden), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip
    else:
        classifier = nn.Linear(512, num_classes)
    return ConvNet(vgg_features(channels, batch_norm), classifier)


def alexnet_cifar10(num_classes: int = 10, channels: int = 3, hidden: int = 4096) -> nn.Module:
    """AlexNet (Krizhevsky et al. 2012) for 32×32 images: the classifier reads 256 × 6 × 6 = 9216 features.

    The 9216-4096-4096-classes classifier is that of Shenouda et al. 2024, as torchvision's. A stride of 1 in the first
    convolution, and its pools, leave 6×6.
    """
    features = nn.Sequential(
        nn.Conv2d(channels, 64, 3, stride=1, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(6),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(256 * 6 * 6, hidden), nn.ReLU(inplace=True),
        nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    )  # fmt: skip
    return ConvNet(features, classifier)


class Mlp(nn.Module):
    """Fully connected layers with ReLUs between them; a sample of any shape is flattened: (B, …) to (B, outputs)."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(torch.flatten(inputs, 1))
        return outputs


def mlp(widths: tuple[int, ...] | list[int] = (784, 400, 400, 10), bias: bool = True) -> nn.Module:
    """MLP-L-K (Yang et al. 2022): L linear layers, a ReLU after each but the last. `widths`: inputs, K …, outputs."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return Mlp(nn.Sequential(*layers[:-1]))


def mlp_factorized(widths: tuple[int, ...] | list[int] = (784, 400, 400, 10), hidden: int = 400) -> nn.Module:
    """MLP-L-K factorized (Yang et al. 2022): each linear layer is two, through `hidden` linear units, the first without
    bias; so every ReLU unit has its own input and output weights."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs)), nn.ReLU()]
    return Mlp(nn.Sequential(*layers[:-1]))


class LeNet300(nn.Module):
    """784-300-100-10 with names fc1, fc2, fc3 (LeCun et al. 1998)."""

    def __init__(self, inputs: int, hidden: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(torch.flatten(images, 1)))
        scores: Tensor = self.fc3(torch.relu(self.fc2(hidden)))
        return scores


def lenet_300_100(
    num_classes: int = 10, inputs: int = 784, hidden: tuple[int, int] | list[int] = (300, 100)
) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998), the usual small MNIST network."""
    return LeNet300(inputs, (hidden[0], hidden[1]), num_classes)


def mnist_cnn(
    num_classes: int = 10,
    channels: int = 1,
    widths: tuple[int, int, int] | list[int] = (32, 64, 128),
    hidden: int = 128,
    side: int = 28,
) -> nn.Module:
    """The small MNIST CNN: three 3×3 convolutions, each with a 2×2 max pool and a ReLU, and two linear layers.

    The layers are those of the ℓ1 parameter-choice experiment (Shen, Wang, Xu, Yan 2024); its exact widths are lost in
    the text at hand, so widths are arguments, and are read off a state dict's shapes when one is recognised.
    """
    layers: list[nn.Module] = []
    before = channels
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        before = width
    features = before * (side // 8) ** 2
    classifier = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_classes))
    return ConvNet(nn.Sequential(*layers), classifier)


def digits_net(num_classes: int = 10) -> nn.Module:
    """The packaged example, 8×8 digits: two convolutions with BatchNorm, a pool, an MLP with two hidden layers."""
    features = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
        nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Linear(48 * 4 * 4, 128), nn.ReLU(inplace=True), nn.Linear(128, 64), nn.ReLU(inplace=True),
        nn.Linear(64, num_classes),
    )  # fmt: skip
    return ConvNet(features, classifier)

"""ResNet-20/32/44/56 for CIFAR-10 with option A shortcuts (He et al. 2016, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Shortcut(nn.Module):
    """Option A: the identity, or every `stride`-th pixel with zeros around the channels; it has no parameters."""

    def __init__(self, stride: int, added: int) -> None:
        super().__init__()
        self.stride = stride
        self.channels_before = added // 2
        self.channels_after = added - added // 2

    def forward(self, inputs: Tensor) -> Tensor:
        if self.stride == 1:
            return inputs
        rows = inputs[:, :, :: self.stride, :: self.stride]
        return functional.pad(rows, (0, 0, 0, 0, self.channels_before, self.channels_after))


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = Shortcut(stride, width - channels)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(inputs))


class CifarResNet(nn.Module):
    """Three stages of `blocks` residual blocks: images (B, C, 32, 32) to scores (B, classes)."""

    def __init__(self, blocks: int, num_classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1, blocks)
        self.layer2 = self._stage(width, 2 * width, 2, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks)
        self.linear = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(channels: int, width: int, stride: int, blocks: int) -> nn.Sequential:
        first = Block(channels, width, stride)
        return nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        scores: Tensor = self.linear(functional.adaptive_avg_pool2d(hidden, 1).flatten(1))
        return scores


def resnet_cifar10(depth: int = 20, num_classes: int = 10, channels: int = 3, width: int = 16) -> nn.Module:
    """ResNet of `depth` = 6 n + 2 layers (20, 32, 44, 56, 110), option A shortcuts. Raises ValueError."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"`depth` must be 6 n + 2 (20, 32, 44, 56, 110), got {depth}.")
    return CifarResNet((depth - 2) // 6, num_classes, channels, width)

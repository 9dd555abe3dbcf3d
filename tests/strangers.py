"""Networks as strangers write them: named by `--arch tests.strangers:NAME`, known to no catalogue."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SequentialCnn(nn.Module):
    """Three conv-ReLU-pool blocks and two linear layers, for CIFAR-10."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, width in ((3, 32), (32, 64), (64, 128)):
            blocks += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.conv_layers = nn.Sequential(*blocks)
        self.fc_layers = nn.Sequential(
            nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.fc_layers(self.conv_layers(images))
        return scores


class SmallVgg(nn.Module):
    """A small VGG without BatchNorm, for MNIST."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 28, 3, padding=1), nn.ReLU(), nn.Conv2d(28, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(images))
        return scores


class Net(nn.Module):
    """Four linear layers, for 28×28 images; its pickle names `__main__.Net`."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)
        self.fc4 = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(images.flatten(1)))
        hidden = torch.relu(self.fc3(torch.relu(self.fc2(hidden))))
        scores: Tensor = self.fc4(hidden)
        return scores

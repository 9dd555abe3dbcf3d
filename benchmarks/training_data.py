"""Data and networks that the parts of the training benchmark share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.reporting import Run


def mnist(run: Run, per_class: int, test: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat normalised MNIST: `per_class` training images of each class, and the first `test` test images."""
    with np.load(run.options.data / "mnist-train.npz") as file:
        images, labels = file["images"], file["labels"]
    generator = np.random.default_rng(seed)
    chosen = np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)])
    with np.load(run.options.data / "mnist-test.npz") as file:
        test_images, test_labels = file["images"][:test], file["labels"][:test]
    flat = [
        torch.from_numpy((part.reshape(len(part), -1) / 255.0 - 0.1307) / 0.3081).float()
        for part in (images[chosen], test_images)
    ]
    return flat[0], torch.from_numpy(labels[chosen]).long(), flat[1], torch.from_numpy(test_labels).long()


def factorized(width: int) -> nn.Module:
    """MLP-3-K factorized as the paper's table has it: three single-hidden-layer networks in a row."""
    sizes = [(784, width, width), (width, width, width), (width, width, 10)]
    parts = [(nn.Linear(before, hidden), nn.ReLU(), nn.Linear(hidden, after)) for before, hidden, after in sizes]
    return nn.Sequential(*(part for three in parts for part in three))


def accuracy(module: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    module.eval()
    with torch.no_grad():
        return 100 * (module(inputs).argmax(1) == labels).double().mean().item()

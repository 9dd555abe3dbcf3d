"""Moments of real layers for the benchmarks: a digits MLP trained here, and the shared VGG-19 for CIFAR-10."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.convex import MomentAccumulator, Moments

VGG_LAYERS = ("classifier.4", "classifier.6", "features.17", "features.43")


def digits_moments(*, epochs: int = 60, hidden: int = 512, seed: int = 0) -> dict[str, Moments]:
    """Moments of an MLP 64-512-512-10 trained with weight decay on scikit-learn's 8×8 digits.

    "dig2" is its head 512 → 10, "dig1" its 512 → 512 layer, both over all 1 797 images.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.as_tensor(data.data, dtype=torch.float32) / 16
    labels = torch.as_tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second, head = nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)
        parameters = [*first.parameters(), *second.parameters(), *head.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs)).split(64):
                hidden_values = second(first(inputs[rows]).relu()).relu()
                loss = functional.cross_entropy(head(hidden_values), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    with torch.no_grad():
        one = first(inputs).relu()
        two = second(one).relu()
        return {
            "dig2": Moments.of(two, two @ head.weight.T),
            "dig1": Moments.of(one, one @ second.weight.T),
        }


def vgg_moments(checkpoint: Path, images: Path, *, samples: int = 4000, positions: int = 4) -> dict[str, Moments]:
    """Moments at the inputs of `VGG_LAYERS` of the VGG-19 for CIFAR-10, by one plain forward pass with hooks.

    Linear consumers use every image, conv consumers `positions` seeded output positions an image.
    """
    from compress.models.chains import vgg19_cifar10

    network = vgg19_cifar10()
    state = torch.load(checkpoint, weights_only=True)
    state = state.get("state_dict", state)
    network.load_state_dict({name: value.float() for name, value in state.items()})
    network.eval()
    with numpy.load(images) as data:
        pixels = torch.as_tensor(data["images"][:samples])
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    generator = torch.Generator().manual_seed(0)
    modules = dict(network.named_modules())
    sums = {
        name: MomentAccumulator(9 if isinstance(modules[name], nn.Conv2d) else 1, output_gram=True)
        for name in VGG_LAYERS
    }

    def record(name: str, layer: nn.Module, value: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            patches = functional.unfold(value, 3, padding=1)  # (N, K·9, positions)
            chosen = torch.randint(patches.shape[2], (positions,), generator=generator)
            rows = patches[:, :, chosen].permute(0, 2, 1).reshape(-1, patches.shape[1])
            weight = layer.weight.reshape(layer.weight.shape[0], -1)
        else:
            rows, weight = value, layer.weight
        sums[name].add(rows, rows.double() @ weight.T.double())

    for name in VGG_LAYERS:
        modules[name].register_forward_pre_hook(
            lambda layer, given, name=name: record(name, layer, given[0])  # type: ignore[misc]
        )
    with torch.no_grad():
        for batch in pixels.split(250):
            network(((batch.float() / 255 - mean) / std).permute(0, 3, 1, 2))
    return {name: total.moments() for name, total in sums.items()}


def save_moments(path: Path, moments: dict[str, Moments]) -> None:
    """Write moments so that a benchmark can be repeated without the network."""
    torch.save({name: {f.name: getattr(own, f.name) for f in fields(own)} for name, own in moments.items()}, path)


def load_moments(path: Path) -> dict[str, Moments]:
    """Read what `save_moments` wrote."""
    return {name: Moments(**own) for name, own in torch.load(path, weights_only=True).items()}

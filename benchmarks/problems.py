"""Seeded problems like A, B and C of the solver table: ReLU features, near-duplicate units, outputs of a network."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.convex import Moments


def relu_features(count: int, units: int, inputs: int, seed: int, *, twins: int = 0, noise: float = 1e-4) -> Tensor:
    """Φ (count, units): rectified random projections of `inputs` latent variables with a decaying spectrum.

    The last `twins` units repeat the first ones up to relative `noise`.
    """
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    latent = latent * torch.arange(1, inputs + 1, dtype=torch.float64).pow(-1.25)
    own = units - twins
    weights = torch.randn(inputs, own, generator=generator, dtype=torch.float64)
    bias = 0.3 * torch.randn(own, generator=generator, dtype=torch.float64)
    features = (latent @ weights + bias).relu()
    if twins:
        jitter = torch.randn(count, twins, generator=generator, dtype=torch.float64) * noise
        features = torch.cat([features, features[:, :twins] * (1 + jitter)], 1)
    return features


def problem_moments(name: str, *, scale: float = 1.0) -> Moments:
    """Moments of problem "A" (K 512, D 10, near-duplicates, centred), "B" (K 1024, D 256), "C" (K 4096, D 1000)
    or "E" (K 4096, D 4096); `scale` shrinks K and D."""
    units, outputs, inputs, twins = {
        "A": (512, 10, 24, 24),
        "B": (1024, 256, 24, 0),
        "C": (4096, 1000, 24, 0),
        "E": (4096, 4096, 24, 0),
    }[name]
    units, outputs = round(units * scale), round(outputs * scale)
    seed = ord(name)
    features = relu_features(units * 2 if name != "A" else 20_000, units, inputs, seed, twins=round(twins * scale))
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(units, outputs, generator=generator, dtype=torch.float64) / units**0.5
    weights *= torch.rand(units, 1, generator=generator, dtype=torch.float64) ** 2
    moments = Moments.of(features, features @ weights, output_gram=False)
    return moments.centred() if name == "A" else moments


def conv_moments(units: int, taps: int, outputs: int, seed: int = 9) -> Moments:
    """Moments of a conv consumer: `units` channels with `taps` correlated kernel taps each."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * units * taps
    base = relu_features(rows, units, 24, seed)
    taps_ = [(base.roll(shift, 0) * 0.5 + base).relu() for shift in range(taps)]
    features = torch.stack(taps_, 2).reshape(rows, units * taps)
    weights = torch.randn(units * taps, outputs, generator=generator, dtype=torch.float64) / (units * taps) ** 0.5
    weights *= (torch.rand(units, generator=generator, dtype=torch.float64) ** 2).repeat_interleave(taps)[:, None]
    return Moments.of(features, features @ weights, group_size=taps, output_gram=False)

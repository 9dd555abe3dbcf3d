"""Moments of few samples, shrunk towards uncorrelated features so that chance correlations do not look like copies."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.convex.statistics.moments import Moments


def shrinkage_intensity(gram: Tensor, count: float) -> float:
    """ρ in (0, 1]: the part of a diagonal target in (1 − ρ)·C + ρ·I for the correlations C of `count` rows.

    The oracle approximating shrinkage estimator (Chen, Wiesel, Eldar and Hero 2010, equation 23), which comes close to
    the least expected squared error for Gaussian features. Dead columns are left out.

    Args:
        gram: second moments (n, n), centred where means are free.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 0
    size = int(alive.sum())
    if size < 2 or count <= 0:
        return 1.0
    scale = torch.where(alive, diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt(), 0.0)
    square = float((gram * scale[:, None] * scale).square().sum())  # tr C², and tr C = n
    spread = square - size  # tr C² − tr²C/n
    if spread <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / size) * square + size**2) / ((count + 1 - 2 / size) * spread))


def shrink_moments(moments: Moments, weights: Tensor) -> Moments:
    """The moments as if each feature also had noise of its own, of the share that shrinkage finds.

    Outputs are those of `weights` for that noise, so a problem whose outputs are Ψ = ΦV stays one: with all units its
    error is zero, and a unit that only chance lets others replace costs what its own noise carries.

    Args:
        moments: centred where a constant is free; see `Moments.centred`.
        weights: output weights V (K·s, D) of the original network.
    """
    intensity = shrinkage_intensity(moments.gram, moments.count)
    strength = intensity / (1 - intensity) if intensity < 0.99 else 99.0
    noise = strength * moments.gram.diagonal()  # (K·s,)
    weights = weights.to(moments.covariance)
    carried = weights * noise[:, None]
    covariance = moments.covariance.clone()
    covariance.diagonal().add_(noise)
    outputs = moments.output_covariance
    return replace(
        moments,
        covariance=covariance,
        cross_covariance=moments.cross_covariance + carried,
        centred_energy=moments.centred_energy + float((weights * carried).sum()),
        output_covariance=None if outputs is None else outputs + weights.T @ carried,
    )

"""Second moments of features and outputs: everything the convex problems know about the data (docs/theory.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.convex.statistics.sums import CentredSums, as_tensor
from compress.errors import NonFiniteError

_TWIN = 1e-13  # squared relative distance below which two units are multiples of each other


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of Φ (N, K·s) and Ψ (N, D), in float64; shards of the samples merge exactly.

    What is stored is about the mean row, so no spread is lost under a large mean. Problems read `gram`, `cross`
    and `energy`: about zero for a fit without an intercept, or, of `centred()` moments, about the mean for a fit with
    one.

    Columns of Φ are unit-major: column k·s + j is tap j of unit k.

        features = torch.tensor([[1.0, 2.0], [1.0, 4.0]])      # N = 2 samples of K = 2 units; the first is constant
        moments = Moments.of(features, features @ torch.tensor([[3.0], [1.0]]))
        moments.covariance                                     # [[0, 0], [0, 1]]
        moments.gram                                           # [[1, 3], [3, 10]], ΦᵀΦ/N
        moments.cross                                          # [[6], [19]], ΦᵀΨ/N

    Attributes:
        covariance: (Φ − 1φ̄ᵀ)ᵀ(Φ − 1φ̄ᵀ)/N (K·s, K·s). Rows and columns of constant features are exactly zero.
        cross_covariance: (Φ − 1φ̄ᵀ)ᵀ(Ψ − 1ψ̄ᵀ)/N (K·s, D).
        centred_energy: ‖Ψ − 1ψ̄ᵀ‖²_F/N.
        feature_mean: mean row φ̄ of Φ (K·s,).
        output_mean: mean row ψ̄ of Ψ (D,).
        count: N, or the sum of the sample weights.
        group_size: s, columns per unit.
        output_covariance: (Ψ − 1ψ̄ᵀ)ᵀ(Ψ − 1ψ̄ᵀ)/N (D, D) when it was recorded; else None.
        is_centred: the intercept is free: `gram`, `cross`, `energy` and `output_gram` are about the mean.
        rounding: relative rounding of the products that were summed.
    """

    covariance: Tensor
    cross_covariance: Tensor
    centred_energy: float
    feature_mean: Tensor
    output_mean: Tensor
    count: float
    group_size: int = 1
    output_covariance: Tensor | None = None
    is_centred: bool = False
    rounding: float = torch.finfo(torch.float64).eps

    def __post_init__(self) -> None:
        n = self.covariance.shape[0]
        if self.covariance.ndim != 2 or self.covariance.shape[1] != n:
            raise ValueError(f"`covariance` must be square (K·s, K·s), got {tuple(self.covariance.shape)}.")
        if self.cross_covariance.ndim != 2 or self.cross_covariance.shape[0] != n:
            raise ValueError(
                f"`cross_covariance` must have shape (K·s, D) = ({n}, D) to match `covariance`, "
                f"got {tuple(self.cross_covariance.shape)}."
            )
        d = self.cross_covariance.shape[1]
        if self.group_size < 1 or n % self.group_size:
            raise ValueError(f"`group_size` must divide the {n} columns of Φ, got {self.group_size}.")
        shapes = {
            "feature_mean": (n,),
            "output_mean": (d,),
            "output_covariance": (d, d),
            "covariance": (n, n),
            "cross_covariance": (n, d),
        }
        total = self.centred_energy
        for name, shape in shapes.items():
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(f"`{name}` must have shape {shape}, got {tuple(value.shape)}.")
            if value.dtype != torch.float64:
                raise ValueError(f"`{name}` must be float64, got {value.dtype}.")
            total += float(value.sum())
        if not total - total == 0:
            raise NonFiniteError("moments hold NaN or Inf: check the activations they were recorded from.")

    @classmethod
    def of(
        cls,
        features: Any,
        outputs: Any,
        *,
        group_size: int = 1,
        weights: Any = None,
        output_gram: bool = True,
    ) -> Moments:
        """Moments of Φ (N, K·s) and Ψ (N, D), optionally with sample weights (N,); cost O(N·(K·s)²).

        Tensors or numpy arrays; any real dtype.
        """
        sums = CentredSums(group_size, output_gram=output_gram)
        sums.add(features, outputs, weights)
        return cls(**sums.parts())

    @cached_property
    def gram(self) -> Tensor:
        """ΦᵀΦ/N (K·s, K·s)."""
        return self._about(self.covariance, self.feature_mean, self.feature_mean)

    @cached_property
    def cross(self) -> Tensor:
        """ΦᵀΨ/N (K·s, D)."""
        return self._about(self.cross_covariance, self.feature_mean, self.output_mean)

    @cached_property
    def output_gram(self) -> Tensor | None:
        """ΨᵀΨ/N (D, D) when it was recorded; else None."""
        if self.output_covariance is None:
            return None
        return self._about(self.output_covariance, self.output_mean, self.output_mean)

    @cached_property
    def energy(self) -> float:
        """‖Ψ‖²_F/N."""
        return self.centred_energy + (0.0 if self.is_centred else float(self.output_mean @ self.output_mean))

    @cached_property
    def unit_energies(self) -> Tensor:
        """‖Φ_k‖²_F/N (K,) of every unit's columns."""
        return self._by_unit(self.gram.diagonal())

    @cached_property
    def unit_sizes(self) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
        """‖Φ_k‖_F/√N (K,), and the same of the columns as they came, their means counted in; zeros of constant units.

        Rounding is relative to the second.
        """
        sizes = numpy.sqrt(numpy.maximum(self.unit_energies.cpu().numpy(), 0))
        recorded = self._by_unit(self.covariance.diagonal() + self.feature_mean.square()).cpu().numpy()
        return sizes, numpy.where(sizes > 0, numpy.maximum(sizes, numpy.sqrt(recorded)), 0.0)

    @cached_property
    def multiples(self) -> list[tuple[int, int]]:
        """Pairs of units with φ_j = aφ_i: candidates are neighbours in ‖H_k‖/‖φ_k‖, then checked on the gram."""
        if self.unit_count < 2:
            return []
        s, energies = self.group_size, self.unit_energies.cpu().numpy()
        correlated = self._by_unit(self.cross.square().sum(1)).sqrt().cpu().numpy()
        with numpy.errstate(all="ignore"):
            keys = correlated / numpy.maximum(self.unit_sizes[0], 1e-150)
        keys[energies <= 0] = -1.0
        order = keys.argsort(kind="stable")
        ordered = keys[order]
        close = (ordered[1:] - ordered[:-1] <= 1e-9 * ordered[1:]) & (ordered[1:] > 0)
        pairs = []
        for position in close.nonzero()[0].tolist():
            i, j = int(order[position]), int(order[position + 1])
            rows = self.gram[i * s : i * s + s]
            mixed = float(rows[:, j * s : j * s + s].diagonal().sum())
            a = mixed / float(energies[i])
            distance = float(energies[j]) - a * mixed  # ‖φ_j − aφ_i‖² at the best a
            if abs(distance) <= _TWIN * float(energies[j]):
                pairs.append((i, j))
        return pairs

    def _by_unit(self, per_column: Tensor) -> Tensor:
        return per_column if self.group_size == 1 else per_column.reshape(-1, self.group_size).sum(1)

    def _about(self, covariance: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """covariance + left·rightᵀ; the same tensor where the mean is taken away or zero."""
        if self.is_centred or not (bool(left.any()) and bool(right.any())):
            return covariance
        return torch.addr(covariance, left, right)

    @property
    def unit_count(self) -> int:
        """K."""
        return self.covariance.shape[0] // self.group_size

    @property
    def output_count(self) -> int:
        """D."""
        return self.cross_covariance.shape[1]

    def merge(self, other: Moments) -> Moments:
        """The moments of both shards of samples together (Chan, Golub and LeVeque 1983)."""
        if self.covariance.shape != other.covariance.shape or self.output_count != other.output_count:
            raise ValueError(
                "shards must have equal shapes, got cross "
                f"{tuple(self.cross_covariance.shape)} and {tuple(other.cross_covariance.shape)}."
            )
        if self.is_centred != other.is_centred:
            raise ValueError("shards must both be centred, or neither.")
        if self.group_size != other.group_size:
            raise ValueError(f"shards must have equal `group_size`, got {self.group_size} and {other.group_size}.")
        total = self.count + other.count
        if total <= 0:
            return self
        a, b = self.count / total, other.count / total
        features, outputs = other.feature_mean - self.feature_mean, other.output_mean - self.output_mean
        output_covariance = None
        if self.output_covariance is not None and other.output_covariance is not None:
            output_covariance = a * self.output_covariance + b * other.output_covariance
            output_covariance.addr_(outputs, outputs, alpha=a * b)
        return Moments(
            covariance=(a * self.covariance).add_(other.covariance, alpha=b).addr_(features, features, alpha=a * b),
            cross_covariance=(a * self.cross_covariance)
            .add_(other.cross_covariance, alpha=b)
            .addr_(features, outputs, alpha=a * b),
            centred_energy=a * self.centred_energy + b * other.centred_energy + a * b * float(outputs @ outputs),
            feature_mean=self.feature_mean + b * features,
            output_mean=self.output_mean + b * outputs,
            count=total,
            group_size=self.group_size,
            output_covariance=output_covariance,
            is_centred=self.is_centred,
            rounding=max(self.rounding, other.rounding),
        )

    def centred(self) -> Moments:
        """The same moments for problems with an unpenalised intercept, which is solved by centring, exactly."""
        return replace(self, is_centred=True)

    def intercept(self, coefficients: Tensor) -> Tensor:
        """b (D,) = ψ̄ − Vᵀφ̄ for V = `coefficients` (K·s, D): the best constant beside ΦV; zero where none is free."""
        if not self.is_centred:
            return torch.zeros_like(self.output_mean)
        return self.output_mean - coefficients.to(self.feature_mean).T @ self.feature_mean

    def columns(self, units: Any) -> Tensor:
        """Column numbers (|S|·s,) of the given units, in their order: numbers (|S|,) or a boolean mask (K,)."""
        index = unit_index(units, self.unit_count).to(self.covariance.device)
        return unit_columns(index, self.group_size)

    def subset(self, units: Any) -> Moments:
        """The moments of these units alone, in the given order: numbers (|S|,) or a mask (K,)."""
        index = self.columns(units)
        return replace(
            self,
            covariance=self.covariance.index_select(0, index).index_select(1, index),
            cross_covariance=self.cross_covariance.index_select(0, index),
            feature_mean=self.feature_mean.index_select(0, index),
        )

    def with_outputs(self, weights: Tensor) -> Moments:
        """Moments of the same Φ and of Ψ = ΦV for V = `weights` (K·s, D), exactly, from `covariance` alone."""
        weights = weights.to(self.covariance)
        cross = self.covariance @ weights
        output_covariance = weights.T @ cross  # (D, D)
        output_covariance = (output_covariance + output_covariance.T) / 2
        return replace(
            self,
            cross_covariance=cross,
            centred_energy=max(0.0, float(output_covariance.trace())),
            output_mean=weights.T @ self.feature_mean,
            output_covariance=output_covariance,
        )

    def residual(self, weights: Tensor) -> Moments:
        """Moments of the same Φ and of Ψ − ΦV for V = `weights` (K·s, D)."""
        weights = weights.to(self.covariance)
        product = self.covariance @ weights
        fitted = float((weights * (2 * self.cross_covariance - product)).sum())
        return replace(
            self,
            cross_covariance=self.cross_covariance - product,
            centred_energy=max(0.0, self.centred_energy - fitted),
            output_mean=self.output_mean - weights.T @ self.feature_mean,
            output_covariance=None,
        )

    def rotated(self, rotation: Tensor) -> Moments:
        """Moments for the outputs ΨQ, Q = `rotation` (D, d) with orthonormal columns spanning the rows of Ψ."""
        covariance = self.output_covariance
        mean = rotation.T @ self.output_mean
        lost = float(self.output_mean @ self.output_mean) - float(mean @ mean)
        return replace(
            self,
            cross_covariance=self.cross_covariance @ rotation,
            centred_energy=self.centred_energy
            + (0.0 if self.is_centred else max(0.0, lost)),  # `energy` stays that of all
            output_mean=mean,
            output_covariance=None if covariance is None else rotation.T @ covariance @ rotation,
        )

    def on_processor(self) -> Moments:
        """The same moments on the CPU: for what goes in thousands of small steps, each too short for a device."""
        return self if self.covariance.device.type == "cpu" else self.to("cpu")

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        return replace(
            self,
            covariance=self.covariance.to(device),
            cross_covariance=self.cross_covariance.to(device),
            feature_mean=self.feature_mean.to(device),
            output_mean=self.output_mean.to(device),
            output_covariance=None if self.output_covariance is None else self.output_covariance.to(device),
        )


def contributions(moments: Moments, weights: Tensor) -> Moments:
    """Moments of what each unit gives to the outputs, Φ_k V_k (N, D): K·D columns in place of K·s.

    A refit on these mixes every unit's own D outputs alone, so its errors are never below those of one on Φ; orders of
    units that have many columns are found a great deal faster.

    Args:
        weights: V (K·s, D) of all units.
    """
    k, s, d = moments.unit_count, moments.group_size, weights.shape[1]
    blocks = weights.to(moments.covariance).reshape(k, s, d)

    def reduced(matrix: Tensor) -> Tensor:
        return (blocks.mT @ matrix.reshape(k, s, -1)).reshape(k * d, -1)

    covariance = reduced(reduced(moments.covariance).T.contiguous())
    return replace(
        moments,
        covariance=(covariance + covariance.T) / 2,
        cross_covariance=reduced(moments.cross_covariance),
        feature_mean=reduced(moments.feature_mean[:, None])[:, 0],
        group_size=d,
    )


class MomentAccumulator(CentredSums):
    """Streams batches of Φ and Ψ into `Moments`."""

    def moments(self) -> Moments:
        """The moments of everything added so far.

        Raises:
            MomentsError: nothing was added.
            NonFiniteError: NaN or Inf came in.
        """
        return Moments(**self.parts())


def stack_consumers(
    parts: Sequence[Moments], weights: Sequence[float] | None = None, *, intercept: bool = True
) -> Moments:
    """One problem for consumers that read the same K units through unlike Φ_j (N_j, K·s_j) into Ψ_j (N_j, D_j).

    Minimises Σ_j weights_j·‖Ψ_j − Φ_jV_j − 1b_jᵀ‖²/N_j over all consumers at once: unit k owns s = Σ_j s_j columns,
    between consumers `gram` is zero, and D = Σ_j D_j. With `intercept` each part is centred first (every consumer has
    a bias of its own). Use it to select;
    refit every consumer from its own part. Default weights: 1/centred energy, so that relative errors count alike.
    """
    if not parts:
        raise ValueError("`parts` must name at least one consumer.")
    units = {part.unit_count for part in parts}
    if len(units) != 1:
        raise ValueError(f"consumers must read equally many units, got {sorted(units)}.")
    if weights is None:
        energies = [part.centred_energy if intercept else part.energy for part in parts]
        weights = [1.0 / energy if energy > 0 else 0.0 for energy in energies]
    if len(weights) != len(parts):
        raise ValueError(f"`weights` must have {len(parts)} entries, one a consumer, got {len(weights)}.")
    k = units.pop()
    sizes = [part.group_size for part in parts]
    s, d = sum(sizes), sum(part.output_count for part in parts)
    gram = parts[0].covariance.new_zeros(k * s, k * s)
    cross, feature_mean, output_mean = gram.new_zeros(k * s, d), gram.new_zeros(k * s), gram.new_zeros(d)
    known = all(part.output_covariance is not None for part in parts)
    output_covariance = gram.new_zeros(d, d) if known else None
    energy, first_tap, first_output = 0.0, 0, 0
    for part, weight in zip(parts, weights, strict=True):
        fitted = part.centred() if intercept else part
        taps = torch.arange(part.group_size, device=gram.device) + first_tap
        index = (torch.arange(k, device=gram.device)[:, None] * s + taps).reshape(-1)  # (K·s_j,)
        gram[index[:, None], index] = weight * fitted.gram
        outputs = slice(first_output, first_output + part.output_count)
        cross[index, outputs] = weight * fitted.cross
        if fitted.is_centred:
            feature_mean[index], output_mean[outputs] = (
                weight**0.5 * fitted.feature_mean,
                weight**0.5 * fitted.output_mean,
            )
        if output_covariance is not None and fitted.output_gram is not None:
            output_covariance[outputs, outputs] = weight * fitted.output_gram
        energy += weight * fitted.energy
        first_tap += part.group_size
        first_output += part.output_count
    return Moments(
        covariance=gram,
        cross_covariance=cross,
        centred_energy=energy,
        feature_mean=feature_mean,
        output_mean=output_mean,
        count=max(part.count for part in parts),
        group_size=s,
        output_covariance=output_covariance,
        is_centred=True,
        rounding=max(part.rounding for part in parts),
    )


def unit_index(units: Any, count: int) -> Tensor:
    """Unit numbers (|S|,) from numbers or a boolean mask (count,), as a tensor, array or list.

    Raises:
        ValueError: a mask of another length, numbers that are no integers, or outside of 0 … count − 1.
    """
    index = as_tensor(units, "units")
    if index.ndim != 1:
        raise ValueError(f"`units` must be unit numbers (n,) or a mask ({count},), got shape {tuple(index.shape)}.")
    if index.dtype == torch.bool:
        if index.shape[0] != count:
            raise ValueError(f"a mask of units must have shape ({count},), got ({index.shape[0]},).")
        return index.nonzero()[:, 0]
    if index.numel() == 0:
        return index.to(torch.long)
    if index.is_floating_point() or index.is_complex():
        raise ValueError(f"`units` must be unit numbers or a boolean mask, got {index.dtype}.")
    if int(index.min()) < 0 or int(index.max()) >= count:
        raise ValueError(
            f"`units` must lie between 0 and {count - 1}, got numbers from {int(index.min())} to {int(index.max())}."
        )
    return index.to(torch.long)


def unit_columns(units: Tensor, group_size: int) -> Tensor:
    """Column numbers (|S|·s,) that the given units (|S|,) own, unit-major."""
    if units.dtype == torch.bool:
        raise ValueError("unit numbers are needed here, got a boolean mask; use `mask.nonzero()[:, 0]`.")
    if group_size == 1:
        return units.to(torch.long)
    taps = torch.arange(group_size, device=units.device)
    return (units.to(torch.long)[:, None] * group_size + taps).reshape(-1)

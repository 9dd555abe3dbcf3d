"""Second moments of features and outputs: everything the convex problems know about the data (THEORY §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import NonFiniteError

_BLOCK = 512  # columns of one block row of the accumulated triangle


@dataclass(frozen=True, eq=False)
class Moments:
    """Uncentred second moments of Φ (N, K·s) and Ψ (N, D), in float64; they add over shards of the samples.

    Columns of Φ are unit-major: column k·s + j is tap j of unit k.

    Attributes:
        gram: ΦᵀΦ/N (K·s, K·s).
        cross: ΦᵀΨ/N (K·s, D).
        energy: ‖Ψ‖²_F/N.
        feature_mean: mean row of Φ (K·s,).
        output_mean: mean row of Ψ (D,).
        count: N, or the sum of the sample weights.
        group_size: s, columns per unit.
        output_gram: ΨᵀΨ/N (D, D) when it was recorded; else None.
    """

    gram: Tensor
    cross: Tensor
    energy: float
    feature_mean: Tensor
    output_mean: Tensor
    count: float
    group_size: int = 1
    output_gram: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.gram.shape[0]
        if self.gram.ndim != 2 or self.gram.shape[1] != n:
            raise ValueError(f"`gram` must be square (K·s, K·s), got {tuple(self.gram.shape)}.")
        if self.cross.ndim != 2 or self.cross.shape[0] != n:
            raise ValueError(
                f"`cross` must have shape (K·s, D) = ({n}, D) to match `gram`, got {tuple(self.cross.shape)}."
            )
        d = self.cross.shape[1]
        if tuple(self.feature_mean.shape) != (n,):
            raise ValueError(f"`feature_mean` must have shape ({n},), got {tuple(self.feature_mean.shape)}.")
        if tuple(self.output_mean.shape) != (d,):
            raise ValueError(f"`output_mean` must have shape ({d},), got {tuple(self.output_mean.shape)}.")
        if self.output_gram is not None and tuple(self.output_gram.shape) != (d, d):
            raise ValueError(f"`output_gram` must have shape ({d}, {d}), got {tuple(self.output_gram.shape)}.")
        if self.group_size < 1 or n % self.group_size:
            raise ValueError(f"`group_size` must divide the {n} columns of Φ, got {self.group_size}.")
        for name in ("gram", "cross", "feature_mean", "output_mean", "output_gram"):
            value: Tensor | None = getattr(self, name)
            if value is not None and value.dtype != torch.float64:
                raise ValueError(f"`{name}` must be float64, got {value.dtype}.")
        finite = bool(torch.isfinite(self.gram.sum() + self.cross.sum() + self.feature_mean.sum()))
        if not finite or self.energy != self.energy or self.energy in (float("inf"), float("-inf")):
            raise NonFiniteError("moments hold NaN or Inf: check the activations they were recorded from.")

    @classmethod
    def of(
        cls,
        features: Tensor,
        outputs: Tensor,
        *,
        group_size: int = 1,
        weights: Tensor | None = None,
        output_gram: bool = True,
    ) -> Moments:
        """Moments of Φ (N, K·s) and Ψ (N, D), optionally with sample weights (N,); cost O(N·(K·s)²)."""
        accumulator = MomentAccumulator(group_size, output_gram=output_gram)
        accumulator.add(features, outputs, weights)
        return accumulator.moments()

    @property
    def unit_count(self) -> int:
        """K."""
        return self.gram.shape[0] // self.group_size

    @property
    def output_count(self) -> int:
        """D."""
        return self.cross.shape[1]

    @property
    def centred_energy(self) -> float:
        """‖Ψ − mean(Ψ)‖²_F/N, never negative."""
        return max(0.0, self.energy - float(self.output_mean @ self.output_mean))

    def merge(self, other: Moments) -> Moments:
        """The moments of both shards of samples together: the count-weighted average."""
        if self.gram.shape != other.gram.shape or self.cross.shape != other.cross.shape:
            raise ValueError(
                f"shards must have equal shapes, got cross {tuple(self.cross.shape)} and {tuple(other.cross.shape)}."
            )
        if self.group_size != other.group_size:
            raise ValueError(f"shards must have equal `group_size`, got {self.group_size} and {other.group_size}.")
        total = self.count + other.count
        if total <= 0:
            return self
        a, b = self.count / total, other.count / total
        output_gram = None
        if self.output_gram is not None and other.output_gram is not None:
            output_gram = a * self.output_gram + b * other.output_gram
        return Moments(
            gram=a * self.gram + b * other.gram,
            cross=a * self.cross + b * other.cross,
            energy=a * self.energy + b * other.energy,
            feature_mean=a * self.feature_mean + b * other.feature_mean,
            output_mean=a * self.output_mean + b * other.output_mean,
            count=total,
            group_size=self.group_size,
            output_gram=output_gram,
        )

    def centred(self) -> Moments:
        """Moments of Φ and Ψ with their means taken away: an unpenalised intercept is solved by this, exactly."""
        mean, target = self.feature_mean, self.output_mean
        return replace(
            self,
            gram=torch.addr(self.gram, mean, mean, alpha=-1.0),
            cross=torch.addr(self.cross, mean, target, alpha=-1.0),
            energy=self.centred_energy,
            feature_mean=torch.zeros_like(mean),
            output_mean=torch.zeros_like(target),
            output_gram=None if self.output_gram is None else torch.addr(self.output_gram, target, target, alpha=-1.0),
        )

    def columns(self, units: Tensor) -> Tensor:
        """Column numbers (|S|·s,) of the given units (|S|,), in their order."""
        return unit_columns(units.to(self.gram.device), self.group_size)

    def subset(self, units: Tensor) -> Moments:
        """The moments of these units (|S|,) alone, in the given order; nothing is recomputed."""
        index = self.columns(units)
        return replace(
            self,
            gram=self.gram.index_select(0, index).index_select(1, index),
            cross=self.cross.index_select(0, index),
            feature_mean=self.feature_mean.index_select(0, index),
        )

    def with_outputs(self, weights: Tensor) -> Moments:
        """Moments of the same Φ and of Ψ = ΦV for V = `weights` (K·s, D), exactly, from `gram` alone."""
        weights = weights.to(self.gram)
        cross = self.gram @ weights
        output_gram = weights.T @ cross  # (D, D)
        output_gram = (output_gram + output_gram.T) / 2
        return replace(
            self,
            cross=cross,
            energy=float(output_gram.trace()),
            output_mean=weights.T @ self.feature_mean,
            output_gram=output_gram,
        )

    def rotated(self, rotation: Tensor) -> Moments:
        """Moments for the outputs ΨQ, Q = `rotation` (D, d) with orthonormal columns spanning the rows of Ψ."""
        return replace(
            self,
            cross=self.cross @ rotation,
            output_mean=rotation.T @ self.output_mean,
            output_gram=None if self.output_gram is None else rotation.T @ self.output_gram @ rotation,
        )

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        return replace(
            self,
            gram=self.gram.to(device),
            cross=self.cross.to(device),
            feature_mean=self.feature_mean.to(device),
            output_mean=self.output_mean.to(device),
            output_gram=None if self.output_gram is None else self.output_gram.to(device),
        )

    def all_reduce(self) -> Moments:
        """The moments over all ranks of the default torch.distributed group; unchanged when there is none."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        scalars = self.gram.new_tensor([self.count, self.energy * self.count])
        sums = [self.gram, self.cross, self.feature_mean, self.output_mean]
        if self.output_gram is not None:
            sums.append(self.output_gram)
        sums = [value * self.count for value in sums]
        for value in [scalars, *sums]:
            torch.distributed.all_reduce(value)
        count = float(scalars[0])
        gram, cross, feature_mean, output_mean, *rest = [value / count for value in sums]
        return Moments(
            gram=gram,
            cross=cross,
            energy=float(scalars[1]) / count,
            feature_mean=feature_mean,
            output_mean=output_mean,
            count=count,
            group_size=self.group_size,
            output_gram=rest[0] if rest else None,
        )


class MomentAccumulator:
    """Streams batches of Φ and Ψ into `Moments`, in place: memory O((K·s)² + K·s·D), no (K·s)² temporary per batch.

    Args:
        group_size: s, columns of Φ per unit.
        output_gram: record ΨᵀΨ (D, D) as well, so that D can be replaced by rank(Ψ).
        device: where the sums live; default: where the first batch is.
    """

    def __init__(
        self, group_size: int = 1, output_gram: bool = False, device: torch.device | str | None = None
    ) -> None:
        self.group_size = group_size
        self.records_output_gram = output_gram
        self.device = device
        self.count = 0.0
        self._energy: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def add(self, features: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows of Φ (n, K·s) and Ψ (n, D), with optional sample weights (n,) ≥ 0; any float dtype."""
        if features.ndim != 2 or outputs.ndim != 2 or features.shape[0] != outputs.shape[0]:
            raise ValueError(
                "`features` (n, K·s) and `outputs` (n, D) must be matrices of equally many rows, "
                f"got {tuple(features.shape)} and {tuple(outputs.shape)}."
            )
        device = self.device if self.device is not None else features.device
        phi = features.detach().to(device=device, dtype=torch.float64)
        psi = outputs.detach().to(device=device, dtype=torch.float64)
        if not self._sums:
            self._allocate(phi, psi)
        sums = self._sums
        if phi.shape[1] != sums["gram"].shape[0] or psi.shape[1] != sums["cross"].shape[1]:
            raise ValueError(
                f"expected {sums['gram'].shape[0]} feature and {sums['cross'].shape[1]} output columns as before, "
                f"got {phi.shape[1]} and {psi.shape[1]}."
            )
        if weights is None:
            self.count += phi.shape[0]
        else:
            if tuple(weights.shape) != (phi.shape[0],):
                raise ValueError(f"`weights` must have shape ({phi.shape[0]},), got {tuple(weights.shape)}.")
            if bool((weights < 0).any()):
                raise ValueError("`weights` must not be negative.")
            root = weights.detach().to(phi).sqrt()
            self.count += float(root.square().sum())
            sums["feature_mean"].addmv_(phi.T, root.square())
            sums["output_mean"].addmv_(psi.T, root.square())
            phi, psi = phi * root[:, None], psi * root[:, None]
        if weights is None:
            sums["feature_mean"].add_(phi.sum(0))
            sums["output_mean"].add_(psi.sum(0))
        _add_upper(sums["gram"], phi)
        sums["cross"].addmm_(phi.T, psi)
        if self.records_output_gram:
            _add_upper(sums["output_gram"], psi)
        sums["energy"].add_(psi.square().sum())

    def moments(self) -> Moments:
        """The moments of everything added so far.

        Raises:
            ValueError: nothing was added.
            NonFiniteError: NaN or Inf came in.
        """
        if not self._sums or self.count <= 0:
            raise ValueError("no samples were added, so there are no moments.")
        sums, n = self._sums, self.count
        return Moments(
            gram=_symmetric(sums["gram"]).div_(n),
            cross=sums["cross"] / n,
            energy=float(sums["energy"]) / n,
            feature_mean=sums["feature_mean"] / n,
            output_mean=sums["output_mean"] / n,
            count=n,
            group_size=self.group_size,
            output_gram=_symmetric(sums["output_gram"]).div_(n) if self.records_output_gram else None,
        )

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Take in what the other ranks of the default torch.distributed group added; without a group, nothing.

        A rank that added nothing takes part all the same. `device`: where such a rank holds its sums.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        if self._sums:
            device = self._sums["gram"].device
        own = [self._sums["gram"].shape[0], self._sums["cross"].shape[1]] if self._sums else [0, 0]
        shape = torch.tensor(own, device=device)
        torch.distributed.all_reduce(shape, torch.distributed.ReduceOp.MAX)
        features, outputs = (int(size) for size in shape)
        if not self._sums and features:
            empty = torch.zeros(0, max(features, outputs), dtype=torch.float64, device=device)
            self._allocate(empty[:, :features], empty[:, :outputs])
        count = torch.tensor([self.count], dtype=torch.float64, device=device)
        for value in (count, *self._sums.values()):
            if value.numel():
                torch.distributed.all_reduce(value)
        self.count = float(count)

    def _allocate(self, phi: Tensor, psi: Tensor) -> None:
        k, d = phi.shape[1], psi.shape[1]
        if k % self.group_size:
            raise ValueError(f"`features` must have a multiple of group_size {self.group_size} columns, got {k}.")
        shapes = {"gram": (k, k), "cross": (k, d), "feature_mean": (k,), "output_mean": (d,), "energy": ()}
        if self.records_output_gram:
            shapes["output_gram"] = (d, d)
        self._sums = {name: phi.new_zeros(shape) for name, shape in shapes.items()}


def stack_consumers(
    parts: Sequence[Moments], weights: Sequence[float] | None = None, *, intercept: bool = True
) -> Moments:
    """One problem for consumers that read the same K units through unlike Φ_j (N_j, K·s_j) into Ψ_j (N_j, D_j).

    Minimises Σ_j weights_j·‖Ψ_j − Φ_jV_j − 1b_jᵀ‖²/N_j over all consumers at once: unit k owns s = Σ_j s_j columns,
    between consumers `gram` is zero, and D = Σ_j D_j. With `intercept` each part is centred first (every consumer has
    a bias of its own), so the means of the result are zero and centring it again changes nothing. Use it to select;
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
    gram = parts[0].gram.new_zeros(k * s, k * s)
    cross = gram.new_zeros(k * s, d)
    energy, first_tap, first_output = 0.0, 0, 0
    for part, weight in zip(parts, weights, strict=True):
        own = part.centred() if intercept else part
        taps = torch.arange(part.group_size, device=gram.device) + first_tap
        index = (torch.arange(k, device=gram.device)[:, None] * s + taps).reshape(-1)  # (K·s_j,)
        gram[index[:, None], index] = weight * own.gram
        cross[index, first_output : first_output + part.output_count] = weight * own.cross
        energy += weight * own.energy
        first_tap += part.group_size
        first_output += part.output_count
    return Moments(
        gram=gram,
        cross=cross,
        energy=energy,
        feature_mean=gram.new_zeros(k * s),
        output_mean=gram.new_zeros(d),
        count=max(part.count for part in parts),
        group_size=s,
    )


def unit_columns(units: Tensor, group_size: int) -> Tensor:
    """Column numbers (|S|·s,) that the given units (|S|,) own, unit-major."""
    taps = torch.arange(group_size, device=units.device)
    return (units.to(torch.long)[:, None] * group_size + taps).reshape(-1)


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """total += rowsᵀ rows on and above the block diagonal only; the rest is mirrored at the end."""
    for first in range(0, total.shape[0], _BLOCK):
        last = first + _BLOCK
        total[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])


def _symmetric(upper: Tensor) -> Tensor:
    full = upper.triu()
    return full.add_(full.triu(1).T)

"""Sums of squares about a running mean, streamed over batches of rows (Chan, Golub and LeVeque 1983)."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from compress.errors import MomentsError

_BLOCK = 256  # columns of one block row of the accumulated triangle
_CONSTANT = 16.0  # roundings of a column's own size, below which its spread is rounding


class CentredSums:
    """Sums of products of Φ and Ψ, in place: memory O((K·s)² + K·s·D), no (K·s)² temporary per batch.

    A batch is taken about its own mean row; the distance of that mean from the one so far enters as one row more. So
    the sums are sums of squares of centred rows: no spread is lost under a large mean, and no order, split or weighting
    of the same samples changes more than the last digits.

    Args:
        group_size: s, columns of Φ per unit.
        output_gram: record ΨᵀΨ (D, D) as well, so that D can be replaced by rank(Ψ).
        device: where the sums live; default: where the first batch is.
        single: take the products of a batch in float32 where its Φ is no more exact; sums over batches are in float64.
            Twice as fast; what that rounds off is told in `Moments.rounding`.
    """

    def __init__(
        self,
        group_size: int = 1,
        output_gram: bool = False,
        device: torch.device | str | None = None,
        *,
        single: bool = False,
    ) -> None:
        if group_size < 1:
            raise ValueError(f"`group_size` must be at least 1, got {group_size}.")
        self.group_size = group_size
        self.records_output_gram = output_gram
        self.device = device
        self.single = single
        self.count = 0.0
        self._product_rounding = torch.finfo(torch.float64).eps
        self._sums: dict[str, Tensor] = {}
        self._features, self._outputs = _RunningMean(), _RunningMean()
        self._rounding = [torch.finfo(torch.float64).eps] * 2  # relative, of Φ and Ψ as they came

    def add(self, features: Any, outputs: Any, weights: Any = None) -> None:
        """Add the rows of Φ (n, K·s) and Ψ (n, D), with optional sample weights (n,) ≥ 0; any real dtype."""
        phi, psi = as_rows(features, "features"), as_rows(outputs, "outputs")
        if phi.shape[0] != psi.shape[0]:
            raise ValueError(
                "`features` (n, K·s) and `outputs` (n, D) must be matrices of equally many rows, "
                f"got {tuple(phi.shape)} and {tuple(psi.shape)}."
            )
        device = self.device if self.device is not None else phi.device
        phi, psi = phi.to(device), psi.to(device)
        if not self._sums:
            self._allocate(phi.shape[1], psi.shape[1], phi.device)
        sums = self._sums
        if phi.shape[1] != sums["covariance"].shape[0] or psi.shape[1] != sums["cross"].shape[1]:
            raise ValueError(
                f"expected {sums['covariance'].shape[0]} feature and {sums['cross'].shape[1]} output columns as "
                f"before, got {phi.shape[1]} and {psi.shape[1]}."
            )
        root: Tensor | None = None
        count = float(phi.shape[0])
        if weights is not None:
            given = as_tensor(weights, "weights").detach().to(device, torch.float64)
            if tuple(given.shape) != (phi.shape[0],):
                raise ValueError(f"`weights` must have shape ({phi.shape[0]},), got {tuple(given.shape)}.")
            if bool((given < 0).any()):
                raise ValueError("`weights` must not be negative.")
            root, count = given.sqrt(), float(given.sum())
        if count == 0:
            return
        for place, value in enumerate((phi, psi)):
            self._rounding[place] = max(self._rounding[place], rounding_of(value.dtype))
        before, self.count = self.count, self.count + count
        dtype = torch.float64
        if self.single and phi.dtype.is_floating_point and phi.dtype.itemsize <= 4:
            dtype = torch.float32
            self._product_rounding = torch.finfo(dtype).eps
        phi = self._features.centre(phi, root, before, count, dtype)  # (n or n + 1, K·s)
        psi = self._outputs.centre(psi, root, before, count, dtype)
        _add_upper(sums["covariance"], phi)
        _add_product(sums["cross"], phi, psi)
        if self.records_output_gram:
            _add_upper(sums["output_covariance"], psi)
        sums["output_squares"].add_(psi.square().sum(0, dtype=torch.float64))

    def parts(self) -> dict[str, Any]:
        """The fields of `Moments` of everything added so far.

        Raises:
            MomentsError: nothing was added.
        """
        if not self._sums or self.count <= 0:
            raise MomentsError("no sample came, so there are no moments.")
        sums, n = self._sums, self.count
        return settled_parts(
            covariance=_symmetric(sums["covariance"]).div_(n),
            cross_covariance=sums["cross"] / n,
            output_squares=sums["output_squares"] / n,
            feature_mean=self._features.mean,
            output_mean=self._outputs.mean,
            count=n,
            group_size=self.group_size,
            output_covariance=_symmetric(sums["output_covariance"]).div_(n) if self.records_output_gram else None,
            rounding=(self._rounding[0], self._rounding[1]),
        ) | {"rounding": self._product_rounding}

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Take in what the other ranks of the default torch.distributed group added; without a group, nothing.

        A rank that added nothing takes part all the same. `device`: where such a rank holds its sums.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        if self._sums:
            device = self._sums["covariance"].device
        extents = [self._sums["covariance"].shape[0], self._sums["cross"].shape[1]] if self._sums else [0, 0]
        facts = torch.tensor([*extents, *self._rounding, self._product_rounding], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MAX)
        features, outputs = int(facts[0]), int(facts[1])
        self._rounding, self._product_rounding = [float(facts[2]), float(facts[3])], float(facts[4])
        if not features:
            return
        if not self._sums:
            self._allocate(features, outputs, torch.device(device))
        count = torch.tensor([self.count], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(count)
        total = float(count)
        if total <= 0:
            return
        moved = [running.all_reduce(self.count, total) for running in (self._features, self._outputs)]
        phi, psi = (shift * self.count**0.5 for shift in moved)  # this rank's mean about that of all, as one row more
        shifts = {"covariance": (phi, phi), "cross": (phi, psi), "output_covariance": (psi, psi)}
        for name, value in self._sums.items():  # new tensors: the sums may have been made in inference mode
            moved_value = torch.addr(value, *shifts[name]) if name in shifts else value + psi.square()
            self._sums[name] = _sum_over_ranks(moved_value)
        self.count = total

    def _allocate(self, k: int, d: int, device: torch.device) -> None:
        if k % self.group_size:
            raise ValueError(f"`features` must have a multiple of group_size {self.group_size} columns, got {k}.")
        shapes = {"covariance": (k, k), "cross": (k, d), "output_squares": (d,)}
        if self.records_output_gram:
            shapes["output_covariance"] = (d, d)
        self._sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self._features.start(k, device)
        self._outputs.start(d, device)


class _RunningMean:
    """A mean row, held as the first batch's mean and the drift from it: small changes of a large mean stay exact."""

    def start(self, columns: int, device: torch.device) -> None:
        self.origin = torch.zeros(columns, dtype=torch.float64, device=device)
        self.drift = torch.zeros_like(self.origin)

    @property
    def mean(self) -> Tensor:
        return self.origin + self.drift

    def centre(self, rows: Tensor, root: Tensor | None, before: float, count: float, dtype: torch.dtype) -> Tensor:
        """Rows (n, m) about their own mean, times `root` (n,), and, if there were rows before, one row more."""
        n, m = rows.shape
        mean = rows.sum(0, dtype=torch.float64) if root is None else rows.to(torch.float64).T @ root.square()
        mean /= count
        centred = torch.empty(n + (before > 0), m, dtype=dtype, device=rows.device)
        torch.sub(rows, mean.to(dtype), out=centred[:n])
        if root is not None:
            centred[:n].mul_(root[:, None])
        if before > 0:
            total = before + count
            shift = (mean - self.origin) - self.drift
            centred[n].copy_(shift * (before * count / total) ** 0.5)
            self.drift.add_(shift, alpha=count / total)
        else:
            self.origin.copy_(mean)
        return centred

    def all_reduce(self, count: float, total: float) -> Tensor:
        """Become the mean over all ranks; how far this rank's own mean was from it (m,)."""
        common = _sum_over_ranks(self.mean * (count / total))
        offset = (self.origin - common) + self.drift
        drift = _sum_over_ranks(offset * (count / total))
        self.origin, self.drift = common, drift
        return offset - drift


def _sum_over_ranks(value: Tensor) -> Tensor:
    """`value`, summed in place over the ranks of the default group."""
    if value.numel():
        torch.distributed.all_reduce(value)
    return value


def settled_parts(
    *,
    covariance: Tensor,
    cross_covariance: Tensor,
    output_squares: Tensor,
    feature_mean: Tensor,
    output_mean: Tensor,
    count: float,
    group_size: int,
    output_covariance: Tensor | None,
    rounding: tuple[float, float],
) -> dict[str, Any]:
    """The fields of `Moments` in which a column whose spread is rounding of its own size is exactly constant.

    Args:
        covariance: (K·s, K·s), changed in place; so are the other matrices.
        output_squares: mean squares of the centred outputs (D,).
        rounding: relative rounding of Φ and of Ψ.
    """
    spread = covariance.diagonal()
    constant = spread <= (_CONSTANT * rounding[0]) ** 2 * (spread + feature_mean.square())
    constant &= spread.isfinite()  # what overflowed is not constant
    still = output_squares <= (_CONSTANT * rounding[1]) ** 2 * (output_squares + output_mean.square())
    still &= output_squares.isfinite()
    if bool(constant.any()):
        covariance[constant] = 0.0
        covariance[:, constant] = 0.0
        cross_covariance[constant] = 0.0
    if bool(still.any()):
        cross_covariance[:, still] = 0.0
        output_squares = output_squares.masked_fill(still, 0.0)
        if output_covariance is not None:
            output_covariance[still] = 0.0
            output_covariance[:, still] = 0.0
    return {
        "covariance": covariance,
        "cross_covariance": cross_covariance,
        "centred_energy": float(output_squares.sum()),
        "feature_mean": feature_mean,
        "output_mean": output_mean,
        "count": count,
        "group_size": group_size,
        "output_covariance": output_covariance,
    }


def as_rows(value: Any, name: str) -> Tensor:
    """A matrix of real numbers (n, m), detached, from a tensor, a numpy array or nested lists."""
    rows = as_tensor(value, name).detach()
    if rows.ndim != 2:
        raise ValueError(f"`{name}` must be a matrix of rows (n, columns), got shape {tuple(rows.shape)}.")
    if rows.is_complex():
        raise ValueError(f"`{name}` must be real, got {rows.dtype}.")
    return rows.to(torch.uint8) if rows.dtype == torch.bool else rows


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor as it is; a numpy array or nested lists of numbers as a tensor of their dtype."""
    if isinstance(value, Tensor):
        return value
    array = numpy.asarray(value)
    try:
        # a copy where torch cannot share the memory: read-only arrays, negative strides
        return torch.from_numpy(array if array.flags.writeable and min((*array.strides, 0)) >= 0 else array.copy())
    except TypeError as error:
        raise ValueError(f"`{name}` must be numbers, got an array of dtype {array.dtype}.") from error


def rounding_of(dtype: torch.dtype) -> float:
    """Relative rounding that values of this dtype carry; that of float32 for anything coarser."""
    if not dtype.is_floating_point:
        return torch.finfo(torch.float64).eps
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """total += rowsᵀ rows on and above the block diagonal only; the rest is mirrored at the end."""
    for first in range(0, total.shape[0], _BLOCK):
        last = first + _BLOCK
        _add_product(total[first:last, first:], rows[:, first:last], rows[:, first:])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right, where a product in less than total's precision is made first."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


def _symmetric(upper: Tensor) -> Tensor:
    full = upper.clone()
    for first in range(0, full.shape[0], _BLOCK):
        last = first + _BLOCK
        corner = full[first:last, first:last]
        corner.copy_(corner.triu() + corner.triu(1).T)
        full[last:, first:last] = full[first:last, last:].T
    return full

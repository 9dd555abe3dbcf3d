"""Moments of features too many for a square matrix: a thin factor, exact while rows are few, else a seeded sketch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.convex.statistics.moments import Moments, unit_columns, unit_index
from compress.convex.statistics.sums import as_rows, rounding_of, settled_parts
from compress.errors import MomentsError


@dataclass(frozen=True, eq=False)
class FactoredMoments:
    """Φ and Ψ as R rows with FᵀF = ΦᵀΦ/N and FᵀT = ΦᵀΨ/N: exact for R = N, in expectation for a sketch.

    Use it where K·s is so large that (K·s)² does not fit, or where N < K·s. A mean row is kept apart, exactly, so an
    intercept is still a centring.

    Attributes:
        factor: F (R, K·s), centred.
        targets: T (R, D), centred.
        feature_mean: mean row of Φ (K·s,).
        output_mean: mean row of Ψ (D,).
        output_squares: mean squares (D,) of the centred outputs, exact.
        rounding: relative rounding of Φ and of Ψ as they came.
        count: N.
        group_size: s.
        exact: whether no row was sketched away.
        memory_units: units whose square moment matrix fits the memory that was allowed.
    """

    factor: Tensor
    targets: Tensor
    feature_mean: Tensor
    output_mean: Tensor
    output_squares: Tensor
    rounding: tuple[float, float]
    count: float
    group_size: int
    exact: bool
    memory_units: int

    @classmethod
    def of(
        cls, features: Any, outputs: Any, *, group_size: int = 1, rows: int | None = None, seed: int = 0
    ) -> FactoredMoments:
        """Factored moments of Φ (N, K·s) and Ψ (N, D) with at most `rows` rows (default: all, exact)."""
        accumulator = FactorAccumulator(group_size, rows=len(features) if rows is None else rows, seed=seed)
        accumulator.add(features, outputs)
        return accumulator.moments()

    @property
    def unit_count(self) -> int:
        """K."""
        return self.factor.shape[1] // self.group_size

    @property
    def output_count(self) -> int:
        """D."""
        return self.targets.shape[1]

    @property
    def message(self) -> str:
        """What was kept, in words."""
        rows, columns = self.factor.shape
        kind = "all rows, exact" if self.exact else f"a seeded count sketch of {self.count:.0f} rows"
        return f"{columns} feature columns held as {rows} rows ({kind}) instead of a square moment matrix"

    def subset(self, units: Any) -> Moments:
        """Ordinary moments of these units (|S|,), or a mask (K,): what solvers, refit and selection work on."""
        index = unit_columns(unit_index(units, self.unit_count).to(self.factor.device), self.group_size)
        part = self.factor.index_select(1, index)
        return Moments(
            **settled_parts(
                covariance=part.T @ part,
                cross_covariance=part.T @ self.targets,
                output_squares=self.output_squares,
                feature_mean=self.feature_mean[index],
                output_mean=self.output_mean,
                count=self.count,
                group_size=self.group_size,
                output_covariance=None,
                rounding=self.rounding,
            )
        )

    def shortlist(self) -> Tensor:
        """Units (m,) worth a square moment matrix: all that fit `memory_units`, by block forward selection on F.

        Each step takes the units whose columns best explain what is left of T, a tenth of the shortlist at a time.
        """
        count, s = self.unit_count, self.group_size
        if count <= self.memory_units:
            return torch.arange(count)
        left = self.targets.clone()
        chosen = torch.zeros(count, dtype=torch.bool)
        batch = max(1, self.memory_units // 10)
        energies = self.factor.square().sum(0).clamp_min(1e-300)
        while int(chosen.sum()) < self.memory_units:
            gains = (self.factor.T @ left).square().sum(1) / energies
            gains = gains.reshape(count, s).sum(1).cpu()
            gains[chosen] = -1.0
            take = min(batch, self.memory_units - int(chosen.sum()))
            chosen[gains.topk(take).indices] = True
            index = unit_columns(chosen.nonzero()[:, 0], s).to(self.factor.device)
            part = self.factor.index_select(1, index)
            if part.shape[1] <= part.shape[0]:
                gram = part.T @ part
                gram.diagonal().add_(1e-6 * gram.diagonal().mean())
                left = self.targets - part @ torch.linalg.solve(gram, part.T @ self.targets)
            else:
                gram = part @ part.T
                shift = 1e-6 * gram.diagonal().mean()
                gram.diagonal().add_(shift)
                left = shift * torch.linalg.solve(gram, self.targets)
        return chosen.nonzero()[:, 0]


class FactorAccumulator:
    """Streams batches into `FactoredMoments` with at most `rows` rows: exact until they are full, then a count sketch.

    Every row past the capacity is added, with a random sign, to a random stored row (Clarkson & Woodruff 2013), so
    FᵀF is unbiased with variance falling as 1/rows. Memory O(rows·(K·s + D)), whatever N is.

    Args:
        group_size: s.
        rows: R.
        seed: of the sketch; the same seed and the same batches give the same bytes.
        memory_units: units for which a square matrix may be formed; default: as many as R rows hold, at least 64.
    """

    def __init__(
        self, group_size: int = 1, *, rows: int = 4096, seed: int = 0, memory_units: int | None = None
    ) -> None:
        if rows < 1:
            raise ValueError(f"`rows` must be positive, got {rows}.")
        self.group_size, self.rows, self.memory_units = group_size, rows, memory_units
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._stored: tuple[Tensor, Tensor] | None = None
        self._signs = torch.zeros(0)
        self._origins: list[Tensor] = []  # the first batch's means: everything is held about them
        self._sums: list[Tensor] = []
        self._output_squares = torch.zeros(0)
        self._rounding = [torch.finfo(torch.float64).eps] * 2

    def add(self, features: Any, outputs: Any) -> None:
        """Add the rows of Φ (n, K·s) and Ψ (n, D)."""
        phi, psi = as_rows(features, "features"), as_rows(outputs, "outputs")
        if phi.shape[0] != psi.shape[0]:
            raise ValueError(
                "`features` (n, K·s) and `outputs` (n, D) must be matrices of equally many rows, "
                f"got {tuple(phi.shape)} and {tuple(psi.shape)}."
            )
        n = phi.shape[0]
        if n == 0:
            return
        for place, value in enumerate((phi, psi)):
            self._rounding[place] = max(self._rounding[place], rounding_of(value.dtype))
        phi, psi = phi.to("cpu", torch.float64), psi.to("cpu", torch.float64)
        if self._stored is None:
            if phi.shape[1] % self.group_size:
                raise ValueError(f"`features` must have a multiple of {self.group_size} columns, got {phi.shape[1]}.")
            self._stored = (phi.new_zeros(self.rows, phi.shape[1]), psi.new_zeros(self.rows, psi.shape[1]))
            self._origins = [phi.mean(0), psi.mean(0)]
            self._sums = [torch.zeros_like(origin) for origin in self._origins]
            self._output_squares = torch.zeros_like(self._origins[1])
            self._signs = phi.new_zeros(self.rows)
        phi, psi = phi - self._origins[0], psi - self._origins[1]
        direct = min(n, max(0, self.rows - self.count))
        places = torch.arange(self.count, self.count + direct)
        signs = torch.ones(n, dtype=torch.float64)
        if direct < n:
            places = torch.cat([places, torch.randint(self.rows, (n - direct,), generator=self._generator)])
            signs[direct:] = torch.randint(2, (n - direct,), generator=self._generator).double() * 2 - 1
        self._stored[0].index_add_(0, places, phi * signs[:, None])
        self._stored[1].index_add_(0, places, psi * signs[:, None])
        self._signs.index_add_(0, places, signs)
        self._sums[0].add_(phi.sum(0))
        self._sums[1].add_(psi.sum(0))
        self._output_squares.add_(psi.square().sum(0))
        self.count += n

    def moments(self) -> FactoredMoments:
        """The factored moments of everything added so far. Raises MomentsError when that is nothing."""
        if self._stored is None or not self.count:
            raise MomentsError("no sample came, so there are no moments.")
        n = self.count
        used = min(self.rows, n)
        drift, target = self._sums[0] / n, self._sums[1] / n
        signs = self._signs[:used]  # S·1: sketching the centred rows = sketch − (S·1)·mean
        factor = torch.addr(self._stored[0][:used], signs, drift, alpha=-1).div_(n**0.5)
        targets = torch.addr(self._stored[1][:used], signs, target, alpha=-1).div_(n**0.5)
        units = factor.shape[1] // self.group_size
        fits = max(64, used // self.group_size) if self.memory_units is None else self.memory_units
        return FactoredMoments(
            factor=factor,
            targets=targets,
            feature_mean=self._origins[0] + drift,
            output_mean=self._origins[1] + target,
            output_squares=(self._output_squares / n - target.square()).clamp_min(0),
            rounding=(self._rounding[0], self._rounding[1]),
            count=float(n),
            group_size=self.group_size,
            exact=n <= self.rows,
            memory_units=min(units, fits),
        )

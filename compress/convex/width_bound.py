"""The width theorem: numerical ranks, the bound rank(Φ)·rank(Ψ), and its constructive reduction (docs/theory.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress.convex.lasso import MultitaskLasso, unit_norms
from compress.convex.statistics.eigen import eigen_decomposition, eigen_values
from compress.convex.statistics.moments import Moments, unit_columns

RANK_TOLERANCE = 1e-3
"""Singular values below this fraction of the largest one do not count towards a numerical rank."""
TOLERANCES = (1e-3, 1e-2, 3e-2, 0.1, 0.3)
"""Where else a report counts ranks: an error that is allowed makes smaller singular values not matter."""


@dataclass(frozen=True, eq=False)
class WidthBound:
    """How few units could do, at a stated numerical tolerance.

    Attributes:
        rank_features: singular values of Φ above `tolerance` times the largest one.
        rank_outputs: the same of Ψ, or of its part ΦV that Φ explains when ΨᵀΨ was not recorded.
        units: K.
        group_size: s.
        tolerance: relative to the largest singular value, i.e. the square root of the relative eigenvalue.
        feature_spectrum, output_spectrum: singular values of Φ and Ψ over their largest, falling.
    """

    rank_features: int
    rank_outputs: int
    units: int
    group_size: int
    tolerance: float
    feature_spectrum: Tensor = field(default_factory=lambda: torch.zeros(0))
    output_spectrum: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def bound(self) -> int:
        """rank(Φ)·rank(Ψ), and never less than one."""
        return max(1, self.rank_features * self.rank_outputs)

    @property
    def rank_bound(self) -> int:
        """rank(Φ): so many units (some of whose columns span Φ) reproduce any Ψ = ΦV, at a larger Σc_k‖v_k‖."""
        return max(1, self.rank_features)

    @property
    def vacuous(self) -> bool:
        """Whether the theorem promises nothing: the bound is at least K."""
        return self.bound >= self.units

    def at(self, tolerance: float) -> WidthBound:
        """The same at another tolerance, counted in the spectra. Raises ValueError without spectra, or below ours."""
        if not self.tolerance <= tolerance < 1 or not self.feature_spectrum.numel():
            raise ValueError(
                f"`tolerance` must lie in [{self.tolerance:g}, 1), of a bound with spectra; got {tolerance}."
            )
        features, outputs = (
            int((spectrum > tolerance).sum()) for spectrum in (self.feature_spectrum, self.output_spectrum)
        )
        return replace(self, rank_features=features, rank_outputs=outputs, tolerance=tolerance)

    def grid(self) -> tuple[WidthBound, ...]:
        """The bound at each of `TOLERANCES` that is not below ours, the first of them ours; empty without spectra."""
        if not self.feature_spectrum.numel():
            return ()
        return (self.at(self.tolerance), *(self.at(value) for value in TOLERANCES if value > self.tolerance))

    @property
    def message(self) -> str:
        """The bound in words, with the smallest tolerance of `grid` at which it says something."""
        ranks = (
            f"rank(Φ) = {self.rank_features} and rank(Ψ) = {self.rank_outputs} "
            f"(singular values above {self.tolerance:g} of the largest)"
        )
        if self.vacuous:
            text = f"{ranks}: the bound {self.bound} is not below the {self.units} units, so it says nothing"
        else:
            text = f"{ranks}: some optimal solution needs at most {self.bound} of {self.units} units"
        if self.rank_bound < min(self.bound, self.units):
            text += f"; {self.rank_bound} units already span Φ, at a larger norm (pivoted QR)"
        telling = next((other for other in self.grid()[1:] if not other.vacuous), None)
        if self.vacuous and telling is not None:
            text += f"; above {telling.tolerance:g}: {telling.rank_features}·{telling.rank_outputs} = {telling.bound}"
        return text


def checked_eigenvalues(gram: Tensor, tolerance: float) -> Tensor:
    """Eigenvalues (n,) of `gram` = AᵀA, rising.

    Raises:
        ValueError: `tolerance` is below what float64 can tell from a gram matrix, about √(n·2e-16).
    """
    smallest = math.sqrt(max(1, gram.shape[0]) * torch.finfo(torch.float64).eps)
    if not smallest <= tolerance < 1:
        raise ValueError(
            f"`tolerance` must lie in [{smallest:.1e}, 1) for the second moments of {gram.shape[0]} columns, "
            f"got {tolerance}."
        )
    values: Tensor = eigen_values(gram)
    return values


def rank_of(eigenvalues: Tensor, tolerance: float) -> int:
    """Singular values above `tolerance` times the largest, from the rising `eigenvalues` (n,) of AᵀA."""
    top = float(eigenvalues[-1]) if eigenvalues.numel() else 0.0
    return int((eigenvalues > tolerance**2 * top).sum()) if top > 0 else 0


def relative_spectrum(eigenvalues: Tensor) -> Tensor:
    """Singular values (n,) of A over the largest one, falling, from the rising `eigenvalues` (n,) of AᵀA."""
    values = eigenvalues.flip(0).clamp_min(0).sqrt()
    return values / values[0] if values.numel() and float(values[0]) > 0 else values


def width_bound(moments: Moments, tolerance: float = RANK_TOLERANCE) -> WidthBound:
    """The width theorem's bound for these moments as they are; pass `centred()` ones for an intercept's form."""
    output_gram = moments.output_gram
    if output_gram is None:
        cross = moments.cross  # HᵀG⁺H = (ΦV)ᵀ(ΦV)/N at the least-squares V
        values, vectors = eigen_decomposition(moments.gram)
        kept = values > 1e-12 * float(values[-1]) if values.numel() else values > 0
        half = (vectors[:, kept].T @ cross) / values[kept].sqrt()[:, None]
        output_gram = half.T @ half if half.shape[1] <= half.shape[0] else half @ half.T
    else:
        values = checked_eigenvalues(moments.gram, tolerance)
    outputs = checked_eigenvalues(output_gram, tolerance)
    return WidthBound(
        rank_features=rank_of(values, tolerance),
        rank_outputs=rank_of(outputs, tolerance),
        units=moments.unit_count,
        group_size=moments.group_size,
        tolerance=tolerance,
        feature_spectrum=relative_spectrum(values),
        output_spectrum=relative_spectrum(outputs),
    )


def reduce_width(
    moments: Moments,
    coefficients: Tensor,
    unit_costs: Any = None,
    *,
    tolerance: float = 1e-10,
) -> Tensor:
    """V' (K·s, D) with ΦV' = ΦV, Σc_k‖v'_k‖ ≤ Σc_k‖v_k‖ and at most rank(Φ)·rank(V) active units (Carathéodory).

    The matrices φ_kv_k of the active units live in a space of dimension rank(Φ)·rank(ΦV); with more of them than that
    there is a ≠ 0 with Σa_kφ_kv_k = 0, and V_k ← (1 + t·a_k)V_k with the sign that does not raise Σc_k‖v_k‖ removes
    a unit at the first coefficient that hits zero. One null space serves many removals: each eliminates one unit from
    the rest of its basis. V is first projected on the row space of ΦV, which changes no output.

    Args:
        tolerance: relative singular value below which the dependencies are taken as exact.
    """
    values, vectors = eigen_decomposition(moments.gram)
    kept = values > max(tolerance**2, 1e-13) * float(values[-1]) if values.numel() else values > 0
    features = values[kept].sqrt()[:, None] * vectors[:, kept].T  # (r, K·s), Φ in an orthonormal basis of its range
    costs = MultitaskLasso(moments, 0.0, unit_costs).costs
    return remove_dependent_units(features, coefficients.to(features), costs, moments.group_size, tolerance=tolerance)


_AFFORDABLE = 2e9  # multiplications of a singular value decomposition that looks for dependent units below the bound


def remove_dependent_units(
    features: Tensor, coefficients: Tensor, costs: Tensor, group_size: int, *, tolerance: float
) -> Tensor:
    """The step behind `reduce_width`, for any features (r, K·s) of full row rank that stand for Φ.

    Below the bound it goes on, where that is cheap, until the φ_kv_k of the active units are independent.
    """
    s, result = group_size, coefficients.clone()
    outputs = features @ result  # (r, D)
    _, singular, rows = torch.linalg.svd(outputs, full_matrices=False)
    rank = int((singular > tolerance * float(singular[0])).sum()) if singular.numel() else 0
    rotation = rows[:rank].T  # (D, rank)
    turned = result @ rotation  # projected V, in rank(ΦV) coordinates
    if float((costs * unit_norms(turned, s)).sum()) > float((costs * unit_norms(result, s)).sum()) * (1 + 1e-12):
        rotation = torch.eye(result.shape[1]).to(result)
        turned = result
    limit = features.shape[0] * rank
    active = (unit_norms(turned, s) > 0).nonzero()[:, 0]
    while active.shape[0] > 1:
        # columns: vec(φ_k v_k) of the active units, only as many as make a null space certain
        part = active[: 2 * limit + 64] if active.shape[0] > 2 * limit + 64 else active
        affordable = part.shape[0] ** 2 * features.shape[0] * turned.shape[1] <= _AFFORDABLE
        if active.shape[0] <= limit and not affordable:
            break
        scale = _remove_dependent(features, turned, part, s, costs, tolerance)
        if scale is None:
            break
        turned[unit_columns(part, s)] *= scale.repeat_interleave(s)[:, None]
        active = (unit_norms(turned, s) > 0).nonzero()[:, 0]
    return torch.mm(turned, rotation.T)


def _remove_dependent(
    features: Tensor, turned: Tensor, units: Tensor, s: int, costs: Tensor, tolerance: float
) -> Tensor | None:
    """Factors (|units|,) ≥ 0, some of them zero, that leave Σφ_kv_k alone; None when the units are independent."""
    index = unit_columns(units, s)
    blocks_f = features[:, index].reshape(features.shape[0], -1, s)  # (r, a, s)
    blocks_v = turned[index].reshape(-1, s, turned.shape[1])  # (a, s, q)
    columns = torch.einsum("ras,asq->arq", blocks_f, blocks_v).reshape(units.shape[0], -1)  # (a, r·q)
    norms = torch.linalg.vector_norm(columns, dim=1)
    empty = norms <= 0
    weights = costs[units] * unit_norms(turned[index], s)
    if bool(empty.any()):
        return torch.where(empty, 0.0, 1.0).to(columns)
    scaled = (columns / norms[:, None]).T  # (r·q, a)
    _, singular, right = torch.linalg.svd(scaled, full_matrices=True)
    rank = int((singular > max(tolerance, 1e-12) * float(singular[0])).sum())
    basis = (right[rank:] / norms).T.contiguous()  # (a, m): Σ_k basis[k]·φ_kv_k = 0
    if basis.shape[1] == 0:
        return None
    factors = torch.ones_like(norms)
    alive = torch.ones_like(norms, dtype=torch.bool)
    for _ in range(basis.shape[1]):
        direction = basis[:, -1] / basis[:, -1].abs().max()
        if float((weights * direction).sum()) > 0:
            direction = -direction
        shrinking = alive & (direction < -1e-14)
        if not bool(shrinking.any()):
            direction = -direction  # Σc_k‖v_k‖a_k = 0 up to rounding: either way is free
            shrinking = alive & (direction < -1e-14)
        ratios = torch.where(shrinking, factors / -direction, torch.inf)
        unit = int(ratios.argmin())
        factors = (factors + float(ratios[unit]) * direction).clamp_min(0)
        factors[unit] = 0.0
        alive[unit] = False
        pivot = basis[unit]
        largest = int(pivot.abs().argmax())
        column = basis[:, largest] / pivot[largest] if float(pivot[largest].abs()) > 0 else None
        if column is None:
            break
        basis = basis - column[:, None] * pivot  # the rest of the basis leaves the removed unit alone
        keep = torch.ones(basis.shape[1], dtype=torch.bool, device=basis.device)
        keep[largest] = False
        basis = basis[:, keep]
        basis[unit] = 0.0
        if basis.shape[1]:
            basis = torch.linalg.qr(basis)[0]
            basis[~alive] = 0.0
    return factors

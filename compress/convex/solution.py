"""What a solve ends with: a point, what it is worth, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from compress.convex.statistics.sums import as_rows


class Status(Enum):
    """How a solve ended; `Solution.message` says it in words."""

    CERTIFIED = "certified"
    """The duality gap is within the tolerance."""
    STOPPED = "stopped"
    """The gap is above the tolerance: a limit was reached, or float64 allows no smaller one."""
    INFEASIBLE = "infeasible"
    """No V meets the constraint: not even least squares does."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A point, and a certificate that was computed from it and the moments alone.

    Attributes:
        coefficients: V (K·s, D).
        intercept: b (D,): ψ̄ − Vᵀφ̄ where the moments were `centred()`, else zero.
        penalty: λ of the penalised problem that V solves; 0 for the exact form.
        objective: ½‖Ψ − ΦV‖²_F/N + λΣc_k‖v_k‖ (penalised), Σc_k‖v_k‖ (tolerance and exact form).
        gap: relative duality gap; the objective is at most objective·gap above its minimum. Infinite where none was
            computed.
        active: units (n,) with v_k ≠ 0, sorted.
        status: how the solve ended.
        reason: why, in words.
        tolerance: the gap that was asked for.
        iterations: of the solver's inner loop.
        solver: its name in `SOLVERS`.
        error: ‖Ψ − ΦV‖_F/‖Ψ‖_F, of centred Ψ where the intercept is free.
        rounding: part of `gap` that rounding in the moments may hide: no solver gets below it.
    """

    coefficients: Tensor
    intercept: Tensor
    penalty: float
    objective: float
    gap: float
    active: Tensor
    status: Status
    reason: str
    tolerance: float
    iterations: int
    solver: str
    error: float
    rounding: float = 0.0

    @property
    def certified(self) -> bool:
        """Whether the gap is within the tolerance that was asked for."""
        return self.status is Status.CERTIFIED

    @property
    def message(self) -> str:
        """How the solve ended, in one sentence."""
        if self.status is Status.CERTIFIED:
            return f"certified: relative gap {self.gap:.1e} is within {self.tolerance:.0e}"
        if self.status is Status.INFEASIBLE:
            return f"infeasible: {self.reason}"
        return f"stopped: {self.reason}; relative gap {self.gap:.1e}, {self.tolerance:.0e} was asked for"

    def predict(self, features: Any) -> Tensor:
        """ΦV + 1bᵀ (n, D) for rows of features Φ (n, K·s)."""
        rows = as_rows(features, "features")
        if rows.shape[1] != self.coefficients.shape[0]:
            raise ValueError(f"`features` must have {self.coefficients.shape[0]} columns, got {rows.shape[1]}.")
        return torch.addmm(self.intercept, rows.to(self.coefficients), self.coefficients)

    def __repr__(self) -> str:
        rows, outputs = self.coefficients.shape
        return (
            f"Solution({self.active.numel()} active units, V ({rows}, {outputs}), λ {self.penalty:.3g}, "
            f"objective {self.objective:.6g}, error {self.error:.3g}; {self.message})"
        )

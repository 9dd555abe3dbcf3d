"""First-order solvers, batched over penalties and over layers of unlike size, on any device.

One array holds all items: X (L, K·s, T, D) for L layers with T penalties each, padded with zero units and outputs,
so an iteration is one or two batched matrix products. Items whose certificate is reached leave the batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.convex.lasso import dual_gap, shrink_factor
from compress.convex.solvers.scaled import Outcome, ScaledProblem
from compress.convex.statistics.eigen import eigen_decomposition, eigen_values

ALGORITHMS = ("admm", "accelerated")
_CHECK = 10
_RELAXATION = 1.6


@dataclass(frozen=True)
class Proximal:
    """Batched first-order iterations.

    Attributes:
        batch: problems iterated side by side.
        algorithm: "admm" (one eigendecomposition a layer, residual balancing an item) or "accelerated" (proximal
            gradient with momentum and restart).
        device: where to iterate; None: where the moments are.
        dtype: of the iterations; float32 stalls at gaps near 1e-4 on ill-conditioned features.
    """

    batch: int = 64
    algorithm: str = "admm"
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float64

    name = "proximal"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"`algorithm` must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}.")
        if self.batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {self.batch}.")

    def minimise(
        self, problem: ScaledProblem, *, tolerance: float, start: Tensor | None, max_iterations: int, deadline: float
    ) -> Outcome:
        """Solve one problem to a relative gap of `tolerance`; see `solve`."""
        return self.minimise_all([problem], tolerance, [start], max_iterations, deadline)[0]

    def minimise_all(
        self,
        problems: Sequence[ScaledProblem],
        tolerance: float,
        starts: Sequence[Tensor | None],
        max_iterations: int,
        deadline: float,
    ) -> list[Outcome]:
        """Solve every problem to a relative gap of `tolerance`, evaluated in float64; equal s go side by side."""
        outcomes: dict[int, Outcome] = {}
        for size in sorted({problem.group_size for problem in problems}):
            members = [i for i, problem in enumerate(problems) if problem.group_size == size]
            for first in range(0, len(members), self.batch):
                part = members[first : first + self.batch]
                batch = _Batch([problems[i] for i in part], [starts[i] for i in part], self.device, self.dtype)
                found = batch.run(tolerance, max_iterations, deadline, self.algorithm)
                outcomes.update(zip(part, found, strict=True))
        return [outcomes[i] for i in range(len(problems))]


@dataclass
class _State:
    """Arrays of the items still in the batch."""

    items: list[list[int]]  # by layer
    cross: Tensor  # (L, n, 1, D)
    weights: Tensor  # (L, K, T)
    point: Tensor  # (L, n, T, D)
    other: Tensor  # (L, n, T, D): scaled dual u of ADMM, or the extrapolated point
    rho: Tensor  # (L, T)
    momentum: Tensor  # (L, T)
    gram: Tensor  # (L, n, n)
    values: Tensor  # (L, n)
    vectors: Tensor  # (L, n, n)


class _Batch:
    def __init__(
        self,
        problems: Sequence[ScaledProblem],
        starts: Sequence[Tensor | None],
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        self.problems, self.starts, self.dtype = list(problems), list(starts), dtype
        self.device = torch.device(device) if device is not None else problems[0].cross.device
        self.s = problems[0].group_size
        self.layers: list[list[int]] = []
        for i, problem in enumerate(self.problems):
            for layer in self.layers:
                first = self.problems[layer[0]]
                if first.raw_gram is problem.raw_gram and first.cross.shape == problem.cross.shape:
                    layer.append(i)
                    break
            else:
                self.layers.append([i])

    def run(self, tolerance: float, max_iterations: int, deadline: float, algorithm: str) -> list[Outcome]:
        state = self._initial(eigen=algorithm == "admm")
        results: dict[int, Outcome] = {}
        best: dict[int, tuple[float, Tensor]] = {}
        step = _admm_step if algorithm == "admm" else _accelerated_step
        iteration = 0
        while True:
            gaps = self._gaps(state)
            stop = iteration >= max_iterations or time.monotonic() > deadline
            reason = f"{max_iterations} iterations were not enough"
            if stop and iteration < max_iterations:
                reason = "the time limit was reached"
            leaving = False
            for row, items in enumerate(state.items):
                for column, item in enumerate(items):
                    gap = float(gaps[row, column])
                    if item not in best or gap < best[item][0] or gap <= tolerance:
                        best[item] = (gap, self._extract(state, row, column, item))
                    if gap <= tolerance or stop:
                        results[item] = Outcome(best[item][1], iteration, "" if gap <= tolerance else reason)
                        leaving = True
            if leaving:
                if len(results) == len(self.problems):
                    return [results[i] for i in range(len(self.problems))]
                state = _without(state, set(results))
            for inner in range(_CHECK):
                step(state, self.s, inner == _CHECK - 1)
            iteration += _CHECK

    def _initial(self, *, eigen: bool) -> _State:
        s = self.s
        layers, width = len(self.layers), max(len(layer) for layer in self.layers)
        units = max(problem.unit_count for problem in self.problems)
        outputs = max(problem.cross.shape[1] for problem in self.problems)
        n = units * s
        here, dtype = self.device, self.dtype
        gram = torch.zeros(layers, n, n, dtype=dtype, device=here)
        cross = torch.zeros(layers, n, width, outputs, dtype=dtype, device=here)
        point = torch.zeros_like(cross)
        weights = torch.ones(layers, units, width, dtype=dtype, device=here)
        for row, layer in enumerate(self.layers):
            for column, item in enumerate(layer):
                problem, start = self.problems[item], self.starts[item]
                rows, d = problem.cross.shape
                cross[row, :rows, column, :d] = problem.cross.to(here, dtype)
                weights[row, : problem.unit_count, column] = problem.thresholds.to(here, dtype)
                if start is not None:
                    point[row, :rows, column, :d] = start.to(here, dtype)
            first = self.problems[layer[0]]
            rows = first.cross.shape[0]
            every = torch.arange(first.unit_count, device=first.cross.device)
            gram[row, :rows, :rows] = first.block(every).to(here, dtype)
        if eigen:
            values, vectors = eigen_decomposition(gram.double())
            values, vectors = values.clamp_min(0).to(self.dtype), vectors.to(self.dtype)
        else:
            values = eigen_values(gram.double())[:, -1:].to(self.dtype).clamp_min(1e-12)
            vectors = gram[:, :0]
        # a first ρ: the curvature λc/‖v‖ of a typical active unit, with ‖v‖ about ‖H_k‖
        norms = cross.reshape(layers, units, s, width, outputs).square().sum((2, 4)).sqrt()
        rho = (weights.mean(1) / norms.amax(1).clamp_min(1e-12)).clamp(1e-3, 1.0)
        correlation = cross - torch.einsum("lij,ljtd->litd", gram, point)
        other = correlation / rho[:, None, :, None] if eigen else point.clone()
        items = [list(layer) for layer in self.layers]
        return _State(items, cross, weights, point, other, rho, torch.ones_like(rho), gram, values, vectors)

    def _extract(self, state: _State, row: int, column: int, item: int) -> Tensor:
        rows, d = self.problems[item].cross.shape
        return state.point[row, :rows, column, :d].to(self.problems[item].cross)

    def _gaps(self, state: _State) -> Tensor:
        """Relative duality gap (L, T) of every item, in float64."""
        point, gram, cross = state.point.double(), state.gram.double(), state.cross.double()
        weights = state.weights.double()
        correlation = cross - _product(gram, point)
        inner = (point * correlation).sum((1, 3))
        energies = point.new_ones(inner.shape)
        for row, items in enumerate(state.items):
            for column, item in enumerate(items):
                energies[row, column] = self.problems[item].energy
        fit = (energies - (point * cross).sum((1, 3)) - inner).clamp_min(0)
        penalised = (weights * _norms(point, self.s)).sum(1)
        largest = (_norms(correlation, self.s) / weights.clamp_min(1e-300)).amax(1)
        objective = fit / 2 + penalised
        gap = dual_gap(fit, penalised, inner, largest).clamp_min(0) / objective.clamp_min(1e-300)
        return torch.where(torch.isfinite(gap), gap, torch.inf).cpu()


def _product(matrix: Tensor, point: Tensor) -> Tensor:
    """matrix (L, m, n) times point (L, n, T, D)."""
    layers, n, width, outputs = point.shape
    return torch.bmm(matrix, point.reshape(layers, n, width * outputs)).reshape(layers, -1, width, outputs)


def _norms(point: Tensor, s: int) -> Tensor:
    """Unit norms (L, K, T)."""
    layers, n, width, outputs = point.shape
    return point.reshape(layers, n // s, s, width, outputs).square().sum((2, 4)).sqrt()


def _shrink(point: Tensor, weights: Tensor, s: int) -> Tensor:
    factor = shrink_factor(_norms(point, s), weights)
    return point * factor.repeat_interleave(s, dim=1)[..., None]


def _admm_step(state: _State, s: int, adapt: bool) -> None:
    rho = state.rho[:, None, :, None]
    z, u = state.point, state.other
    turned = _product(state.vectors.mT, state.cross + rho * (z - u))
    x = _product(state.vectors, turned / (state.values[:, :, None, None] + rho))
    relaxed = _RELAXATION * x + (1 - _RELAXATION) * z
    new = _shrink(relaxed + u, state.weights / state.rho[:, None, :], s)
    u = u + relaxed - new
    if adapt:
        tiny = 1e-30
        primal = (x - new).square().sum((1, 3)).sqrt() / x.square().sum((1, 3)).sqrt().clamp_min(tiny)
        dual = (new - z).square().sum((1, 3)).sqrt() / u.square().sum((1, 3)).sqrt().clamp_min(tiny)
        factor = (primal.clamp_min(tiny) / dual.clamp_min(tiny)).sqrt().clamp(0.2, 5.0)
        factor = torch.where((factor > 0.5) & (factor < 2), 1.0, factor)
        changed = (state.rho * factor).clamp(1e-7, 1e3)
        u = u * (state.rho / changed)[:, None, :, None]
        state.rho = changed
    state.point, state.other = new, u


def _accelerated_step(state: _State, s: int, adapt: bool) -> None:
    length = 1 / state.values[:, :, None, None]  # (L, 1, 1, 1), one over the largest eigenvalue
    old, y = state.point, state.other
    moved = y + length * (state.cross - _product(state.gram, y))
    new = _shrink(moved, state.weights * length[..., 0], s)
    restart = ((y - new) * (new - old)).sum((1, 3)) > 0
    before = torch.where(restart, 1.0, state.momentum)
    after = (1 + (1 + 4 * before.square()).sqrt()) / 2
    factor = torch.where(restart, 0.0, (before - 1) / after)
    state.point, state.other = new, new + factor[:, None, :, None] * (new - old)
    state.momentum = torch.where(restart, 1.0, after)


def _without(state: _State, done: set[int]) -> _State:
    """The state without finished items: layers with none left go, the columns of the others close up."""
    rows = [row for row, items in enumerate(state.items) if any(item not in done for item in items)]
    kept = [[column for column, item in enumerate(state.items[row]) if item not in done] for row in rows]
    width = max(len(columns) for columns in kept)
    device = state.point.device
    row_index = torch.tensor(rows, device=device)
    columns = torch.tensor([(own + own[-1:] * width)[:width] for own in kept], device=device)  # repeats pad

    def choose(array: Tensor, dim: int) -> Tensor:
        array = array[row_index]
        shape = [1] * array.ndim
        shape[0], shape[dim] = columns.shape
        index = columns.reshape(shape).expand(*(columns.shape[1] if d == dim else n for d, n in enumerate(array.shape)))
        return array.gather(dim, index)

    return _State(
        items=[[state.items[row][column] for column in own] for row, own in zip(rows, kept, strict=True)],
        cross=choose(state.cross, 2),
        weights=choose(state.weights, 2),
        point=choose(state.point, 2),
        other=choose(state.other, 2),
        rho=choose(state.rho, 1),
        momentum=choose(state.momentum, 1),
        gram=state.gram[row_index],
        values=state.values[row_index],
        vectors=state.vectors[row_index],
    )

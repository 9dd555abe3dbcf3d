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
        spectra: dict[int, tuple[Tensor, Tensor]] = {}  # of every gram matrix, by its identity
        for part in _batches(problems, self.batch):
            if outcomes and time.monotonic() > deadline:
                for i in part:
                    start = starts[i]
                    point = torch.zeros_like(problems[i].cross) if start is None else start
                    outcomes[i] = Outcome(point, 0, "the time limit was reached")
                continue
            batch = _Batch([problems[i] for i in part], [starts[i] for i in part], self.device, self.dtype)
            batch_outcomes = batch.run(tolerance, max_iterations, deadline, self.algorithm, spectra)
            outcomes.update(zip(part, batch_outcomes, strict=True))
            spectra = {key: spectra[key] for key in list(spectra)[-1:]}  # a layer may go on in the next batch
        return [outcomes[i] for i in range(len(problems))]


def _batches(problems: Sequence[ScaledProblem], most: int) -> list[list[int]]:
    """Numbers of the problems to iterate side by side: layers whole, with others of like size, `most` at a time.

    An array holds a batch, so unlike sizes would be padded: the columns and outputs of the layers in a batch are at
    most a quarter more than those of its smallest.
    """
    layers: dict[tuple[int, ...], list[int]] = {}
    for i, problem in enumerate(problems):
        layers.setdefault((problem.group_size, *problem.cross.shape, id(problem.raw_gram)), []).append(i)
    batches: list[list[int]] = []
    room, smallest = 0, (0, 0, 0)
    for (s, rows, outputs, _), items in sorted(layers.items(), key=lambda layer: layer[0][:3]):
        alike = s == smallest[0] and rows <= 1.25 * smallest[1] and outputs <= 1.25 * smallest[2]
        if not (alike and len(items) <= room):
            room, smallest = 0, (s, rows, outputs)
        for item in items:
            if room == 0:
                batches.append([])
                room = most
            batches[-1].append(item)
            room -= 1
    return batches


@dataclass
class _State:
    """Arrays of the items still in the batch: L layers of n = K·s columns with T items each, D outputs.

    `other` is the scaled dual u of ADMM, or the extrapolated point; `best` has the smallest gap so far, `best_gap`.
    """

    items: list[list[int]]  # by layer
    cross: Tensor  # (L, n, T, D), or (L, n, 1, D) where the items of a layer share it
    weights: Tensor  # (L, K, T)
    energies: Tensor  # (L, T)
    point: Tensor  # (L, n, T, D)
    other: Tensor  # (L, n, T, D)
    best: Tensor  # (L, n, T, D)
    best_gap: Tensor  # (L, T), float64
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

    def run(
        self,
        tolerance: float,
        max_iterations: int,
        deadline: float,
        algorithm: str,
        spectra: dict[int, tuple[Tensor, Tensor]],
    ) -> list[Outcome]:
        state = self._initial(spectra if algorithm == "admm" else None)
        results: dict[int, Outcome] = {}
        step = _admm_step if algorithm == "admm" else _accelerated_step
        iteration = 0
        while True:
            gaps = _note_gaps(state, self.s)
            stop = iteration >= max_iterations or time.monotonic() > deadline
            reason = f"{max_iterations} iterations were not enough"
            if stop and iteration < max_iterations:
                reason = "the time limit was reached"
            leaving = False
            for row, items in enumerate(state.items):
                for column, item in enumerate(items):
                    certified = gaps[row][column] <= tolerance
                    if certified or stop:
                        coefficients = self._extract(state, row, column, item)
                        results[item] = Outcome(coefficients, iteration, "" if certified else reason)
                        leaving = True
            if leaving:
                if len(results) == len(self.problems):
                    return [results[i] for i in range(len(self.problems))]
                state = _without(state, set(results))
            for inner in range(_CHECK):
                step(state, self.s, inner == _CHECK - 1)
            iteration += _CHECK

    def _initial(self, spectra: dict[int, tuple[Tensor, Tensor]] | None) -> _State:
        """The arrays before the first iteration; eigendecompositions are read from `spectra`, or put there."""
        s = self.s
        layers, width = len(self.layers), max(len(layer) for layer in self.layers)
        units = max(problem.unit_count for problem in self.problems)
        outputs = max(problem.cross.shape[1] for problem in self.problems)
        n = units * s
        device, dtype = self.device, self.dtype
        shared = all(self.problems[i].cross is self.problems[layer[0]].cross for layer in self.layers for i in layer)
        gram = torch.zeros(layers, n, n, dtype=dtype, device=device)
        cross = torch.zeros(layers, n, 1 if shared else width, outputs, dtype=dtype, device=device)
        point = torch.zeros(layers, n, width, outputs, dtype=dtype, device=device)
        weights = torch.ones(layers, units, width, dtype=dtype, device=device)
        energies = torch.ones(layers, width, dtype=torch.float64)
        values = torch.ones(layers, n if spectra is not None else 1, dtype=dtype, device=device)
        vectors = torch.zeros(layers, n, n if spectra is not None else 0, dtype=dtype, device=device)
        for row, layer in enumerate(self.layers):
            first = self.problems[layer[0]]
            rows, d = first.cross.shape
            for column, item in enumerate(layer):
                problem, start = self.problems[item], self.starts[item]
                if column < cross.shape[2]:
                    cross[row, :rows, column, :d] = problem.cross
                weights[row, : problem.unit_count, column] = problem.thresholds
                energies[row, column] = problem.energy
                if start is not None:
                    point[row, :rows, column, :d] = start
            block = first.block(torch.arange(first.unit_count, device=first.cross.device)).to(device)
            gram[row, :rows, :rows] = block
            if spectra is None:
                values[row] = eigen_values(block)[-1].clamp_min(1e-12)
            else:
                key = id(first.raw_gram)
                if key not in spectra:
                    spectra[key] = eigen_decomposition(block)
                values[row, :rows] = spectra[key][0].clamp_min(0)
                vectors[row, :rows, :rows] = spectra[key][1]
        # a first ρ: the curvature λc/‖v‖ of a typical active unit, with ‖v‖ about ‖H_k‖
        norms = _norms(cross, s)
        rho = (weights.mean(1) / norms.amax(1).clamp_min(1e-12)).clamp(1e-3, 1.0)
        other = (cross - _product(gram, point)) / rho[:, None, :, None] if spectra is not None else point.clone()
        return _State(
            items=[list(layer) for layer in self.layers],
            cross=cross,
            weights=weights,
            energies=energies.to(device),
            point=point,
            other=other,
            best=point,
            best_gap=torch.full((layers, width), torch.inf, dtype=torch.float64, device=device),
            rho=rho,
            momentum=torch.ones_like(rho),
            gram=gram,
            values=values,
            vectors=vectors,
        )

    def _extract(self, state: _State, row: int, column: int, item: int) -> Tensor:
        cross = self.problems[item].cross
        rows, d = cross.shape
        return torch.empty_like(cross).copy_(state.best[row, :rows, column, :d])


def _note_gaps(state: _State, s: int) -> list[list[float]]:
    """Relative duality gap (L, T) of every item, in float64; better points become the `best` ones."""
    point, gram, cross = state.point.double(), state.gram.double(), state.cross.double()
    weights = state.weights.double()
    correlation = cross - _product(gram, point)
    inner = (point * correlation).sum((1, 3))
    fit = (state.energies - (point * cross).sum((1, 3)) - inner).clamp_min(0)
    penalised = (weights * _norms(point, s)).sum(1)
    largest = (_norms(correlation, s) / weights.clamp_min(1e-300)).amax(1)
    objective = fit / 2 + penalised
    gap = dual_gap(fit, penalised, inner, 1 / largest.clamp_min(1)).clamp_min(0) / objective.clamp_min(1e-300)
    gap = torch.where(torch.isfinite(gap), gap, torch.inf)
    better = gap < state.best_gap
    state.best = torch.where(better[:, None, :, None], state.point, state.best)
    state.best_gap = torch.where(better, gap, state.best_gap)
    gaps: list[list[float]] = gap.tolist()
    return gaps


def _product(matrix: Tensor, point: Tensor) -> Tensor:
    """matrix (L, m, n) times point (L, n, T, D)."""
    layers, n, width, outputs = point.shape
    return torch.bmm(matrix, point.reshape(layers, n, width * outputs)).reshape(layers, -1, width, outputs)


def _norms(point: Tensor, s: int) -> Tensor:
    """Unit norms (L, K, T)."""
    layers, n, width, _ = point.shape
    norms: Tensor = torch.linalg.vector_norm(point, dim=3)
    if s > 1:
        norms = torch.linalg.vector_norm(norms.reshape(layers, n // s, s, width), dim=2)
    return norms


def _shrink(point: Tensor, weights: Tensor, s: int) -> Tensor:
    factor = shrink_factor(_norms(point, s), weights)
    return point * factor.repeat_interleave(s, dim=1)[..., None]


def _admm_step(state: _State, s: int, adapt: bool) -> None:
    rho = state.rho[:, None, :, None]
    z, u = state.point, state.other
    turned = _product(state.vectors.mT, torch.addcmul(state.cross.expand_as(z), rho, z - u))
    x = _product(state.vectors, turned.div_(state.values[:, :, None, None] + rho))
    relaxed = torch.lerp(z, x, _RELAXATION).add_(u)
    new = _shrink(relaxed, state.weights / state.rho[:, None, :], s)
    u = relaxed.sub_(new)
    if adapt:
        tiny = 1e-30
        primal = _sizes(x - new) / _sizes(x).clamp_min(tiny)
        dual = _sizes(new - z) / _sizes(u).clamp_min(tiny)
        factor = (primal.clamp_min(tiny) / dual.clamp_min(tiny)).sqrt().clamp(0.2, 5.0)
        factor = torch.where((factor > 0.5) & (factor < 2), 1.0, factor)
        changed = (state.rho * factor).clamp(1e-7, 1e3)
        u = u * (state.rho / changed)[:, None, :, None]
        state.rho = changed
    state.point, state.other = new, u


def _sizes(point: Tensor) -> Tensor:
    """Frobenius norm (L, T) of every item."""
    sizes: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(point, dim=3), dim=1)
    return sizes


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
        if array.shape[dim] == 1:
            return array  # one for all items of a layer
        shape = [1] * array.ndim
        shape[0], shape[dim] = columns.shape
        index = columns.reshape(shape).expand(*(columns.shape[1] if d == dim else n for d, n in enumerate(array.shape)))
        return array.gather(dim, index)

    return _State(
        items=[[state.items[row][column] for column in own] for row, own in zip(rows, kept, strict=True)],
        cross=choose(state.cross, 2),
        weights=choose(state.weights, 2),
        energies=choose(state.energies, 1),
        point=choose(state.point, 2),
        other=choose(state.other, 2),
        best=choose(state.best, 2),
        best_gap=choose(state.best_gap, 1),
        rho=choose(state.rho, 1),
        momentum=choose(state.momentum, 1),
        gram=state.gram[row_index],
        values=state.values[row_index],
        vectors=state.vectors[row_index],
    )

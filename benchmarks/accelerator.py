"""The batched proximal solver and the moment pass on a GPU: share of the card's matrix rate, against loop and CPU.

`solvers --only gpu` runs it; `--device cpu` and `--quick` try the same code without a card. The layers have the shapes
of VGG-19's: the readers of 15 convolutions' channels (3×3 taps) and of the last 512 features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.reporting import Cell, Run
from compress.convex import MomentAccumulator, Moments, MultitaskLasso, Proximal, Solution, solve, solve_batch

Result = TypeVar("Result")

FRACTIONS = tuple(0.7 * 0.75**i for i in range(20))  # λ/λ_max
TOLERANCE = 1e-4
BATCH_ROWS = 4096


@dataclass(frozen=True)
class Shape:
    """A layer: K units of s columns, D outputs."""

    units: int
    taps: int
    outputs: int

    @property
    def columns(self) -> int:
        return self.units * self.taps

    @property
    def rows(self) -> int:
        """N: enough for moments of full rank."""
        return max(2 * self.columns, 2048)

    def __str__(self) -> str:
        return f"K {self.units}, s {self.taps}, D {self.outputs}"


_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512)


def vgg_shapes(scale: float) -> list[Shape]:
    """The 16 layers, K and D times `scale`."""
    widths = [max(8, round(width * scale)) for width in _WIDTHS]
    convolutions = [Shape(k, 9, d) for k, d in pairwise(widths)]
    return [*convolutions, Shape(widths[-1], 1, widths[-1])]


def run_accelerator(run: Run, device: str, scale: float) -> None:
    """Every table and goal of the GPU part."""
    if device == "cpu" and run.options.device is None:
        run.goal("gpu-batch-against-loop", None, "faster", note="not run: no GPU on this machine; --device cpu to try")
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    run.say(
        f"device {device}, K and D × {scale:g}, no TF32 in matrix products, CPU with {torch.get_num_threads()} threads"
    )
    shapes = vgg_shapes(scale)
    rates = {dtype: matrix_rate(device, dtype, round(8192 * scale)) for dtype in (torch.float64, torch.float32)}
    run.say("; ".join(f"plain matrix product in {str(t)[6:]}: {rate / 1e12:.2f} TFLOP/s" for t, rate in rates.items()))
    layers = moment_pass(run, shapes, device, rates[torch.float64])
    solver_rates(run, shapes, layers, rates)
    whole_batch(run, shapes, layers, rates[torch.float64])
    loop_and_cpu(run, layers, device, round(1152 * scale))


def clock(device: str, call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call, the card's work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square matrix product, the best of three."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = min(clock(device, lambda: left @ right)[0] for _ in range(4))
    return 2 * size**3 / seconds


def rows_of(shape: Shape, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Φ (N, K·s) in float32, rectified projections of 48 latent variables, neighbouring taps alike, and V (K·s, D)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    latent = normal(shape.rows, 48) * torch.arange(1, 49, device=device).pow(-0.5)
    base = latent @ normal(48, shape.units) + 0.2 * normal(shape.rows, shape.units)
    taps = [(base + 0.5 * base.roll(shift, 0)).relu() for shift in range(shape.taps)]
    weights = normal(shape.columns, shape.outputs) / shape.columns**0.5
    size = torch.rand(shape.units, 1, generator=generator, device=device).square()
    return torch.stack(taps, 2).reshape(shape.rows, -1), weights * size.repeat_interleave(shape.taps, 0)


def record(features: Tensor, outputs: Tensor, taps: int) -> Moments:
    sums = MomentAccumulator(taps)
    for phi, psi in zip(features.split(BATCH_ROWS), outputs.split(BATCH_ROWS), strict=True):
        sums.add(phi, psi)
    return sums.moments()


def moment_pass(run: Run, shapes: list[Shape], device: str, rate: float) -> list[Moments]:
    """Moments of every layer, with the seconds of the pass beside plain products ΦᵀΦ and ΦᵀΨ in float64."""
    layers, sums = [], dict.fromkeys(("ours", "plain", "work", "cpu", "on both"), 0.0)
    for seed, shape in enumerate(shapes):
        features, weights = rows_of(shape, device, seed)
        outputs = features @ weights
        if seed == 0:
            record(features, outputs, shape.taps)
        seconds, moments = clock(device, lambda: record(features, outputs, shape.taps))  # noqa: B023
        layers.append(moments)
        phi, psi = features.double(), outputs.double()
        plain, _ = clock(device, lambda: (phi.T @ phi, phi.T @ psi))  # noqa: B023
        sums["ours"] += seconds
        sums["plain"] += plain
        sums["work"] += 2 * shape.rows * shape.columns * (shape.columns + shape.outputs)
        if shape.columns <= 2304 and device != "cpu":
            here = features.cpu(), outputs.cpu()
            sums["cpu"] += clock("cpu", lambda: record(*here, shape.taps))[0]  # noqa: B023
            sums["on both"] += seconds
    against = sums["cpu"] / sums["on both"] if sums["on both"] else None
    run.table(
        f"Moment pass, {len(shapes)} layers, N up to {max(shape.rows for shape in shapes)}, float32 rows",
        ("ours, s", "plain float64 products, s", "share of the float64 rate", "faster than CPU, K·s ≤ 2304"),
        [[sums["ours"], sums["plain"], sums["work"] / sums["ours"] / rate, against]],
    )
    run.goal("gpu-moment-pass-slower-than-products", sums["ours"] / sums["plain"], 1.5, unit="x")
    return layers


def penalised(moments: Moments, fractions: tuple[float, ...] = FRACTIONS) -> list[MultitaskLasso]:
    top = MultitaskLasso(moments, 0.0).lambda_max
    return [MultitaskLasso(moments, fraction * top) for fraction in fractions]


def work(solutions: list[Solution]) -> float:
    """Operations of the iterations: two products with the eigenvectors each, one with the gram every tenth."""
    return sum(
        4.2 * solution.iterations * solution.coefficients.shape[0] ** 2 * solution.coefficients.shape[1]
        for solution in solutions
    )


def solver_rates(run: Run, shapes: list[Shape], layers: list[Moments], rates: dict[torch.dtype, float]) -> None:
    """20 λ of one layer of every size, a hundred iterations: what they come to in matrix products."""
    rows: list[list[Cell]] = []
    shares: dict[torch.dtype, float] = {}
    for columns in sorted({shape.columns for shape in shapes}):
        place = max(i for i, shape in enumerate(shapes) if shape.columns == columns)
        problems = penalised(layers[place])
        row: list[Cell] = [str(shapes[place])]
        for dtype, rate in rates.items():
            solver = Proximal(dtype=dtype)
            device = str(layers[place].covariance.device)
            if not rows:
                solve_batch(problems, solver, tolerance=1e-15, max_iterations=10)  # kernels are loaded
            setup, _ = clock(device, lambda: solve_batch(problems, solver, tolerance=1e-15, max_iterations=0))  # noqa: B023
            seconds, solutions = clock(
                device,
                lambda: solve_batch(problems, solver, tolerance=1e-15, max_iterations=100),  # noqa: B023
            )
            shares[dtype] = work(solutions) / max(1e-9, seconds - setup) / rate
            row += [setup, seconds - setup, f"{100 * shares[dtype]:.0f} %"]
        rows.append(row)
    run.table(
        "Batched proximal solver, 20 λ of one layer, 100 iterations; setup: eigendecomposition and certificates",
        (
            "layer",
            *("float64 setup, s", "iterations, s", "of the matrix rate"),
            *("float32 setup, s", "iterations, s", "of the matrix rate"),
        ),
        rows,
    )
    for dtype, share in shares.items():
        run.goal(f"gpu-share-of-the-{str(dtype)[6:]}-rate-largest-layer", share, 0.5, at_least=True)


def whole_batch(run: Run, shapes: list[Shape], layers: list[Moments], rate: float) -> None:
    """All layers × 20 λ in one call."""
    problems = [problem for moments in layers for problem in penalised(moments)]
    device = str(layers[0].covariance.device)
    seconds, solutions = clock(
        device, lambda: solve_batch(problems, tolerance=TOLERANCE, max_iterations=200, time_limit=30.0)
    )
    certified = sum(solution.certified for solution in solutions)
    iterations = sorted(solution.iterations for solution in solutions)
    run.table(
        f"{len(shapes)} layers × {len(FRACTIONS)} λ to {TOLERANCE:g} in one call, at most 200 iterations and 30 s",
        ("seconds", "certified", "iterations, median and most", "share of the float64 rate, setup counted in"),
        [
            [
                seconds,
                f"{certified} of {len(problems)}",
                f"{iterations[len(iterations) // 2]}, {iterations[-1]}",
                f"{100 * work(solutions) / seconds / rate:.0f} %",
            ]
        ],
    )


def loop_and_cpu(run: Run, layers: list[Moments], device: str, most: int) -> None:
    """Layers of up to `most` columns at every other λ: one call, a loop of single solves, and one call on the CPU."""
    small = [moments for moments in layers if moments.covariance.shape[0] <= most]
    problems = [problem for moments in small for problem in penalised(moments, FRACTIONS[::2])]

    def loop() -> list[Solution]:
        return [solve(problem, "proximal", tolerance=TOLERANCE, max_iterations=200) for problem in problems]

    def together(given: list[MultitaskLasso], limit: float = float("inf")) -> list[Solution]:
        return solve_batch(given, tolerance=TOLERANCE, max_iterations=200, time_limit=limit)

    batch, solutions = clock(device, lambda: together(problems))
    apart, singles = clock(device, loop)
    cpu: Cell = None
    times: float | None = None
    if device != "cpu":
        here = [problem for moments in small for problem in penalised(moments.to("cpu"), FRACTIONS[::2])]
        seconds, ended = clock("cpu", lambda: together(here, 25.0))
        stopped = any("time limit" in solution.reason for solution in ended)
        cpu, times = f"> {seconds:.3g}" if stopped else seconds, seconds / batch
    run.table(
        f"{len(problems)} problems of up to {most} columns to {TOLERANCE:g}, float64",
        ("one call, s", "certified", "one by one, s", "certified", "one call on the CPU, s"),
        [[batch, _certified(solutions), apart, _certified(singles), cpu]],
    )
    run.goal("gpu-batch-against-loop", apart / batch, 1.0, at_least=True, unit="x")
    run.goal("gpu-batch-against-cpu", times, 1.0, at_least=True, unit="x", note="" if times else "no GPU")


def _certified(solutions: list[Solution]) -> str:
    return f"{sum(solution.certified for solution in solutions)} of {len(solutions)}"

"""Part 5 (Jacot et al. 2022): the width where the loss stops falling, and attraction against repulsion at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reporting import Run
from benchmarks.training_data import mnist
from compress.diagnostics.forces import hidden_forces
from compress.training.plateau import measure_plateau


def plateau_part(run: Run) -> None:
    per_class, steps, seeds = (3, 150, (0,)) if run.quick else (10, 600, (0, 1))
    widths = (4, 10, 24) if run.quick else (2, 4, 6, 8, 10, 12, 16, 32)
    penalty = 1e-2
    inputs, labels, _, _ = mnist(run, per_class, 10)
    run.say(
        f"part 5: two hidden layers of one width, {per_class} images per class, full batch, Adam, {steps} steps, "
        f"λ {penalty:g}, best of {len(seeds)} seeds; then 10 images, one per class, 32 hidden units, float64, L-BFGS"
    )
    found = measure_plateau(inputs, labels, widths, layers=3, penalty=penalty, steps=steps, seeds=seeds)
    run.table(
        "Regularised loss against width",
        ("width", "loss", "over the smallest"),
        [(w, v, v / min(found.losses)) for w, v in zip(found.widths, found.losses, strict=True)],
    )
    run.table(
        "Where the plateau starts (2 % above the smallest loss)",
        ("start", "rank Φ", "rank Ψ", "rank·rank", "N(N+1)"),
        [(found.start, found.rank_features, found.rank_outputs, found.bound, found.data_bound)],
    )
    run.goal("plateau-start", found.start, "8 to 12", met=8 <= found.start <= 12, note="the number of classes is 10")
    run.goal("plateau-within-the-rank-bound", found.start, found.bound)
    forces_table(run)


def forces_table(run: Run) -> None:
    """Ten images of ten classes: the outputs have rank N − 1, so the features must too, as the equality asks for."""
    inputs, labels, _, _ = mnist(run, 1, 10)
    rows, residuals = [], {}
    for name, activation in (("tanh", nn.Tanh()), ("ReLU", nn.ReLU())):
        for steps in (5, 60 if run.quick else 400):
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(784, 32), activation, nn.Linear(32, 10)).double()
            gradient = minimise(module, inputs.double(), labels, 1e-2, steps)
            residual, along = measure_forces(module, inputs.double())
            residuals[name] = residual
            rows.append((name, steps, gradient, residual, along))
    run.table(
        "Attraction and repulsion on the hidden layer",
        ("activation", "L-BFGS iterations", "gradient norm", "residual", "Σ|‖w_k‖² − ‖v_k‖²| / Σ(‖w_k‖² + ‖v_k‖²)"),
        rows,
    )
    run.goal("force-residual-tanh", residuals["tanh"], 0.01, note="‖attraction − repulsion‖ / ‖attraction‖")
    run.goal("force-residual-relu-along-units", rows[-1][4], 0.01, note="ReLU's minimiser has samples at the kink")


def minimise(module: nn.Module, inputs: Tensor, labels: Tensor, penalty: float, steps: int) -> float:
    """Full-batch L-BFGS on cross-entropy + λ/2 Σ‖W‖²; the norm of the last gradient."""
    weights = [value for value in module.parameters() if value.ndim >= 2]
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=steps, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = torch.stack([value.square().sum() for value in weights]).sum()
        value = cross_entropy(module(inputs), labels) + penalty / 2 * squares
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    return float(torch.cat([value.grad.flatten() for value in module.parameters()]).norm())


def measure_forces(module: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """The residual of the forces, and of their components along each unit's own activations."""
    first, activation, second = module
    hidden = first(inputs).detach().requires_grad_()
    features = activation(hidden)
    (slopes,) = torch.autograd.grad(features.sum(), hidden)
    with torch.no_grad():
        forces = hidden_forces(inputs, hidden, slopes, features, second(features))
        pull, push = first.weight.square().sum(1), second.weight.square().sum(0)
    return forces.residual, float((pull - push).abs().sum() / (pull + push).sum())

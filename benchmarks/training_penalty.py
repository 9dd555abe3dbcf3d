"""Part 3 (Shen, Wang, Xu, Yan 2024): λ for a wanted number of nonzeros, on Mackey-Glass and on an MNIST CNN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reporting import Run
from benchmarks.training_data import accuracy, mnist
from compress.models import mlp, mnist_cnn
from compress.training import ProximalL1
from compress.training.losses import squared_loss
from compress.training.sparsity import Choice, Minimiser, choose_penalties, l1_forces

WIDTHS = (6, 64, 64, 32, 1)


def penalty_part(run: Run) -> None:
    mackey_glass(run, steps=60 if run.quick else 500)
    convolutional(run, *((10, 1) if run.quick else (100, 3)))


def mackey_glass(run: Run, steps: int) -> None:
    with np.load(run.options.data / "mg.npz") as file:
        inputs, targets = (torch.from_numpy(file[name]).float() for name in ("inputs", "targets"))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    data, held = (inputs[train], targets[train, None]), (inputs[test], targets[test, None])

    def fit(penalties: Sequence[float], decay: float = 0.0, start: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        module = mlp(WIDTHS)
        if start is not None:
            module.load_state_dict(start.state_dict())
        optimizer = proximal(module, penalties, 0.05, decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.005)
        for _ in range(steps):
            optimizer.zero_grad()
            squared_loss(module(data[0]), data[1]).backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        squared_loss(module(data[0]), data[1]).backward()
        return module

    total = sum(weight.numel() for weight in weights_of(mlp(WIDTHS)))
    run.say(
        f"part 3: Mackey-Glass, 1000 rows for training, 385 for test, network {'-'.join(map(str, WIDTHS))} with "
        f"{total} weights, full batch, {steps} steps a training, momentum 0.9, all from one dense network"
    )
    rows, dense, misses = [], [], []
    start = fit([0.0])
    for decay in (0.0, 1e-6, 1e-5, 1e-4, 1e-3):
        module = fit([0.0], decay, start)  # as many steps as the sparse ones
        errors = [mean_square(module, *part) for part in (data, held)]
        level = sum(int(weight.count_nonzero()) for weight in weights_of(module))
        dense.append(errors[1])
        rows.append((f"dense, weight decay {decay:g}", None, level, *errors, 1))
    sparse = []
    for share in (0.1, 0.25):
        sizes = [weight.numel() for weight in weights_of(mlp(WIDTHS))]
        for name, goals, tolerance in (
            ("one λ", [round(share * total)], 0.02),
            ("λ per layer", layer_targets(share, sizes), 0.05),
        ):
            found = search(
                partial(fit, start=start), goals, high=0.01, tolerance=tolerance, most=4 if run.quick else 15
            )
            errors = [mean_square(found.solution, *part) for part in (data, held)]
            sparse.append(errors[1])
            misses.append(deviation(found, goals) / tolerance)
            rows.append(
                (f"{name}, {100 * share:g} %", ", ".join(map(str, goals)), ", ".join(map(str, found.levels)), *errors,
                 len(found.history))
            )  # fmt: skip
    run.table("Mackey-Glass", ("run", "wanted nonzeros", "nonzeros", "training MSE", "test MSE", "trainings"), rows)
    run.goal("mackey-glass-level", max(misses), 1.0, note="worst deviation over its tolerance, 2 % and 5 % a layer")
    run.goal("mackey-glass-test-mse", max(sparse), min(dense), note="worst sparse against best dense")
    run.goal("mackey-glass-test-mse-best-sparse", min(sparse), min(dense))


def convolutional(run: Run, per_class: int, epochs: int) -> None:
    inputs, labels, test, test_labels = mnist(run, per_class, 1000)
    inputs, test = inputs.view(-1, 1, 28, 28), test.view(-1, 1, 28, 28)

    def fit(penalties: Sequence[float], start: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        module = mnist_cnn()
        if start is not None:
            module.load_state_dict(start.state_dict())
        optimizer = proximal(module, penalties, 0.02)
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs), generator=generator).split(64):
                optimizer.zero_grad()
                cross_entropy(module(inputs[batch]), labels[batch]).backward()
                optimizer.step()
        optimizer.zero_grad()
        cross_entropy(module(inputs), labels).backward()
        return module

    total = sum(weight.numel() for weight in weights_of(mnist_cnn()))
    run.say(
        f"MNIST CNN (three 3×3 convolutions, two linear layers, {total} weights), {per_class} images per class, "
        f"{epochs} epochs of batches of 64 a training, momentum 0.9, all from one dense network"
    )
    start = fit([0.0])
    dense = fit([0.0], start)  # as many steps as the sparse ones
    rows: list[tuple[str | float | int, ...]] = [
        ("dense", total, 1.0, 1, accuracy(dense, inputs, labels), accuracy(dense, test, test_labels))
    ]
    for target in (50_000, 100_000):
        found = search(partial(fit, start=start), [target], high=0.01, tolerance=0.02, most=2 if run.quick else 10)
        module, miss = found.solution, deviation(found, [target])
        rows.append(
            (f"{target} wanted", found.levels[0], found.levels[0] / total, len(found.history),
             accuracy(module, inputs, labels), accuracy(module, test, test_labels))
        )  # fmt: skip
        run.goal(f"mnist-cnn-level-{target}", miss, 0.02, note="relative deviation")
        run.goal(f"mnist-cnn-accuracy-{target}", rows[-1][-1], rows[0][-1] - 1, at_least=True, unit=" %")
    run.table("MNIST CNN", ("run", "nonzeros", "share", "trainings", "training %", "test %"), rows)


def search(fit, goals: Sequence[int], *, high: float, tolerance: float, most: int) -> Choice:  # type: ignore[no-untyped-def]
    def train(penalties: tuple[float, ...]) -> Minimiser:
        module = fit(penalties)
        groups = [[weight] for weight in weights_of(module)] if len(penalties) > 1 else [weights_of(module)]
        measured = [l1_forces(group, [weight.grad for weight in group]) for group in groups]
        return Minimiser(tuple(level for level, _ in measured), tuple(force for _, force in measured), module)

    return choose_penalties(train, goals, low=1e-6, high=high, tolerance=tolerance, most=most)


def proximal(module: nn.Module, penalties: Sequence[float], rate: float, decay: float = 0.0) -> torch.optim.Optimizer:
    """ℓ1 by proximal steps with one λ or one for each layer; plain SGD with weight decay where λ is 0."""
    weights = weights_of(module)
    free = [value for value in module.parameters() if value.ndim < 2]
    if len(penalties) == 1 and penalties[0] == 0:
        groups = [{"params": weights, "weight_decay": decay}, {"params": free}]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    each = penalties if len(penalties) > 1 else [penalties[0]] * len(weights)
    groups = [{"params": [weight], "penalty": value} for weight, value in zip(weights, each, strict=True)]
    return ProximalL1([*groups, {"params": free, "penalty": 0.0}], lr=rate, momentum=0.9)


def weights_of(module: nn.Module) -> list[Tensor]:
    return [value for value in module.parameters() if value.ndim >= 2]


def layer_targets(share: float, sizes: Sequence[int]) -> list[int]:
    """`share` of the weights over all layers, small layers kept denser: half of those below 500 weights."""
    small = [size // 2 if size < 500 else 0 for size in sizes]
    rest = round(share * sum(sizes)) - sum(small)
    large = sum(size for size in sizes if size >= 500)
    return [half or round(rest * size / large) for half, size in zip(small, sizes, strict=True)]


def mean_square(module: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return squared_loss(module(inputs), targets).item()


def deviation(found: Choice, goals: Sequence[int]) -> float:
    return max(abs(level - goal) / goal for level, goal in zip(found.levels, goals, strict=True))

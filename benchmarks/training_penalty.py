"""Part 3 (Shen, Wang, Xu, Yan 2024): λ for a wanted number of nonzeros, on Mackey-Glass and on an MNIST CNN."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
Masks = Sequence[tuple[Tensor, Tensor]]


def penalty_part(run: Run) -> None:
    mackey_glass(run, steps=60 if run.quick else 2000)
    convolutional(run, *((20, 3, 1000) if run.quick else (100, 10, 10_000)))


def mackey_glass(run: Run, steps: int) -> None:
    with np.load(run.options.data / "mg.npz") as file:
        inputs, targets = (torch.from_numpy(file[name]).float() for name in ("inputs", "targets"))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    data, held = (inputs[train], targets[train, None]), (inputs[test], targets[test, None])
    rate, debiasing = 0.1, steps // 4

    def descend(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, masks: Masks = ()) -> nn.Module:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count, eta_min=rate / 10)
        full = penalties_of(optimizer)
        for step in range(count):
            raise_penalties(optimizer, full, step / count)
            optimizer.zero_grad()
            squared_loss(module(data[0]), data[1]).backward()
            hold(masks)
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        squared_loss(module(data[0]), data[1]).backward()
        return module

    def fit(penalties: Sequence[float], decay: float = 0.0, start: nn.Module | None = None) -> nn.Module:
        module = copy_of(start) if start is not None else fresh(lambda: mlp(WIDTHS))
        return descend(module, proximal(module, penalties, rate, decay), steps)

    def without_penalty(module: nn.Module) -> nn.Module:
        own = copy_of(module)
        return descend(own, torch.optim.SGD(own.parameters(), lr=rate / 10, momentum=0.9), debiasing, zeros_of(own))

    total = sum(weight.numel() for weight in weights_of(mlp(WIDTHS)))
    run.say(
        f"part 3: Mackey-Glass, 1000 rows for training, 385 for test, network {'-'.join(map(str, WIDTHS))} with "
        f"{total} weights, full batch, {steps} steps a training, λ rising over the first half, momentum 0.9, "
        f"cosine rate of {rate:g}, all from one dense network; debiasing: {debiasing} steps more at a tenth of the "
        "rate without penalty, zeros held"
    )
    rows, dense, misses = [], [], []
    start = fit([0.0])

    def note(name: str, goals: str | None, module: nn.Module, trainings: int) -> list[float]:
        """A row: errors of the module, and of the module trained on without penalty."""
        pair = (module, without_penalty(module))
        errors = [mean_square(each, *part) for each in pair for part in (data, held)]
        levels = ", ".join(str(int(weight.count_nonzero())) for weight in weights_of(module))
        rows.append((name, goals, levels, *errors, trainings))
        return errors[1::2]

    for decay in (0.0, 1e-4, 3e-4, 1e-3, 2e-3):
        dense += note(f"dense, weight decay {decay:g}", None, fit([0.0], decay, start), 1)
    sparse: list[list[float]] = []
    for share in (0.1, 0.25):
        sizes = [weight.numel() for weight in weights_of(mlp(WIDTHS))]
        for name, goals, tolerance in (
            ("one λ", [round(share * total)], 0.02),
            ("λ per layer", layer_targets(share, sizes), 0.05),
        ):
            found = search(
                partial(fit, start=start), goals, high=0.01, tolerance=tolerance, most=4 if run.quick else 15
            )
            misses.append(deviation(found, goals) / tolerance)
            wanted = ", ".join(map(str, goals))
            sparse.append(note(f"{name}, {100 * share:g} %", wanted, found.solution, len(found.history)))
    columns = ("run", "wanted", "nonzeros by layer", "training MSE", "test MSE", "training, debiased", "test, debiased")
    run.table("Mackey-Glass", (*columns, "trainings"), rows)
    run.goal("mackey-glass-level", max(misses), 1.0, note="worst deviation over its tolerance, 2 % and 5 % a layer")
    for number, name in enumerate(("", "-debiased")):
        errors = [pair[number] for pair in sparse]
        run.goal(f"mackey-glass-test-mse{name}", max(errors), min(dense), note="worst sparse against best dense")
        run.goal(f"mackey-glass-test-mse-best-sparse{name}", min(errors), min(dense))


def convolutional(run: Run, per_class: int, epochs: int, tested: int) -> None:
    inputs, labels, test, test_labels = mnist(run, per_class, tested)
    inputs, test = inputs.view(-1, 1, 28, 28), test.view(-1, 1, 28, 28)
    debiasing, rate = max(1, epochs // 2), 0.02

    def descend(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, masks: Masks = ()) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        steps = count * -(-len(inputs) // 64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        full, step = penalties_of(optimizer), 0
        for _ in range(count):
            for batch in torch.randperm(len(inputs), generator=generator).split(64):
                raise_penalties(optimizer, full, step / steps)
                step += 1
                optimizer.zero_grad()
                cross_entropy(module(inputs[batch]), labels[batch]).backward()
                hold(masks)
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        cross_entropy(module(inputs), labels).backward()
        return module

    def fit(penalties: Sequence[float], start: nn.Module | None = None) -> nn.Module:
        module = copy_of(start) if start is not None else fresh(mnist_cnn)
        return descend(module, proximal(module, penalties, rate), epochs)

    def without_penalty(module: nn.Module) -> nn.Module:
        own = copy_of(module)
        return descend(own, torch.optim.SGD(own.parameters(), lr=rate / 2, momentum=0.9), debiasing, zeros_of(own))

    total = sum(weight.numel() for weight in weights_of(mnist_cnn()))
    run.say(
        f"MNIST CNN (three 3×3 convolutions, two linear layers, {total} weights), {per_class} images per class, "
        f"{epochs} epochs of batches of 64 a training, λ rising over the first half, momentum 0.9, cosine rate of "
        f"{rate:g}, all from one dense network; debiasing: {debiasing} epochs more at half the rate without penalty, "
        f"zeros held; {len(test)} test images"
    )
    start = fit([0.0])
    rows: list[tuple[str | float | int, ...]] = []

    def note(name: str, module: nn.Module, trainings: int) -> list[float]:
        later = without_penalty(module)  # the dense network too: as many steps as the sparse ones
        level = sum(int(weight.count_nonzero()) for weight in weights_of(module))
        scores = [accuracy(module, test, test_labels), accuracy(later, test, test_labels)]
        rows.append((name, level, level / total, trainings, *scores))
        return scores

    dense = max(note("dense", fit([0.0], start), 1))
    for target in (50_000, 100_000):
        found = search(partial(fit, start=start), [target], high=0.01, tolerance=0.02, most=2 if run.quick else 10)
        scores = note(f"{target} wanted", found.solution, len(found.history))
        run.goal(f"mnist-cnn-level-{target}", deviation(found, [target]), 0.02, note="relative deviation")
        for score, name in zip(scores, ("", "-debiased"), strict=True):
            run.goal(f"mnist-cnn-accuracy-{target}{name}", score, dense - 1, at_least=True, unit=" %")
    run.table("MNIST CNN", ("run", "nonzeros", "share", "trainings", "test %", "test %, debiased"), rows)


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def copy_of(module: nn.Module) -> nn.Module:
    own = copy.deepcopy(module)
    own.zero_grad()
    return own


def zeros_of(module: nn.Module) -> Masks:
    """Every weight tensor with a mask of its nonzeros."""
    return [(weight, (weight.detach() != 0).to(weight)) for weight in weights_of(module)]


def penalties_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group.get("penalty", 0.0) for group in optimizer.param_groups]


def raise_penalties(optimizer: torch.optim.Optimizer, full: list[float], part: float) -> None:
    """Every group's λ after a part of the steps: it rises over the first half."""
    for group, penalty in zip(optimizer.param_groups, full, strict=True):
        group["penalty"] = penalty * min(1.0, 2 * part)


def hold(masks: Masks) -> None:
    """Take the gradient off the weights that are zero."""
    for weight, mask in masks:
        weight.grad.mul_(mask)


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

"""Part 2 (Yang et al. 2022): active units against accuracy, by PathProx, lasso, group lasso and weight decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reporting import Run
from benchmarks.training_data import accuracy, factorized, mnist
from compress.models import mlp
from compress.training import PathProx, find_couplings, group_lasso_term, lasso_term

FACTORIZED, PLAIN = "PathProx", "PathProx, plain network"
PENALTIES = {
    FACTORIZED: (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 2.4e-2),
    PLAIN: (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 2.4e-2),
    "weight decay": (1e-3, 3e-3, 5e-3, 1e-2, 1.5e-2, 2e-2),
    "group lasso": (1e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2),
    "lasso": (2e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
}
OTHERS = ("weight decay", "group lasso", "lasso")
THRESHOLD = 1e-2  # of the layer's largest ‖w_k‖‖v_k‖: SGD on a penalty leaves units small, never zero
SHARES = (90, 50, 25)


@dataclass(frozen=True)
class Point:
    """One training: its active units and its accuracy, all in percent."""

    penalty: float
    active: float
    score: float


def sparsity_part(run: Run) -> None:
    width, per_class, epochs, tested = (30, 20, 40, 2000) if run.quick else (100, 200, 60, 10_000)
    rates = (0.2,) if run.quick else (0.1, 0.2, 0.3)
    data = mnist(run, per_class, tested)
    run.say(
        f"part 2: MLP with three hidden layers of {width} (PathProx: its factorized form, and the plain one), "
        f"{per_class} images per class, {epochs} epochs, λ rising over the first half, units below {THRESHOLD} of the "
        f"layer's largest ‖w‖‖v‖ removed, then {epochs // 4} epochs without penalty; batches of 100, momentum 0.9, "
        f"cosine rate of {', '.join(map(str, rates))}, gradients clipped to norm 1, as many λ's and steps for each "
        f"method; {len(data[2])} test images, one seed"
    )
    found: dict[str, dict[float, list[Point]]] = {}
    for method, penalties in PENALTIES.items():
        used = penalties[1::3] if run.quick else penalties
        found[method] = {rate: [train(method, each, rate, width, epochs, data) for each in used] for rate in rates}
    run.table(
        "Active units against accuracy: active units % / test %",
        ("method", "λ", *(f"rate {rate:g}" for rate in rates)),
        [
            (method, points[0].penalty, *(f"{each.active:.1f} / {each.score:.2f}" for each in points))
            for method, by_rate in found.items()
            for points in zip(*by_rate.values(), strict=True)
        ],
    )
    best = {
        method: [
            max((p.score for points in by_rate.values() for p in points if p.active <= most), default=0.0)
            for most in SHARES
        ]
        for method, by_rate in found.items()
    }
    run.table(
        "Best accuracy with at most so many active units (0: none)",
        ("method", *(f"≤ {most} %" for most in SHARES)),
        [(method, *values) for method, values in best.items()],
    )
    for number, most in enumerate(SHARES):
        other = max(best[method][number] for method in OTHERS)
        note = "" if other else "no other method got so far"
        for method, name in ((FACTORIZED, ""), (PLAIN, "-plain-network")):
            ours = best[method][number] or None
            run.goal(
                f"accuracy-at-most-{most}-percent-active{name}", ours, other, at_least=True, unit=" %",
                note=note if ours else "none got so far",
            )  # fmt: skip


def train(method: str, penalty: float, rate: float, width: int, epochs: int, data: tuple[Tensor, ...]) -> Point:
    inputs, labels, test, test_labels = data
    torch.manual_seed(0)
    module = factorized(width) if method == FACTORIZED else mlp((784, width, width, width, 10))
    layers = relu_units(module)
    term = {"lasso": lasso_term, "group lasso": group_lasso_term}.get(method)
    fit(module, optimizer_of(method, module, inputs, rate), inputs, labels, epochs, term, penalty)
    active = [products(*pair) > THRESHOLD * products(*pair).max() for pair in layers]
    masks = list(zip(layers, active, strict=True))
    silence(masks)
    plain = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    fit(module, plain, inputs, labels, epochs // 4, None, 0.0, masks)
    return Point(penalty, 100 * float(torch.cat(active).double().mean()), accuracy(module, test, test_labels))


def relu_units(module: nn.Module) -> list[tuple[nn.Linear, nn.Linear]]:
    """The linear layers before and behind each ReLU."""
    stack = [part for part in module.modules() if isinstance(part, nn.Linear | nn.ReLU)]
    return [(stack[n - 1], stack[n + 1]) for n, part in enumerate(stack) if isinstance(part, nn.ReLU)]  # type: ignore[misc]


def products(before: nn.Linear, after: nn.Linear) -> Tensor:
    """‖w_k‖‖v_k‖ (K,)."""
    return before.weight.detach().norm(dim=1) * after.weight.detach().norm(dim=0)


def silence(masks: list[tuple[tuple[nn.Linear, nn.Linear], Tensor]]) -> None:
    with torch.no_grad():
        for (_, after), active in masks:
            after.weight.mul_(active)


def optimizer_of(method: str, module: nn.Module, inputs: Tensor, rate: float) -> torch.optim.Optimizer:
    """With λ = 0, which `fit` raises."""
    if method in (FACTORIZED, PLAIN):
        couplings = find_couplings(module, inputs[:2])
        return PathProx(module.parameters(), couplings, lr=rate, penalty=0.0, momentum=0.9)
    weights = [value for value in module.parameters() if value.ndim >= 2]
    free = [value for value in module.parameters() if value.ndim < 2]
    return torch.optim.SGD([{"params": weights, "decays": method == "weight decay"}, {"params": free}], rate, 0.9)


def fit(module, optimizer, inputs, labels, epochs, term, penalty, masks=()) -> None:  # type: ignore[no-untyped-def]
    """Epochs with a rate that falls and a λ that rises over the first half; masked units stay silent."""
    generator = torch.Generator().manual_seed(0)
    steps = max(1, epochs * -(-len(inputs) // 100))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(100):
            risen = penalty * min(1.0, 2 * step / steps)
            for group in optimizer.param_groups:
                if "penalty" in group:
                    group["penalty"] = risen
                if group.get("decays"):
                    group["weight_decay"] = risen
            optimizer.zero_grad()
            loss = cross_entropy(module(inputs[batch]), labels[batch])
            if term is not None:
                loss = loss + risen * term(module)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            silence(list(masks))

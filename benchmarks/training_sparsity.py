"""Part 2 (Yang et al. 2022): active units against accuracy, by PathProx, lasso, group lasso and weight decay."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reporting import Run
from benchmarks.training_data import accuracy, factorized, mnist
from compress.models import mlp
from compress.training import Couplings, PathProx, find_couplings, group_lasso_term, lasso_term

PENALTIES = {
    "PathProx": (1e-3, 4e-3, 7e-3, 1.2e-2),
    "weight decay": (1e-3, 5e-3, 1e-2, 2e-2),
    "group lasso": (1e-3, 5e-3, 1e-2, 2e-2),
    "lasso": (3e-4, 1e-3, 2e-3, 4e-3),
}
THRESHOLD = 1e-2  # of the layer's largest ‖w_k‖‖v_k‖: SGD on a penalty leaves units small, never zero
SHARES = (90, 50, 25)


def sparsity_part(run: Run) -> None:
    width, per_class, epochs = (50, 20, 3) if run.quick else (100, 200, 10)
    inputs, labels, test, test_labels = mnist(run, per_class, 2000)
    run.say(
        f"part 2: MLP with three hidden layers of {width} (PathProx: its factorized form), {per_class} images per "
        f"class, {epochs} epochs, units below {THRESHOLD} of the layer's largest ‖w‖‖v‖ removed, then {epochs // 2} "
        "epochs without penalty; batches of 100, momentum 0.9, rate 0.05, one seed"
    )
    rows, found = [], {method: [] for method in PENALTIES}  # type: ignore[var-annotated]
    for method, penalties in PENALTIES.items():
        for penalty in penalties[1::2] if run.quick else penalties:
            torch.manual_seed(0)
            module = factorized(width) if method == "PathProx" else mlp((784, width, width, width, 10))
            couplings = find_couplings(module, inputs[:2])
            layers = relu_units(module)
            fit(module, optimizer_of(method, module, couplings, penalty), inputs, labels, epochs,
                {"lasso": lasso_term, "group lasso": group_lasso_term}.get(method), penalty)  # fmt: skip
            active = [products(*pair) > THRESHOLD * products(*pair).max() for pair in layers]
            share = 100 * float(torch.cat(active).double().mean())
            masks = list(zip(layers, active, strict=True))
            silence(masks)
            plain = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
            fit(module, plain, inputs, labels, epochs // 2, None, 0.0, masks)
            score = accuracy(module, test, test_labels)
            found[method].append((share, score))
            rows.append((method, penalty, share, score))
    run.table("Active units against accuracy", ("method", "λ", "active units %", "test %"), rows)
    best = {
        method: [max((score for share, score in pairs if share <= most), default=0.0) for most in SHARES]
        for method, pairs in found.items()
    }
    run.table(
        "Best accuracy with at most so many active units (0: none)",
        ("method", *(f"≤ {most} %" for most in SHARES)),
        [(method, *values) for method, values in best.items()],
    )
    for number, most in enumerate(SHARES):
        other = max(best[method][number] for method in ("lasso", "group lasso", "weight decay"))
        ours = best["PathProx"][number]
        note = "" if other else "no other method got so far"
        run.goal(f"accuracy-at-most-{most}-percent-active", ours or None, other, at_least=True, unit=" %", note=note)


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


def optimizer_of(method: str, module: nn.Module, couplings: Couplings, penalty: float) -> torch.optim.Optimizer:
    if method == "PathProx":
        return PathProx(module.parameters(), couplings, lr=0.05, penalty=penalty, momentum=0.9)
    decayed = [value for value in module.parameters() if value.ndim >= 2]
    free = [value for value in module.parameters() if value.ndim < 2]
    decay = penalty if method == "weight decay" else 0.0
    return torch.optim.SGD([{"params": decayed, "weight_decay": decay}, {"params": free}], lr=0.05, momentum=0.9)


def fit(module, optimizer, inputs, labels, epochs, term, penalty, masks=()) -> None:  # type: ignore[no-untyped-def]
    """Plain epochs; `term` times the penalty joins the loss, and masked units stay silent."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(100):
            optimizer.zero_grad()
            loss = cross_entropy(module(inputs[batch]), labels[batch])
            if term is not None:
                loss = loss + penalty * term(module)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            silence(list(masks))

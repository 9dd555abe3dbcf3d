"""Part 4: does weight decay make a network compress further? Trained without it, with it, and by PathProx."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reporting import Run
from benchmarks.training_data import accuracy, mnist
from compress.api import run as compress_network
from compress.models import mlp
from compress.recipe import make_recipe
from compress.training import PathProx, find_couplings

METHODS = ("no decay", "weight decay", "PathProx")
ALLOWED = 0.1  # points


def compression_part(run: Run) -> None:
    per_class, tested, epochs, seeds = (50, 1000, 3, (0,)) if run.quick else (300, 10_000, 60, (0, 1, 2))
    errors = (0.1, 0.3) if run.quick else (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08)
    width, penalty = 100, 3e-3
    run.say(
        f"part 4: MLP 784-{width}-{width}-10, {per_class} images per class, {epochs} epochs, λ {penalty:g}; then "
        f"compress.run at per-layer errors {', '.join(map(str, errors))}; the fewest parameters that lose at most "
        f"{ALLOWED} points of {tested} test images count; seeds {', '.join(map(str, seeds))}"
    )
    rows, left = [], {method: [] for method in METHODS}  # type: ignore[var-annotated]
    for seed in seeds:
        data = mnist(run, per_class, tested, seed)
        for method in METHODS:
            module = fit(method, data[0], data[1], width, penalty, epochs, seed)
            original = accuracy(module, data[2], data[3])
            best = smallest(module, data, errors, original)
            left[method].append(best[1])
            rows.append((method, seed, original, *best))
    run.table(
        f"Compressed within {ALLOWED} points", ("trained with", "seed", "test %", "error", "parameters left", "test %"),
        rows,
    )  # fmt: skip
    middle = {method: statistics.median(found) for method, found in left.items()}
    note = "median over seeds of parameters left"
    run.goal("weight-decay-compresses-further", middle["weight decay"], middle["no decay"], note=note)
    run.goal("pathprox-compresses-further", middle["PathProx"], middle["weight decay"], note=note)


def fit(method: str, inputs: Tensor, labels: Tensor, width: int, penalty: float, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = mlp((784, width, width, 10))
    rate, momentum = 0.05, 0.9
    if method == "PathProx":
        couplings = find_couplings(module, inputs[:2])
        optimizer: torch.optim.Optimizer = PathProx(
            module.parameters(), couplings, lr=rate, penalty=penalty, momentum=momentum
        )
    else:
        decayed = [value for value in module.parameters() if value.ndim >= 2]
        free = [value for value in module.parameters() if value.ndim < 2]
        decay = penalty if method == "weight decay" else 0.0
        groups = [{"params": decayed, "weight_decay": decay}, {"params": free}]
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum)
    batches = -(-len(inputs) // 100)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).split(100):
            optimizer.zero_grad()
            cross_entropy(module(inputs[batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return module.eval()


def smallest(
    module: nn.Module, data: tuple[Tensor, ...], errors: tuple[float, ...], original: float
) -> tuple[float | None, float, float]:
    """Error level, share of parameters left, accuracy: of the smallest result that loses at most `ALLOWED` points."""
    best: tuple[float | None, float, float] = (None, 1.0, original)
    total = sum(value.numel() for value in module.parameters())
    widths = [value.numel() for name, value in module.named_parameters() if name.endswith("bias")][:-1]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        torch.save(module.state_dict(), place / "network.pt")
        np.savez(place / "data.npz", inputs=data[0].numpy(), labels=data[1].numpy())
        for error in errors:
            recipe = make_recipe(
                {
                    "checkpoint": str(place / "network.pt"),
                    "arch": "compress:mlp",
                    "arch_arg": {"widths": (784, *widths, 10)},
                    "input_shape": (784,),
                    "data": f"npz:{place / 'data.npz'}",
                    "error": error,
                }
            )
            smaller = compress_network(recipe, dry_run=True).module
            share = sum(value.numel() for value in smaller.parameters()) / total
            kept = accuracy(smaller, data[2], data[3])
            if kept >= original - ALLOWED - 1e-9 and share < best[1]:
                best = (error, share, kept)
    return best

"""Part 1 (Yang et al. 2022): the weight-decay objective against steps, by PathProx and by SGD weight decay."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reporting import Run
from benchmarks.training_data import accuracy, factorized, mnist
from compress.diagnostics.lipschitz import jacobian_norms
from compress.training import Couplings, PathProx, find_couplings

SGD, BALANCED, UNIT = "SGD weight decay", "PathProx, balanced radius", "PathProx, unit sphere"
EVERY = 10


@dataclass(frozen=True, eq=False)
class Trained:
    """One training: the objective every `EVERY` steps, of the balanced network, and what came of it."""

    method: str
    rate: float
    curve: tuple[float, ...]
    active: float
    lipschitz: float
    accuracy: float
    seconds: float

    def share_to(self, value: float) -> float:
        """Share of the steps after which the objective is at most `value`; inf where it never is."""
        reached = next((number for number, found in enumerate(self.curve) if found <= value), None)
        return math.inf if reached is None else reached / (len(self.curve) - 1)


def convergence_part(run: Run) -> None:
    width, per_class, steps = (50, 10, 100) if run.quick else (100, 50, 1500)
    rates = (0.2,) if run.quick else (0.2, 0.4)
    penalty = 3e-3
    data = mnist(run, per_class, 1000 if run.quick else 10_000)
    run.say(
        f"part 1: MLP-3-{width} factorized, {per_class} images per class, full batch, {steps} steps, λ {penalty:g}, "
        f"momentum 0.9, gradients clipped to norm 1, learning rate of {', '.join(map(str, rates))} with the lowest "
        f"final objective for each method, {len(data[2])} test images, one seed"
    )
    best = {}
    for method in (SGD, BALANCED, UNIT):
        tried = [train(method, rate, width, steps, penalty, data) for rate in rates]
        best[method] = min(tried, key=lambda each: each.curve[-1])
    run.table(
        "Weight-decay objective of the balanced network at eighths of the steps",
        ("method", "rate", *(f"{number}/8" for number in range(1, 8)), "end"),
        [
            (name, found.rate, *(found.curve[(len(found.curve) - 1) * part // 8] for part in range(1, 9)))
            for name, found in best.items()
        ],
    )
    run.table(
        "At the end",
        ("method", "active units %", "median Jacobian norm", "test %", "seconds", "share of steps to SGD's end"),
        [
            (name, found.active, found.lipschitz, found.accuracy, found.seconds, found.share_to(best[SGD].curve[-1]))
            for name, found in best.items()
        ],
    )
    sgd = best[SGD]
    for name, short in ((BALANCED, "balanced-radius"), (UNIT, "unit-sphere")):
        ours, share = best[name], best[name].share_to(sgd.curve[-1])
        run.goal(f"steps-to-the-objective-of-SGD-{short}", share, 0.5, note="share of SGD's steps; inf: not reached")
        run.goal(f"time-to-the-objective-of-SGD-{short}", share * ours.seconds / sgd.seconds, 1.0)
        run.goal(f"active-units-{short}", ours.active, sgd.active, unit=" %")
        run.goal(f"median-jacobian-norm-{short}", ours.lipschitz, sgd.lipschitz)
        run.goal(f"test-accuracy-{short}", ours.accuracy, sgd.accuracy, at_least=True, unit=" %")


def train(method: str, rate: float, width: int, steps: int, penalty: float, data: tuple[Tensor, ...]) -> Trained:
    inputs, labels, test, test_labels = data
    torch.manual_seed(0)
    module = factorized(width)
    couplings = find_couplings(module, inputs[:2])
    optimizer = make_optimizer(method, module, couplings, rate, penalty)
    begin, curve = time.process_time(), []
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = cross_entropy(module(inputs), labels)
        loss.backward()
        if step % EVERY == 0:
            value = objective(couplings, module, loss.item(), penalty)
            curve.append(value if math.isfinite(value) else math.inf)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    seconds = time.process_time() - begin
    lipschitz = statistics.median(jacobian_norms(module, test[:100]).tolist())
    active = 100 * couplings.fraction_active(1e-2)
    return Trained(
        method, rate, tuple(curve), active, lipschitz, accuracy(module, test, test_labels), seconds
    )  # fmt: skip


def make_optimizer(
    method: str, module: nn.Module, couplings: Couplings, rate: float, penalty: float
) -> torch.optim.Optimizer:
    if method == SGD:
        decayed = [value for value in module.parameters() if value.ndim >= 2]
        free = [value for value in module.parameters() if value.ndim < 2]
        groups = [{"params": decayed, "weight_decay": penalty}, {"params": free}]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    radius = None if method == BALANCED else 1.0
    return PathProx(module.parameters(), couplings, lr=rate, penalty=penalty, momentum=0.9, radius=radius)


def objective(couplings: Couplings, module: nn.Module, loss: float, penalty: float) -> float:
    """loss + λ/2 Σ‖W‖² once the units of every pair are rescaled to ‖w‖ = ‖v‖, for all methods alike."""
    paired = {id(bound.tensor) for pair in couplings.pairs for bound in (*pair.inputs, *pair.outputs)}
    rest = sum(
        float(value.detach().square().sum())
        for value in module.parameters()
        if value.ndim >= 2 and id(value) not in paired
    )
    return loss + penalty / 2 * (rest + 2 * sum(float(pair.path_norm()) for pair in couplings.pairs))

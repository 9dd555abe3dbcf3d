"""Training by the theory: PathProx against SGD weight decay (part 1), and balance of real checkpoints (part 6).

    python -m benchmarks.training --data FOLDER --checkpoints FOLDER [--only 1,6]

FOLDER of the data holds mnist-{train,test}.npz. Parts are numbered as the goals of the training half; each is run at a
reduced size that its output states. Parts 2, 3, 4, 5 and 7 are not written yet and are printed as not run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.reporting import Run, start
from compress.api.balancing import balance
from compress.diagnostics.lipschitz import jacobian_norms
from compress.errors import CompressError
from compress.recipe import make_recipe
from compress.training import Couplings, PathProx, find_couplings

FILES: tuple[tuple[str, dict[str, object]], ...] = (
    ("vgg19-cifar10.pt", {}),
    ("resnet20-cifar10-wrapped.pth", {}),
    ("cnn-cifar10-sequential.pth", {"arch": "tests.strangers:SequentialCnn", "input_shape": (3, 32, 32)}),
    ("smallvgg-mnist.pt", {"arch": "tests.strangers:SmallVgg", "input_shape": (1, 28, 28)}),
    ("mlp-mnist-pickle4.pth", {"trust_pickle": True, "input_shape": (784,)}),
    ("mlp-fashion-fullmodule.pt", {"trust_pickle": True, "arch": "tests.strangers:Net", "input_shape": (1, 28, 28)}),
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--only", default="1,6", help="parts, such as 1,6")


def main() -> int:
    run = start("training", __doc__, add_options=options)
    chosen = run.options.only.split(",")
    if "1" in chosen:
        convergence_part(run)
    if "6" in chosen:
        balance_part(run)
    for name in (
        "sparsity-against-accuracy",
        "choice-of-penalty",
        "what-compresses",
        "plateau-and-forces",
        "vgg19-gpu",
    ):
        run.goal(name, None, "a table", note="no benchmark written yet")
    return run.finish()


def mnist(run: Run, per_class: int, test: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat normalised MNIST: `per_class` training images of each class, and the first `test` test images."""
    with np.load(run.options.data / "mnist-train.npz") as file:
        images, labels = file["images"], file["labels"]
    generator = np.random.default_rng(seed)
    chosen = np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)])
    with np.load(run.options.data / "mnist-test.npz") as file:
        test_images, test_labels = file["images"][:test], file["labels"][:test]
    flat = [
        torch.from_numpy((part.reshape(len(part), -1) / 255.0 - 0.1307) / 0.3081).float()
        for part in (images[chosen], test_images)
    ]
    return flat[0], torch.from_numpy(labels[chosen]).long(), flat[1], torch.from_numpy(test_labels).long()


def factorized(width: int) -> nn.Module:
    """MLP-3-K factorized as the paper's table has it: three single-hidden-layer networks in a row."""
    sizes = [(784, width, width), (width, width, width), (width, width, 10)]
    parts = [(nn.Linear(before, hidden), nn.ReLU(), nn.Linear(hidden, after)) for before, hidden, after in sizes]
    return nn.Sequential(*(part for three in parts for part in three))


def convergence_part(run: Run) -> None:
    width, per_class, steps = (100, 20, 100) if run.quick else (100, 50, 300)
    rates = (0.1,) if run.quick else (0.05, 0.1, 0.2)
    penalty, every = 3e-3, 10
    inputs, labels, test, test_labels = mnist(run, per_class, 1000)
    run.say(
        f"part 1: MLP-3-{width} factorized, {per_class} images per class, full batch, {steps} steps, λ {penalty:g}, "
        f"learning rate of {', '.join(map(str, rates))} with the lowest final objective for each method, one seed"
    )
    rows, runs = [], {}
    for method in ("SGD weight decay", "PathProx", "PathProx, published"):
        tried = []
        for rate in rates:
            torch.manual_seed(0)
            module = factorized(width)
            couplings = find_couplings(module, inputs[:2])
            optimizer = make_optimizer(method, module, couplings, rate, penalty)
            begin, curve = time.perf_counter(), []
            for step in range(steps + 1):
                optimizer.zero_grad()
                loss = cross_entropy(module(inputs), labels)
                loss.backward()
                if step % every == 0:
                    curve.append(objective(couplings, module, loss.item(), penalty))
                optimizer.step()
            last = curve[-1] if math.isfinite(curve[-1]) else math.inf
            tried.append((last, rate, curve, module, couplings, time.perf_counter() - begin))
        final, rate, curve, module, couplings, seconds = min(tried, key=lambda each: each[0])
        lipschitz = statistics.median(jacobian_norms(module, test[:50]).tolist())
        with torch.no_grad():
            accuracy = 100 * (module(test).argmax(1) == test_labels).double().mean().item()
        active = 100 * couplings.fraction_active(1e-4)
        runs[method] = (curve, lipschitz, accuracy, active, seconds)
        quarters = (curve[(len(curve) - 1) * part // 4] for part in (1, 2, 3))
        rows.append((method, rate, *quarters, final, active, lipschitz, accuracy, seconds))
    run.table(
        "Weight-decay objective of the balanced network at quarters of the steps",
        ("method", "rate", "1/4", "1/2", "3/4", "end", "active units %", "median Jacobian norm", "test %", "seconds"),
        rows,
    )
    ours, sgd = runs["PathProx"], runs["SGD weight decay"]
    reached = next((number for number, value in enumerate(ours[0]) if value <= sgd[0][-1]), None)
    share = math.inf if reached is None else reached / (len(sgd[0]) - 1)
    run.goal("steps-to-the-objective-of-SGD", share, 0.5, note="share of SGD's steps; inf: not reached")
    run.goal("time-to-the-objective-of-SGD", share * ours[4] / sgd[4], 1.0, note="share of SGD's time")
    run.goal("active-units", ours[3], sgd[3], unit=" %")
    run.goal("median-jacobian-norm", ours[1], sgd[1])
    run.goal("test-accuracy", ours[2], sgd[2], at_least=True, unit=" %")


def make_optimizer(
    method: str, module: nn.Module, couplings: Couplings, rate: float, penalty: float
) -> torch.optim.Optimizer:
    if method.startswith("SGD"):
        decayed = [value for value in module.parameters() if value.ndim >= 2]
        free = [value for value in module.parameters() if value.ndim < 2]
        return torch.optim.SGD([{"params": decayed, "weight_decay": penalty}, {"params": free}], lr=rate)
    published = method.endswith("published")
    return PathProx(module.parameters(), couplings, lr=rate, penalty=penalty, published=published)


def objective(couplings: Couplings, module: nn.Module, loss: float, penalty: float) -> float:
    """loss + λ/2 Σ‖W‖² once the units of every pair are rescaled to ‖w‖ = ‖v‖, for all methods alike."""
    paired = {id(bound.tensor) for pair in couplings.pairs for bound in (*pair.inputs, *pair.outputs)}
    rest = sum(
        float(value.detach().square().sum())
        for value in module.parameters()
        if value.ndim >= 2 and id(value) not in paired
    )
    return loss + penalty / 2 * (rest + 2 * sum(float(pair.path_norm()) for pair in couplings.pairs))


def balance_part(run: Run) -> None:
    run.say("part 6: every shared checkpoint that can be read, whole; noise as inputs")
    rows, worst, grown = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, more) in enumerate(FILES):
            recipe = make_recipe({"checkpoint": str(run.options.checkpoints / name), **more})
            try:
                found = balance(recipe, output=f"{scratch}/{number}.safetensors")
            except CompressError as error:
                rows.append((name, str(error)[:60], None, None, None, None))
                worst = math.inf
                continue
            worst, grown = max(worst, found["deviation"]), max(grown, found["factor"])
            before, after = found["sum_of_squares"]
            rows.append((name, f"{len(found['layers'])} layers", before, after, found["factor"], found["deviation"]))
    run.table("Balance", ("file", "rescaled", "sum of squares", "after", "factor", "output deviation"), rows)
    run.goal("balance-output-deviation", worst, 1e-5)
    run.goal("balance-sum-of-squares-factor", grown, 1.0, note="the largest")


if __name__ == "__main__":
    raise SystemExit(main())

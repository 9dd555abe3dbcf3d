"""Training by the theory, in parts numbered as the goals of the training half; files `training_*.py` hold them.

    python -m benchmarks.training --data FOLDER --checkpoints FOLDER [--only 1,2,3,4,5,6]

FOLDER of the data holds mnist-{train,test}.npz and mg.npz. 1: PathProx against SGD weight decay. 2: sparsity against
accuracy. 3: λ for a wanted sparsity. 4: what compresses. 5: plateau and forces. 6: balance of real checkpoints. Each
runs at a reduced size that its output states. Part 7 (VGG-19) needs a GPU and is printed as not run.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from benchmarks.reporting import Run, start
from benchmarks.training_compression import compression_part
from benchmarks.training_convergence import convergence_part
from benchmarks.training_penalty import penalty_part
from benchmarks.training_plateau import plateau_part
from benchmarks.training_sparsity import sparsity_part
from compress.api.balancing import balance
from compress.errors import CompressError
from compress.recipe import make_recipe

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
    parser.add_argument("--only", default="1,2,3,4,5,6", help="parts, such as 1,6")


def main() -> int:
    run = start("training", __doc__, add_options=options)
    chosen = run.options.only.split(",")
    for number, part in PARTS.items():
        if number in chosen:
            part(run)
    run.goal("vgg19-gpu", None, "a table", note="needs a GPU")
    return run.finish()


def balance_part(run: Run) -> None:
    files = FILES[2:] if run.quick else FILES
    run.say(f"part 6: {len(files)} of the {len(FILES)} shared checkpoints that can be read, whole; noise as inputs")
    rows, worst, grown = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, more) in enumerate(files):
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


PARTS = {
    "1": convergence_part,
    "2": sparsity_part,
    "3": penalty_part,
    "4": compression_part,
    "5": plateau_part,
    "6": balance_part,
}


if __name__ == "__main__":
    raise SystemExit(main())

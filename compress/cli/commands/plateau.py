"""`compress plateau`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from compress.cli.options import Json, print_json
from compress.cli.takes import takes
from compress.recipe import Recipe

Widths = Annotated[str, Option(metavar="COUNT,…", help="Widths to train.")]
Layers = Annotated[int, Option(metavar="COUNT", help="Linear layers, 2 or more.", min=2)]
Samples = Annotated[int, Option(metavar="COUNT", help="At most so many samples, the first ones.", min=2)]
Penalty = Annotated[float, Option(metavar="NUMBER", help="λ of the weight decay, in λ/2 Σ‖W‖².", min=0)]
Steps = Annotated[int, Option(metavar="COUNT", help="Full-batch steps for each net.", min=1)]
Seeds = Annotated[int, Option(metavar="COUNT", help="Nets for each width; the best one counts.", min=1)]


@takes(
    "data", "mean", "std", "training.loss",
    without=("eval", "resize", "crop", "calibration_samples", "held_back", "batch_size"),
    argument="nothing", required=("data",), help_texts={"data": "Training data with labels or targets."},
)  # fmt: skip
def plateau_command(
    recipe: Recipe,
    *,
    widths: Widths = "1,2,4,8,16,32",
    layers: Layers = 2,
    samples: Samples = 500,
    penalty: Penalty = 1e-3,
    steps: Steps = 1000,
    seeds: Seeds = 1,
    as_json: Json = False,
) -> None:
    """Train small nets over widths and say where the loss plateaus: `compress plateau --data digits`."""
    from compress.api import plateau
    from compress.cli.showing.progress import StderrProgress
    from compress.cli.showing.training_tables import show_plateau

    with StderrProgress() as progress:
        measured = plateau(
            recipe, widths, layers=layers, samples=samples, penalty=penalty, steps=steps, seeds=seeds, progress=progress
        )
    if as_json:
        print_json(measured)
    else:
        show_plateau(measured)

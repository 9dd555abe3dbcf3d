"""`compress train`."""

from __future__ import annotations

from compress.cli.options import Json, Resume, print_json
from compress.cli.takes import takes
from compress.recipe import Recipe


@takes(
    "arch", "arch_arg", "data", "training", "output", "seed", "device",
    without=("resize", "crop", "calibration_samples", "held_back", "batch_size", "export"),
    argument="recipe",
    help_texts={"data": "Training data with labels or targets."},
    defaults={"output": "RECIPE-trained", "arch": ""},
)  # fmt: skip
def train_command(recipe: Recipe, *, resume: Resume = False, as_json: Json = False) -> None:
    """Train a network as a recipe says: `compress train recipes/digits-train.yaml --method pathprox --output net`.

    The folder written holds model.safetensors, which every other command takes, and training.json. Exit codes: 0 done,
    1 a fault in input or run, 2 usage, 3 the wanted sparsity was not reached, 5 architecture not supported, 130
    interrupted (--resume goes on).
    """
    from compress.api.training import train
    from compress.cli.showing.progress import StderrProgress
    from compress.cli.showing.training_tables import show_training

    with StderrProgress() as progress:
        result = train(recipe, progress, resume=resume)
    if as_json:
        print_json(result.report.to_json())
    else:
        show_training(result.report, result.folder)

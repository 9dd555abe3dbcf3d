"""`compress finetune`."""

from __future__ import annotations

from compress.cli.options import Json, Resume, print_json
from compress.cli.takes import takes
from compress.recipe import Recipe


@takes(
    "network", "data", "training", "output", "seed", "device",
    without=("calibration_samples", "held_back", "batch_size", "export"),
    help_texts={"data": "Training data with labels or targets."},
    defaults={"output": "FILE-finetuned"},
)  # fmt: skip
def finetune_command(recipe: Recipe, *, resume: Resume = False, as_json: Json = False) -> None:
    """Train a network on, with labels: `compress finetune OUT --data train.npz --method pathprox --epochs 2`.

    FILE is a checkpoint, or a folder written by a run, whose smaller shapes it keeps. Exit codes: 0 done, 1 a fault in
    input or run, 2 usage, 3 the wanted sparsity was not reached, 5 architecture or file not supported, 130 interrupted
    (--resume goes on).
    """
    from compress.api import finetune
    from compress.cli.showing.progress import StderrProgress
    from compress.cli.showing.training_tables import show_training

    with StderrProgress() as progress:
        result = finetune(recipe, progress, resume=resume)
    if as_json:
        print_json(result.report.to_json())
    else:
        show_training(result.report, result.folder)

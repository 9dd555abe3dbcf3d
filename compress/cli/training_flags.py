"""Options of `train` and `finetune`: a recipe's `training` section on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from typer import Option

from compress.cli.options import OUTPUT
from compress.recipe import TrainingOptions

TRAINING = "Training"

MethodFlag = Annotated[
    str | None, Option("--method", help="sgd (weight decay), pathprox, lasso, group_lasso or l1.",
                       rich_help_panel=TRAINING)
]  # fmt: skip
Loss = Annotated[
    str | None,
    Option("--loss", help="cross_entropy (classes), squared or poisson (also real targets).", rich_help_panel=TRAINING),
]
Epochs = Annotated[int | None, Option(help="Passes over the training samples.", rich_help_panel=TRAINING)]
TrainBatch = Annotated[int | None, Option("--train-batch-size", help="Samples of one step.", rich_help_panel=TRAINING)]
Rate = Annotated[float | None, Option("--lr", help="Largest learning rate.", rich_help_panel=TRAINING)]
Penalty = Annotated[float | None, Option(help="λ of the method.", rich_help_panel=TRAINING)]
Debias = Annotated[int | None, Option(help="Epochs at the end without penalty, zeros held.", rich_help_panel=TRAINING)]
Ramp = Annotated[float | None, Option(help="Epochs over which λ rises from 0.", rich_help_panel=TRAINING)]
Patience = Annotated[
    int | None, Option(help="Stop after so many epochs without a lower validation loss.", rich_help_panel=TRAINING)
]
Half = Annotated[bool | None, Option("--half", help="Forward pass in bfloat16.", rich_help_panel=TRAINING)]
TargetSparsity = Annotated[
    float | None, Option(help="Find the λ of l1 that makes this share of the weights zero.", rich_help_panel=TRAINING)
]
TargetNonzeros = Annotated[
    int | None, Option(help="Find the λ of l1 that leaves so many weights.", rich_help_panel=TRAINING)
]
PerLayer = Annotated[
    bool | None, Option("--per-layer", help="A λ for each layer, each to reach the share.", rich_help_panel=TRAINING)
]
Trainings = Annotated[int | None, Option(help="Trainings at most in the search for λ.", rich_help_panel=TRAINING)]
Resume = Annotated[
    bool, Option("--resume", help="Go on where a killed training stopped (OUT.state).", rich_help_panel=OUTPUT)
]
Target = Annotated[str | None, Option("--output", "-o", help="Folder to write.", rich_help_panel=OUTPUT)]
Force = Annotated[
    bool | None, Option("--force", help="Replace a folder, or a state, written before.", rich_help_panel=OUTPUT)
]

SECTION = (
    "A recipe's `training` section holds: "
    + ", ".join(
        f"{name} ({field.description})" if field.description else name
        for name, field in TrainingOptions.model_fields.items()
    )
    + "."
)
NAMES = {"train_batch_size": "batch_size"}
FLAGS = (
    "method", "loss", "epochs", "train_batch_size", "lr", "penalty", "ramp", "debias", "patience", "half",
    "target_sparsity", "target_nonzeros", "per_layer", "trainings",
)  # fmt: skip


def gather_training(options: Mapping[str, Any], flags: Sequence[str] = FLAGS) -> dict[str, Any]:
    """The options with those named by `flags` put into a section `training`; None where none was given."""
    rest = {name: value for name, value in options.items() if name not in flags}
    section = {NAMES.get(name, name): options[name] for name in flags if options.get(name) is not None}
    return {**rest, "training": section or None}

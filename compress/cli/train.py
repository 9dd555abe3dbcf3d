"""`compress train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from compress.cli.app import app
from compress.cli.options import Arch, ArchArg, Data, Device, Eval, Json, Mean, Seed, Std, print_json, resolve_recipe
from compress.cli.training_flags import (
    SECTION,
    Debias,
    Epochs,
    Force,
    Half,
    Loss,
    MethodFlag,
    Patience,
    Penalty,
    PerLayer,
    Ramp,
    Rate,
    Resume,
    Target,
    TargetNonzeros,
    TargetSparsity,
    TrainBatch,
    Trainings,
    gather_training,
)


@app.command("train", epilog=SECTION)
def train_command(
    recipe: Annotated[str, Argument(help="YAML with arch, data and a training section (recipes/).")],
    data: Data = None,
    eval_data: Eval = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    mean: Mean = None,
    std: Std = None,
    method: MethodFlag = None,
    loss: Loss = None,
    epochs: Epochs = None,
    train_batch_size: TrainBatch = None,
    lr: Rate = None,
    penalty: Penalty = None,
    ramp: Ramp = None,
    debias: Debias = None,
    patience: Patience = None,
    half: Half = None,
    target_sparsity: TargetSparsity = None,
    target_nonzeros: TargetNonzeros = None,
    per_layer: PerLayer = None,
    trainings: Trainings = None,
    seed: Seed = None,
    device: Device = None,
    output: Target = None,
    force: Force = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a network as a recipe says: `compress train recipes/digits-train.yaml --method pathprox --output net`.

    The folder written holds model.safetensors, which every other command takes, and training.json. Exit codes: 0 done,
    1 a fault in input or run, 2 usage, 3 the wanted sparsity was not reached, 5 architecture not supported, 130
    interrupted (--resume goes on).
    """
    options = gather_training(locals())
    for name in ("recipe", "as_json", "resume"):
        del options[name]
    options["file"] = ""
    if output is None:
        options["output"] = f"{Path(recipe).stem}-trained"
    resolved = resolve_recipe(options, recipe)
    from compress.api.training import train
    from compress.cli.display import StderrProgress
    from compress.cli.training_tables import show_training

    with StderrProgress() as progress:
        result = train(resolved, progress, resume=resume)
    if as_json:
        print_json(result.report)
    else:
        show_training(result.report, result.folder)

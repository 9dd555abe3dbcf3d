"""`compress finetune`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from compress.cli.app import app
from compress.cli.options import (
    Arch,
    ArchArg,
    Crop,
    Data,
    Device,
    Eval,
    InputShape,
    Json,
    Mean,
    RecipeFile,
    Resize,
    Seed,
    StateKey,
    Std,
    Trust,
    print_json,
    resolve_recipe,
)
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


@app.command("finetune", epilog=SECTION)
def finetune_command(
    file: Annotated[str, Argument(help="Checkpoint, or a folder that a run wrote.", show_default=False)],
    data: Data = None,
    eval_data: Eval = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    state_key: StateKey = None,
    trust_pickle: Trust = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
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
    recipe: RecipeFile = None,
    output: Target = None,
    force: Force = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a network on, with labels: `compress finetune OUT --data train.npz --method pathprox --epochs 2`.

    FILE is a checkpoint, or a folder written by a run, whose smaller shapes it keeps. Exit codes: 0 done, 1 a fault in
    input or run, 2 usage, 3 the wanted sparsity was not reached, 5 architecture or file not supported, 130 interrupted
    (--resume goes on).
    """
    options = gather_training(locals())
    for name in ("recipe", "as_json", "resume"):
        del options[name]
    resolved = resolve_recipe(options, recipe)
    from compress.api.training import finetune
    from compress.cli.display import StderrProgress
    from compress.cli.training_tables import show_training

    with StderrProgress() as progress:
        result = finetune(resolved, progress, resume=resume)
    if as_json:
        print_json(result.report)
    else:
        show_training(result.report, result.folder)

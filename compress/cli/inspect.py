"""`compress inspect`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from compress.cli.app import app
from compress.cli.options import (
    Arch,
    ArchArg,
    BatchSize,
    Couple,
    Crop,
    Data,
    Device,
    Exclude,
    File,
    InputShape,
    Json,
    Layer,
    Mean,
    Memory,
    RecipeFile,
    Resize,
    Samples,
    Seed,
    StateKey,
    Std,
    Trust,
    print_json,
    resolve_recipe,
)


@app.command("inspect")
def inspect_command(
    file: File,
    data: Data = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    state_key: StateKey = None,
    trust_pickle: Trust = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    calibration_samples: Samples = None,
    batch_size: BatchSize = None,
    layer: Layer = None,
    exclude: Exclude = None,
    couple: Couple = None,
    seed: Seed = None,
    device: Device = None,
    memory: Memory = None,
    recipe: RecipeFile = None,
    deep: Annotated[
        bool, Option("--deep", help="Also spectra, representation cost, forces, aligned units, Jacobian norms.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what could be compressed: `compress inspect vgg19.pt --data train.npz`. Nothing is solved or written."""
    options = dict(locals())
    for name in ("recipe", "as_json", "deep"):
        del options[name]
    resolved = resolve_recipe(options, recipe)
    from compress.api import inspect
    from compress.cli.display import StderrProgress, show_inspection
    from compress.cli.training_tables import show_depth

    with StderrProgress() as progress:
        found = inspect(resolved, progress, deep=deep)
    if as_json:
        print_json(found)
    else:
        show_inspection(found)
        if deep:
            show_depth(found)

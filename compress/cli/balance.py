"""`compress balance`."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Option

from compress.cli.app import app
from compress.cli.options import (
    OUTPUT,
    Arch,
    ArchArg,
    Data,
    Device,
    File,
    InputShape,
    Json,
    Mean,
    RecipeFile,
    Seed,
    StateKey,
    Std,
    Trust,
    print_json,
    resolve_recipe,
)


@app.command("balance")
def balance_command(
    file: File,
    data: Data = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    state_key: StateKey = None,
    trust_pickle: Trust = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = None,
    device: Device = None,
    recipe: RecipeFile = None,
    per: Annotated[Literal["unit", "layer"], Option(help="One factor for each unit, or for a whole layer.")] = "unit",
    output: Annotated[
        str | None, Option(help="File to write; default: FILE-balanced.safetensors.", rich_help_panel=OUTPUT)
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace an existing file.", rich_help_panel=OUTPUT)] = False,
    as_json: Json = False,
) -> None:
    """Rescale every unit so that ‖w‖ = ‖v‖, same outputs: `compress balance net.pt --output balanced.safetensors`."""
    options = dict(locals())
    for name in ("recipe", "as_json", "per", "output", "force"):
        del options[name]
    resolved = resolve_recipe(options, recipe)
    from compress.api.balancing import balance
    from compress.cli.display import StderrProgress
    from compress.cli.training_tables import show_balance

    with StderrProgress() as progress:
        found = balance(resolved, per=per, output=output, force=force, progress=progress)
    if as_json:
        print_json(found)
    else:
        show_balance(found)

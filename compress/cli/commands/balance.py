"""`compress balance`."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Option

from compress.cli.options import Json, print_json
from compress.cli.takes import takes
from compress.recipe import Recipe

Per = Annotated[Literal["unit", "layer"], Option(metavar="unit|layer", help="One factor a unit, or a layer.")]


@takes(
    "network", "data", "mean", "std", "seed", "device", "output", "force",
    without=("eval", "resize", "crop", "calibration_samples", "held_back", "batch_size"),
    help_texts={"data": "Data to compare the outputs on; else seeded noise.", "output": "File to write."},
    defaults={"output": "FILE-balanced.safetensors"},
)  # fmt: skip
def balance_command(recipe: Recipe, *, per: Per = "unit", as_json: Json = False) -> None:
    """Rescale every unit so that ‖w‖ = ‖v‖, same outputs: `compress balance net.pt --output balanced.safetensors`."""
    from compress.api.balancing import balance
    from compress.cli.showing.progress import StderrProgress
    from compress.cli.showing.training_tables import show_balance

    with StderrProgress() as progress:
        balanced = balance(recipe, per=per, output=recipe.output, force=recipe.force, progress=progress)
    if as_json:
        print_json(balanced)
    else:
        show_balance(balanced)

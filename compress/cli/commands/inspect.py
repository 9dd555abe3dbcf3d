"""`compress inspect`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from compress.cli.options import Json, print_json
from compress.cli.takes import takes
from compress.recipe import Recipe

Deep = Annotated[
    bool, Option("--deep", help="Also spectra, representation cost, forces, aligned units, Jacobian norms.")
]


@takes("network", "data", "which layers", "machine", "rank_tolerance", without=("eval", "held_back"))
def inspect_command(recipe: Recipe, *, deep: Deep = False, as_json: Json = False) -> None:
    """Show what could be compressed: `compress inspect vgg19.pt --data train.npz`. Nothing is solved or written."""
    from compress.api import inspect
    from compress.cli.showing.display import show_inspection
    from compress.cli.showing.progress import StderrProgress
    from compress.cli.showing.training_tables import show_depth

    with StderrProgress() as progress:
        inspection = inspect(recipe, progress=progress, deep=deep)
    if as_json:
        print_json(inspection)
    else:
        show_inspection(inspection)
        if deep:
            show_depth(inspection)

"""`compress evaluate`."""

from __future__ import annotations

from compress.cli.options import Json, print_json
from compress.cli.takes import takes
from compress.recipe import Recipe


@takes("eval", "arch", "trust_code", "batch_size", "device", argument="folder", required=("eval",))
def evaluate_command(recipe: Recipe, *, as_json: Json = False) -> None:
    """Measure a written artifact again: `compress evaluate OUT --eval test.npz`."""
    from compress.api import evaluate
    from compress.cli.showing.display import show_evaluation
    from compress.cli.showing.progress import StderrProgress

    with StderrProgress() as progress:
        scores = evaluate(
            recipe.checkpoint,
            recipe.eval or "",
            batch_size=recipe.batch_size,
            device=recipe.device,
            arch=recipe.arch,
            trust_code=recipe.trust_code,
            progress=progress,
        )
    if as_json:
        print_json(scores)
    else:
        show_evaluation(scores)

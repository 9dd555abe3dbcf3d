"""`compress evaluate`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from compress.cli.app import app
from compress.cli.options import Json, print_json


@app.command("evaluate")
def evaluate_command(
    folder: Annotated[str, Argument(help="Folder written by a run.", show_default=False)],
    eval_data: Annotated[str, Option("--eval", help="Evaluation data, as for a run.")],
    batch_size: Annotated[int, Option(help="Samples per batch.")] = 128,
    device: Annotated[str, Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a written artifact again: `compress evaluate OUT --eval test.npz`."""
    from compress.api import evaluate
    from compress.cli.display import StderrProgress, show_evaluation

    with StderrProgress() as progress:
        found = evaluate(folder, eval_data, batch_size=batch_size, device=device, progress=progress)
    if as_json:
        print_json(found)
    else:
        show_evaluation(found)

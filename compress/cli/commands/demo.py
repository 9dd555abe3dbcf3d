"""`compress demo`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from compress.cli.options import Json, print_json


def demo_command(
    output: Annotated[str, Option("--output", "-o", metavar="FOLDER", help="Folder to write.")] = "compress-demo",
    force: Annotated[bool, Option("--force", help="Replace a folder written before.")] = False,
    as_json: Json = False,
) -> None:
    """Compress the packaged digits network, from file to report: `compress demo`. Needs no network access."""
    from compress.api import demo_recipe, run
    from compress.cli.showing.display import show_run
    from compress.cli.showing.progress import StderrProgress

    with StderrProgress() as progress:
        result = run(demo_recipe(output, force=force), progress)
    assert result.report is not None, "one process runs the demo"
    if as_json:
        print_json(result.report.to_json())
    else:
        show_run(result.report, result.folder)

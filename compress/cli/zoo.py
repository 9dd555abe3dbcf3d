"""`compress zoo`."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from compress.cli.app import app
from compress.cli.options import HOW, OUTPUT, Json, print_json


@app.command("zoo")
def zoo_command(
    sources: Annotated[list[str], Argument(help="A zoo file (.yaml), or checkpoints and globs.", show_default=False)],
    recipe: Annotated[str | None, Option(help="YAML with the options that all models share.")] = None,
    output: Annotated[
        str | None, Option("--output", "-o", help="Folder of the run (zoo).", rich_help_panel=OUTPUT)
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --output.", rich_help_panel=OUTPUT)] = False,
    jobs: Annotated[int | None, Option(help="Models at once (cores, within memory).", rich_help_panel=HOW)] = None,
    threads: Annotated[int | None, Option(help="Threads of each model (cores / jobs).", rich_help_panel=HOW)] = None,
    timeout: Annotated[float | None, Option(help="Seconds that one model may take.", rich_help_panel=HOW)] = None,
    job_memory: Annotated[
        str | None, Option(help="Memory that one model is expected to take, such as 2G.", rich_help_panel=HOW)
    ] = None,
    backend: Annotated[str | None, Option(help="local, ray or slurm.", rich_help_panel=HOW)] = None,
    shard: Annotated[
        str | None, Option(help="Only part i of n, such as 2/4, beside the others.", rich_help_panel=HOW)
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress many models, each in its own process: `compress zoo ZOO.yaml`, `compress zoo 'nets/*.pt' --recipe R`.

    Exit code 0: all passed; 3: a gate failed; 1: a model failed. The reasons are in summary.json and index.html.
    """
    from compress.cli.display_zoo import LiveZoo, show_zoo
    from compress.zoo import Shard, plan_zoo, run_zoo

    part = Shard.parse(shard) if shard else None
    plan = plan_zoo(
        sources,
        recipe=recipe,
        output=output,
        jobs=jobs,
        threads=threads,
        timeout=timeout,
        job_memory=job_memory,
        backend=backend,
    )
    with LiveZoo() as display:
        found = run_zoo(plan, resume=resume, shard=part, display=display)
    if as_json:
        print_json(found)
    else:
        show_zoo(found)
    raise typer.Exit(found["exit_code"])

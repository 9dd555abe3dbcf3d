"""`compress zoo`."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from compress.cli.options import Json, print_json

Sources = Annotated[
    list[str], Argument(metavar="ZOO.yaml|FILE...", help="A zoo file, or checkpoints and globs.", show_default=False)
]
Shared = Annotated[str | None, Option("--recipe", metavar="FILE", help="YAML with the options that all models share.")]
Output = Annotated[str | None, Option("--output", "-o", metavar="FOLDER", help="Folder of the run. Default: zoo.")]
GoOn = Annotated[bool, Option("--resume", help="Go on with the run in --output.")]
Jobs = Annotated[int | None, Option(metavar="COUNT", help="Models at once. Default: cores, within memory.")]
Threads = Annotated[int | None, Option(metavar="COUNT", help="Threads of each model. Default: cores / jobs.")]
Timeout = Annotated[float | None, Option(metavar="SECONDS", help="Seconds that one model may take.")]
JobMemory = Annotated[str | None, Option(metavar="SIZE", help="Memory that one model is expected to take, such as 2G.")]
Where = Annotated[str | None, Option(metavar="local|ray|slurm", help="Where the models run. Default: local.")]
Part = Annotated[str | None, Option(metavar="i/n", help="Only part i of n, beside the others.")]


def zoo_command(
    sources: Sources,
    recipe: Shared = None,
    output: Output = None,
    resume: GoOn = False,
    jobs: Jobs = None,
    threads: Threads = None,
    timeout: Timeout = None,
    job_memory: JobMemory = None,
    backend: Where = None,
    shard: Part = None,
    as_json: Json = False,
) -> None:
    """Compress many models, each in its own process: `compress zoo ZOO.yaml`, `compress zoo 'nets/*.pt' --recipe R`.

    Exit code 0: all passed; 3: a gate failed; 1: a model failed. The reasons are in summary.json and index.html.
    """
    from compress.cli.showing.display_zoo import LiveZoo, show_zoo
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
        summary = run_zoo(plan, resume=resume, shard=part, display=display)
    if as_json:
        print_json(summary)
    else:
        show_zoo(summary)
    raise typer.Exit(summary["exit_code"])

"""`compress verify`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from compress.cli.app import app
from compress.cli.options import Json, print_json
from compress.cli.pipelines import Github, Junit, told_to_pipelines


@app.command("verify")
def verify_command(
    folder: Annotated[str, Argument(help="Folder written by a run.", show_default=False)],
    eval_data: Annotated[str | None, Option("--eval", help="Evaluation data, as for a run.")] = None,
    max_drop: Annotated[float | None, Option(min=0, help="Gate: points of accuracy that may be lost.")] = None,
    tolerance: Annotated[float, Option(min=0, help="Points by which accuracy may differ from the report's.")] = 0.1,
    batch_size: Annotated[int, Option(min=1, help="Samples per batch.")] = 128,
    device: Annotated[str, Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Json = False,
    github: Github = False,
    junit: Junit = None,
) -> None:
    """Check an artifact again before it ships: `compress verify OUT --eval test.npz`. Exit code 3 on a mismatch."""
    with told_to_pipelines("compress verify", github, junit) as outcome:
        from compress.api.verifying import verify
        from compress.cli.display import StderrProgress, show_checks
        from compress.errors import GateError
        from compress.report.checks import Check, checks_markdown, failures

        with StderrProgress() as progress:
            found = verify(
                folder,
                eval_data,
                max_drop=max_drop,
                tolerance=tolerance,
                batch_size=batch_size,
                device=device,
                progress=progress,
            )
        checks = [Check(**check) for check in found["checks"]]
        outcome.checks = checks
        outcome.headline = f"{folder}: {len(checks)} checks passed."
        outcome.markdown = checks_markdown(folder, checks)
        outcome.outputs = {"folder": folder}
        if as_json:
            print_json(found)
        else:
            show_checks(checks, found["latency"])
        failed = failures(checks)
        if failed:
            raise GateError(f"{'; '.join(check.message for check in failed)}.")

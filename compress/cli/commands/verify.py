"""`compress verify`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from compress.cli.options import Json, print_json
from compress.cli.pipelines import Outcome, tells_pipelines
from compress.cli.takes import takes
from compress.recipe import Recipe

Tolerance = Annotated[
    float, Option(metavar="POINTS", min=0, help="Points by which accuracy may differ from the report's.")
]


@tells_pipelines("compress verify")
@takes("eval", "max_drop", "force_gate", "arch", "trust_code", "batch_size", "device", argument="folder")
def verify_command(recipe: Recipe, *, outcome: Outcome, tolerance: Tolerance = 0.1, as_json: Json = False) -> None:
    """Check an artifact again before it ships: `compress verify OUT --eval test.npz`. Exit code 3 on a mismatch."""
    from compress.api import verify
    from compress.cli.pipelines import describe_checks
    from compress.cli.showing.display import show_checks
    from compress.cli.showing.progress import StderrProgress
    from compress.errors import GateError
    from compress.report.checks import failures

    with StderrProgress() as progress:
        verified = verify(
            recipe.checkpoint,
            recipe.eval,
            max_drop=recipe.max_drop,
            force_gate=recipe.force_gate,
            tolerance=tolerance,
            batch_size=recipe.batch_size,
            device=recipe.device,
            arch=recipe.arch,
            trust_code=recipe.trust_code,
            progress=progress,
        )
    describe_checks(outcome, recipe.checkpoint, verified.checks)
    if as_json:
        print_json(verified.to_json())
    else:
        show_checks(verified.checks, verified.latency)
    failed = failures(verified.checks)
    if failed:
        raise GateError(f"{'; '.join(check.message for check in failed)}.")

"""`compress run`."""

from __future__ import annotations

from compress.cli.options import DryRun, Json, Profile, Resume, print_json
from compress.cli.pipelines import Outcome, describe_run, tells_pipelines
from compress.cli.takes import takes
from compress.recipe import Recipe


@tells_pipelines("compress")
@takes(
    "network", "data", "which layers", "how wide", "after the cut", "output", "machine", "solving",
    "training.epochs", "training.lr", "training.loss",
    argument="optional", training_of="finetune",
)  # fmt: skip
def run_command(
    recipe: Recipe,
    *,
    outcome: Outcome,
    dry_run: DryRun = False,
    resume: Resume = False,
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Compress a checkpoint: `compress vgg19.pt --layer classifier --data train.npz --eval test.npz`."""
    from compress.api import run
    from compress.cli.showing.display import show_run
    from compress.cli.showing.progress import StderrProgress
    from compress.profiling import profiled

    with StderrProgress() as progress, profiled(progress, profile) as watched:
        result = run(recipe, watched, dry_run=dry_run, resume=resume)
    if result.report is None:  # under torchrun the first process says it all
        return
    if outcome.wanted:
        describe_run(outcome, result.report, result.folder)
    if as_json:
        print_json(result.report.to_json())
    else:
        show_run(result.report, result.folder)

"""The main job: a checkpoint in, a smaller checkpoint and an accuracy report out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.api.cautions import caution_layers, caution_samples
from compress.api.cutting import make_cut
from compress.api.measuring import loses_too_much, measure_costs
from compress.api.tuning import check_finetuning
from compress.api.widths import check_widths, choose_widths, layer_options, make_problem
from compress.api.writing import describe_inputs, fingerprint, write_run
from compress.artifact.exports import check_exports
from compress.artifact.folder import versions
from compress.atomic import reserved
from compress.compression.resume import RunState
from compress.compression.search import certify_widths, milder_search, search_report
from compress.demo import DEMO_OPTIONS
from compress.errors import GateError, RecipeError
from compress.preparation import prepare
from compress.progress import Portion, Progress, SilentProgress, Stages
from compress.recipe import Recipe, make_recipe
from compress.recording.sharing import Share, local_device, process_group
from compress.report.checks import check_gates, failures
from compress.report.markdown import cost_report, evaluation_report

STATE_SUFFIX = ".state"  # of the folder beside the output that a resumable run keeps its state in
COMPRESSING, MEASURING = (0.1, 0.7), 0.85  # expected shares of a run's time that are over at the beginning, and the end
MOST_EVALUATIONS = 4  # an accuracy bound may step back so often when evaluation disagrees with held-back samples


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run did.

    Attributes:
        report: the content of `report.json`.
        folder: where the artifact lies; None for a dry run.
        module: the compressed network, eval mode.
    """

    report: dict[str, Any]
    folder: Path | None
    module: nn.Module


def run(recipe: Recipe, progress: Progress | None = None, *, dry_run: bool = False, resume: bool = False) -> RunResult:
    """The main job: a checkpoint in, a smaller checkpoint and an accuracy report out.

    Under torchrun each process records its share of the calibration batches, and the first one writes.

    Args:
        dry_run: do everything except writing.
        resume: keep what is found in a folder beside the output, go on from what a killed run left there, and remove it
            at the end.

    Raises:
        CompressError: any fault, with its exit code; nothing is written then.
    """
    with process_group() as share, ExitStack() as held:
        if share.count > 1:
            if resume:
                raise RecipeError("resume: a run under torchrun keeps nothing to go on from; leave --resume out.")
            recipe = recipe.model_copy(update={"device": local_device(recipe.device)})
        if not dry_run and share.writes:
            held.enter_context(reserved(output_folder(recipe), force=recipe.force))
        return run_share(recipe, progress or SilentProgress(), share, dry_run=dry_run, resume=resume)


def run_share(recipe: Recipe, progress: Progress, share: Share, *, dry_run: bool, resume: bool) -> RunResult:
    """The main job in one process of a group: all record their share and choose alike, the first evaluates and writes.

    The others give an empty report.
    """
    clock = Stages()
    folder = output_folder(recipe)
    if not dry_run:
        check_exports(recipe.export)
    torch.manual_seed(recipe.seed)
    with clock("prepare"):
        prepared = prepare(recipe, progress, needs_data=True)
        check_finetuning(prepared, recipe)
        progress.reach(COMPRESSING[0])
        problem = replace(make_problem(prepared, recipe), share=share)
        check_widths(problem.groups, recipe)
        for caution in caution_samples(prepared, problem):
            progress.note(caution)
    state = None
    if resume:
        state = RunState.open(folder.with_name(folder.name + STATE_SUFFIX), fingerprint(prepared, recipe, problem))
    with clock("compress"):
        found, searched = choose_widths(prepared, problem, recipe, Portion(progress, *COMPRESSING), state)
    cut = make_cut(prepared, problem, found, recipe, clock, progress)
    evaluations = 1
    while searched is not None and loses_too_much(recipe, cut.evaluation) and evaluations < MOST_EVALUATIONS:
        progress.note("the evaluated accuracy fell by more than the held-back one; trying a milder cut")
        with clock("compress"):
            searched = milder_search(searched, layer_options(recipe), progress, sweeps=recipe.refine)
            found = searched.layerwise
        cut = make_cut(prepared, problem, found, recipe, clock, progress)
        evaluations += 1
    if not share.writes:
        return RunResult({}, None, cut.narrowed.module)
    added = [name for name in prepared.biases if name in cut.narrowed.shapes]
    if added:
        progress.note(f"got a bias: {', '.join(name.rpartition('.')[0] for name in added)}")
    certified: dict[str, Any] = {}
    if searched is not None:
        with clock("compress"):
            certified = certify_widths(searched, layer_options(recipe), progress)
    for caution in caution_layers([result.as_report() for result in found.results], problem.held_back.count):
        progress.note(caution)
    with clock("measure"):
        progress.reach(MEASURING)
        progress.stage("measuring latency")
        costs = measure_costs(prepared, cut.narrowed.module, cut.stored)
    report = {
        **describe_inputs(prepared, recipe, problem),
        "layers": [
            *(
                {**result.as_report(), "lasso": certified[result.name]}
                if result.name in certified
                else result.as_report()
                for result in found.results
            ),
            *(
                {"name": group.name, "units": group.unit_count, "skipped": group.skip_reason}
                for group in prepared.groups
                if not group.prunable
            ),
        ],
        "search": None if searched is None else search_report(searched),
        "calibration": {
            "fitting": None if found.fitting is None else found.fitting.as_report(),
            "held_back": None if found.held_back is None else found.held_back.as_report(),
        },
        "cost": cost_report(*costs),
        "evaluation": evaluation_report(
            cut.evaluation,
            preprocessing=None if prepared.preprocessing is None else prepared.preprocessing.as_dict(),
            class_names=None if prepared.evaluation is None else prepared.evaluation.class_names,
        ),
        "evaluations": evaluations * (1 if cut.tuning is None else 2) if cut.evaluation is not None else 0,
        "finetune": None
        if cut.tuning is None
        else {**cut.tuning.as_report(), "evaluation_before": evaluation_report(cut.untuned)},
        "added_biases": added,
        "verification": {"narrowed_deviation": cut.deviation},
        "notes": list(getattr(progress, "notes", [])),
        "versions": versions(),
    }
    raise_failed_gates(report, recipe)
    if dry_run:
        report["seconds"] = clock.seconds
        return RunResult(report, None, cut.narrowed.module)
    with clock("write"):
        write_run(folder, recipe, prepared, cut, report, clock, progress)
    if state is not None:
        state.remove()
    return RunResult(report, folder, cut.narrowed.module)


def raise_failed_gates(report: dict[str, Any], recipe: Recipe) -> None:
    """Put the gates' outcome into the report. Raises GateError with the report when one failed."""
    gates = check_gates(report, recipe)
    report["gates"] = [gate.as_report() for gate in gates]
    failed = failures(gates)
    if failed:
        reasons = "; ".join(gate.message for gate in failed)
        raise GateError(f"{reasons}; nothing was written.", report)


def demo_recipe(output: str = "compress-demo", *, force: bool = False) -> Recipe:
    """The embedded example: the packaged network trained on handwritten digits."""
    return make_recipe({**DEMO_OPTIONS, "output": output, "force": force}, "demo")


def output_folder(recipe: Recipe) -> Path:
    """Where a run writes."""
    return Path(default_output(recipe.checkpoint) if recipe.output is None else recipe.output)


def default_output(checkpoint: str) -> str:
    """Folder beside the working directory that a run writes to when none is named."""
    return f"{Path(checkpoint).stem}-compressed"

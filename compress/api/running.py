"""The main job: a checkpoint in, a smaller checkpoint and an accuracy report out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.api.steps.cautions import caution_samples
from compress.api.steps.cutting import Cut, make_cut
from compress.api.steps.forms import choose_form
from compress.api.steps.guarding import check_guards, failed, mix_guards
from compress.api.steps.measuring import check_original, loses_too_much
from compress.api.steps.metric import OwnMetric, import_metric, make_metric, own_bound
from compress.api.steps.telling import Work, describe_inputs, fingerprint, report_work
from compress.api.steps.tuning import check_finetuning
from compress.api.steps.widths import check_widths, choose_widths, make_problem, searches_widths
from compress.api.writing import (
    Finished,
    file_arch,
    first_samples,
    write_finished,
)
from compress.arithmetic import reproducible
from compress.artifact.exports import check_exports
from compress.atomic import reserved
from compress.checkpoint.removed import outside
from compress.compression.layers.layer import LayerOptions
from compress.compression.problem import Problem
from compress.compression.resume import RunState, state_folder
from compress.compression.searching.search import Wanted, milder_search, with_certificates
from compress.compression.sweep import Compressed
from compress.demo import DEMO_OPTIONS
from compress.errors import DataError, GateError, RecipeError
from compress.preparation import Prepared, prepare
from compress.progress import Portion, Progress, SilentProgress, Stages
from compress.recipe import Recipe, make_recipe
from compress.recording.sharing import Share, local_device, process_group
from compress.report.checks import check_own, failures
from compress.report.model import (
    Check,
    RunReport,
    plain_data,
)

COMPRESSING = (0.1, 0.7)  # expected shares of a run's time that are over at its beginning, and its end
MOST_EVALUATIONS = 4  # an accuracy bound may step back so often when evaluation disagrees with held-back samples


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run did.

    Attributes:
        report: the content of `report.json`; None in a process that only helps another one.
        folder: where the artifact lies; None for a dry run.
        module: the compressed network, eval mode.
    """

    report: RunReport | None
    folder: Path | None
    module: nn.Module


@reproducible()
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

    The others give no report.
    """
    clock, folder = Stages(), output_folder(recipe)
    if not dry_run:
        check_exports(recipe.export)
    function = import_metric(recipe)
    torch.manual_seed(recipe.seed)
    with clock("prepare"):
        prepared = prepare(recipe, progress, needs_data=True)
        metric = make_metric(recipe, function, prepared)
    state = state_folder(folder) if resume else None
    work = compress_prepared(prepared, recipe, progress, clock, share=share, state=state, metric=metric)
    if not share.writes:
        return RunResult(None, None, work.cut.narrowed.module)
    report = report_work(work, recipe, progress, clock)
    raise_failed_gates(report)
    if dry_run:
        return RunResult(report, None, work.cut.narrowed.module)
    with clock("write"):
        report = write_run(folder, recipe, work, report, clock, progress)
    if work.state is not None:
        work.state.remove()
    return RunResult(report, folder, work.cut.narrowed.module)


def compress_prepared(
    prepared: Prepared,
    recipe: Recipe,
    progress: Progress,
    clock: Stages,
    *,
    share: Share | None = None,
    state: Path | None = None,
    metric: OwnMetric | None = None,
) -> Work:
    """Choose the widths of a prepared network, refit, cut, evaluate; milder where evaluation disagrees with a bound.

    Args:
        state: folder that a resumable run keeps its state in.
        metric: the user's own measure.

    Raises:
        CompressError: any fault, a budget that cannot be kept, nothing to cut.
    """
    with clock("prepare"):
        check_finetuning(prepared, recipe)
        check_original(prepared, recipe, progress)
        progress.reach(COMPRESSING[0])
        progress.stage("dividing the calibration samples")
        problem = mix_guards(replace(make_problem(prepared, recipe), share=share or Share()), prepared, recipe)
        problem, form_share = choose_form(problem, recipe, progress)
        check_widths(problem.groups, recipe)
        for caution in caution_samples(prepared, problem):
            progress.note(caution)
        inputs = describe_inputs(prepared, recipe, problem)
    with clock("evaluate"):
        before, bound = measure_original(metric, recipe, prepared, problem, progress)
    kept = None if state is None else RunState.open(state, fingerprint(inputs, recipe))
    with clock("compress"):
        widths = Portion(progress, *COMPRESSING)
        compressed, searched = choose_widths(prepared, problem, recipe, widths, kept, bound, form_share)
        if searched is not None and recipe.tunes and recipe.bound is None:  # no milder widths will be asked for
            searched = with_certificates(searched, LayerOptions.of(recipe), progress)
    cut, metrics, gates = judge_cut(prepared, problem, compressed, recipe, metric, before, clock, progress)
    with clock("evaluate"):
        guarded = check_guards(prepared, cut.narrowed.module, recipe, progress)
    work = Work(prepared, problem, inputs, compressed, searched, cut, 1, kept, metrics, gates, guarded)
    while work.evaluations < MOST_EVALUATIONS and is_too_much(work, recipe):
        work = step_back(work, recipe, metric, before, clock, progress)
    if bound is not None and metric is not None and metric.searching(problem) is metric.measure:
        progress.note(
            f"{metric.measure.name} chose the widths, so its value flatters them a little; other samples tell more."
        )
    return work


def measure_original(
    metric: OwnMetric | None, recipe: Recipe, prepared: Prepared, problem: Problem, progress: Progress
) -> tuple[dict[str, float], Wanted | None]:
    """What the user's measure says of the original network, and its bound where widths are searched for by it."""
    if metric is None:
        return {}, None
    progress.stage("measuring the original")
    allowed = None if recipe.bound is None else recipe.bound.allowed
    before, noise = metric.measure.of_original(prepared.opened.module, allowed)
    if noise is not None:
        progress.note(f"warning: {noise}.")
    if recipe.bound is None or not searches_widths(recipe) or recipe.budgets:
        return before, None
    return before, own_bound(metric, recipe.bound, prepared, problem)


def judge_cut(
    prepared: Prepared,
    problem: Problem,
    compressed: Compressed,
    recipe: Recipe,
    metric: OwnMetric | None,
    before: Mapping[str, float],
    clock: Stages,
    progress: Progress,
) -> tuple[Cut, dict[str, tuple[float, float]], tuple[Check, ...]]:
    """A network cut and evaluated, with the user's measure before and after, and the check of its bound."""
    cut = make_cut(prepared, problem, compressed, recipe, clock, progress)
    after, gates = measure_own(metric, recipe, before, cut, clock)
    return cut, {name: (value, after.get(name, value)) for name, value in before.items()}, gates


def is_too_much(work: Work, recipe: Recipe) -> bool:
    """Whether a cut searched for a bound loses more on the evaluation data, by the user's measure or on a guard set."""
    lost = loses_too_much(recipe, work.cut.evaluation) or bool(failures(work.own_gates))
    lost = lost or (recipe.bound is not None and failed(work.guarded))
    return work.searched is not None and lost


def step_back(
    work: Work,
    recipe: Recipe,
    metric: OwnMetric | None,
    before: Mapping[str, float],
    clock: Stages,
    progress: Progress,
) -> Work:
    """A milder cut, evaluated."""
    assert work.searched is not None, "only what was searched for can be searched for again"
    progress.note("more was lost than on held-back samples of the calibration data; trying a milder cut")
    with clock("compress"):
        searched = milder_search(work.searched, LayerOptions.of(recipe), progress, sweeps=recipe.refine)
    compressed = searched.compressed
    cut, metrics, gates = judge_cut(work.prepared, work.problem, compressed, recipe, metric, before, clock, progress)
    with clock("evaluate"):
        guarded = check_guards(work.prepared, cut.narrowed.module, recipe, progress)
    return replace(
        work,
        compressed=compressed,
        searched=searched,
        cut=cut,
        evaluations=work.evaluations + 1,
        metrics=metrics,
        own_gates=gates,
        guarded=guarded,
    )


def measure_own(
    metric: OwnMetric | None, recipe: Recipe, before: Mapping[str, float], cut: Cut, clock: Stages
) -> tuple[dict[str, float], tuple[Check, ...]]:
    """What the user's measure says of a cut network, and the check of its bound. Raises CompressError."""
    if metric is None:
        return {}, ()
    with clock("evaluate"):
        after = metric.measure.of(cut.narrowed.module, "the compressed network")
    missing = [name for name in before if name not in after]
    if missing:
        raise DataError(f"{metric.measure.name} gave `{missing[0]}` for the original network only.")
    return after, () if recipe.bound is None else (check_own(metric.measure, recipe.bound, before, after),)


def raise_failed_gates(report: RunReport) -> None:
    """Raises GateError with the report where a gate failed."""
    failed = failures(report.gates)
    if failed:
        reasons = "; ".join(gate.message for gate in failed)
        raise GateError(f"{reasons}; nothing was written.", report)


def write_run(
    folder: Path,
    recipe: Recipe,
    work: Work,
    report: RunReport,
    clock: Stages,
    progress: Progress,
    *,
    original: nn.Module | None = None,
) -> RunReport:
    """Write the compressed network into its folder; gives the report as written.

    Args:
        original: the network that it is rebuilt from when it is reloaded, where no import can build that.

    Raises:
        CompressError: it cannot be written, or does not reload.
    """
    prepared, cut = work.prepared, work.cut
    before, narrowed = prepared.opened, cut.narrowed
    source = prepared.evaluation or prepared.calibration
    assert source is not None, "a run needs data"
    network = Finished(
        module=narrowed.module,
        stored=cut.stored,
        examples=prepared.network.examples,
        original=original,
        arch=file_arch(prepared.architecture),
        shapes={**outside(before.shapes, narrowed.removed), **narrowed.shapes},
        attributes={**outside(before.attributes, narrowed.removed), **narrowed.attributes},
        removed={**outside(before.removed, narrowed.removed), **narrowed.removed},
        execution=before.execution.and_then(narrowed.execution, narrowed.removed),
        kept=kept_of_original(
            before.kept, cut.kept, {group.name: group.unit_count for group in prepared.network.groups}
        ),
        certificates={
            layer.name: plain_data(layer.certificate) for layer in report.layers if layer.certificate is not None
        },
        outputs=tuple(output.as_report() for output in prepared.network.outputs),
        origin=prepared.checkpoint.sha256,
    )
    return write_finished(folder, network, report, recipe, lambda: first_samples(source), clock, progress)


def kept_of_original(
    before: Mapping[str, Any], kept: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, list[int]]:
    """Kept units by the numbers of a freshly built original, whatever was cut from it before.

    A cut may change what the units of a layer are: those of a grouped convolution of which one block is left are its
    channels. They have the numbers of the network that was cut last.

    Args:
        before: of earlier cuts; `kept`: of the last one.
        counts: units of each layer before the last cut.
    """
    numbers = {name: list(units) for name, units in before.items() if counts.get(name, len(units)) == len(units)}
    for name, units in kept.items():
        positions = units.tolist()
        numbers[name] = [numbers[name][unit] for unit in positions] if name in numbers else positions
    return numbers


def demo_recipe(output: str = "compress-demo", *, force: bool = False) -> Recipe:
    """The embedded example: the packaged network trained on handwritten digits."""
    return make_recipe({**DEMO_OPTIONS, "output": output, "force": force}, "demo")


def output_folder(recipe: Recipe) -> Path:
    """Where a run writes."""
    return Path(default_output(recipe.checkpoint) if recipe.output is None else recipe.output)


def default_output(checkpoint: str) -> str:
    """Folder beside the working directory that a run writes to when none is named."""
    return f"{Path(checkpoint).stem}-compressed"

"""The main job: a checkpoint in, a smaller checkpoint and an accuracy report out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.api.cautions import caution_layers, caution_samples, listed
from compress.api.cutting import Cut, make_cut
from compress.api.measuring import check_original, loses_too_much, measure_costs, measure_modules
from compress.api.metric import OwnMetric, import_metric, make_metric, own_bound
from compress.api.tuning import check_finetuning
from compress.api.widths import check_widths, choose_widths, describe_rule, make_problem, searches_widths
from compress.api.writing import (
    Finished,
    describe_architecture,
    describe_data,
    describe_preprocessing,
    file_arch,
    first_samples,
    write_finished,
)
from compress.artifact.exports import check_exports
from compress.artifact.folder import versions
from compress.atomic import reserved
from compress.checkpoint.removed import outside
from compress.compression.layer import LayerOptions
from compress.compression.problem import Problem
from compress.compression.result import LayerResult
from compress.compression.resume import RunState, state_folder
from compress.compression.search import SearchResult, Wanted, certify_widths, milder_search, search_report
from compress.compression.sweep import Compressed
from compress.data.calls import call_of
from compress.demo import DEMO_OPTIONS
from compress.errors import DataError, GateError, RecipeError
from compress.measures.statistics import CONFIDENCE
from compress.preparation import Prepared, prepare
from compress.progress import Portion, Progress, SilentProgress, Stages
from compress.recipe import Recipe, make_recipe
from compress.recording.sharing import Share, local_device, process_group
from compress.report.checks import check_gates, check_own, failures, gated_keys
from compress.report.doubts import find_doubts
from compress.report.evaluation import Evaluation
from compress.report.model import (
    CalibrationReport,
    Certificate,
    Check,
    EvaluationReport,
    Inputs,
    LayerReport,
    Measured,
    RunReport,
    SkippedLayer,
    SourceFile,
    Verification,
    plain_data,
)

COMPRESSING, MEASURING = (0.1, 0.7), 0.85  # expected shares of a run's time that are over at the beginning, and the end
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


@dataclass(frozen=True, eq=False)
class Work:
    """A compressed network with everything that led to it.

    Attributes:
        inputs: what went in, as the report says it.
        found: the network in its original shapes; `cut`: in its new ones, verified and evaluated.
        searched: how the widths were found; None where a rule gave them.
        evaluations: cuts that the evaluation data has seen.
        state: where a resumable run keeps what it found.
        metrics: name -> what the user's own measure says before and after; own_gates: its bound.
    """

    prepared: Prepared
    problem: Problem
    inputs: Inputs
    found: Compressed
    searched: SearchResult | None
    cut: Cut
    evaluations: int
    state: RunState | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    own_gates: tuple[Check, ...] = ()


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
        problem = replace(make_problem(prepared, recipe), share=share or Share())
        check_widths(problem.groups, recipe)
        for caution in caution_samples(prepared, problem):
            progress.note(caution)
        inputs = describe_inputs(prepared, recipe, problem)
    own: Wanted | None = None
    before: dict[str, float] = {}
    with clock("evaluate"):
        if metric is not None:
            progress.stage("measuring the original")
            allowed = None if recipe.bound is None else recipe.bound.allowed
            before, noise = metric.measure.of_original(prepared.opened.module, allowed)
            if noise is not None:
                progress.note(f"warning: {noise}.")
            if recipe.bound is not None and searches_widths(recipe) and not recipe.budgets:
                own = own_bound(metric, recipe.bound, prepared, problem)
    kept = None if state is None else RunState.open(state, fingerprint(inputs, recipe))
    with clock("compress"):
        found, searched = choose_widths(prepared, problem, recipe, Portion(progress, *COMPRESSING), kept, own)
    cut = make_cut(prepared, problem, found, recipe, clock, progress)
    after, gates = measure_own(metric, recipe, before, cut, clock)
    evaluations = 1
    while searched is not None and evaluations < MOST_EVALUATIONS:
        if not loses_too_much(recipe, cut.evaluation) and not failures(gates):
            break
        progress.note("the evaluated accuracy fell by more than the held-back one; trying a milder cut")
        with clock("compress"):
            searched = milder_search(searched, LayerOptions.of(recipe), progress, sweeps=recipe.refine)
            found = searched.layerwise
        cut = make_cut(prepared, problem, found, recipe, clock, progress)
        after, gates = measure_own(metric, recipe, before, cut, clock)
        evaluations += 1
    if own is not None and metric is not None and metric.searching(problem) is metric.measure:
        progress.note(
            f"{metric.measure.name} chose the widths, so its value flatters them a little; other samples tell more."
        )
    metrics = {name: (value, after.get(name, value)) for name, value in before.items()}
    return Work(prepared, problem, inputs, found, searched, cut, evaluations, kept, metrics, gates)


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


def report_work(work: Work, recipe: Recipe, progress: Progress, clock: Stages) -> RunReport:
    """Certify, measure, and tell what was done, with the outcome of the gates."""
    prepared, cut, found = work.prepared, work.cut, work.found
    certified: dict[str, Certificate] = {}
    if work.searched is not None:
        with clock("compress"):
            certified = certify_widths(work.searched, LayerOptions.of(recipe), progress)
    for group in work.problem.groups:
        if len(group.producers) > 1 and group.name in cut.kept:
            progress.note(f"cut together: {listed(group.producers)}")
    for caution in caution_layers([result.report for result in found.results], work.problem.held_back.count):
        progress.note(caution)
    with clock("measure"):
        progress.reach(MEASURING)
        progress.stage("measuring latency")
        cost = measure_costs(prepared, cut.narrowed.module, cut.stored, work.problem.timing)
    if cut.blocks:
        progress.note(f"removed as a whole: {listed(cut.blocks)}")
    added = tuple(name for name in prepared.network.biases if name in cut.narrowed.shapes)
    if added:
        progress.note(f"got a bias: {', '.join(name.rpartition('.')[0] for name in added)}")
    bound = None if recipe.own_metric else recipe.bound
    if cut.evaluation is not None and (bound is None or recipe.force_gate):
        for doubt in find_doubts(cut.evaluation, bound, gated_keys(recipe), tuned=recipe.tunes):
            progress.note(f"warning: {doubt}")
    report = RunReport(
        work.inputs,
        recipe=recipe.model_dump(mode="json", exclude={"output", "force", "export"}),
        rule=describe_rule(recipe),
        layers=tuple(layer_report(result, certified) for result in found.results),
        skipped=tuple(
            SkippedLayer(group.name, group.unit_count, found.skipped.get(group.name) or str(group.skip_reason))
            for group in prepared.network.groups
            if group.skip_reason is not None or group.name in found.skipped
        ),
        cost=cost,
        verification=Verification(cut.deviation),
        calibration=CalibrationReport(
            *(None if one is None else one.report() for one in (found.fitting, found.held_back))
        ),
        search=None if work.searched is None else search_report(work.searched),
        evaluation=report_evaluation(prepared, cut.evaluation, recipe.confidence),
        evaluations=work.evaluations * (1 if cut.tuning is None else 2) if cut.evaluation is not None else 0,
        finetune=None if cut.tuning is None else cut.tuning.report(report_evaluation(prepared, cut.untuned)),
        added_biases=added,
        order=tuple(group.name for group in prepared.network.groups),
        modules=measure_modules(prepared, cut.narrowed.module),
        metrics={name: Measured(*pair) for name, pair in work.metrics.items()},
        removed=cut.blocks,
        notes=tuple(getattr(progress, "notes", ())),
        seconds=dict(clock.seconds),
    )
    return replace(report, gates=(*work.own_gates, *check_gates(cut.evaluation, report, recipe)))


def describe_inputs(prepared: Prepared, recipe: Recipe, problem: Problem) -> Inputs:
    """What went in: file, architecture, data."""
    assert prepared.calibration is not None, "a run needs data"
    checkpoint = prepared.checkpoint
    return Inputs(
        checkpoint=SourceFile(
            file=Path(recipe.checkpoint).name,
            sha256=checkpoint.sha256,
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            state_key=checkpoint.state_key,
            prefix=checkpoint.prefix,
        ),
        architecture=describe_architecture(
            prepared.architecture,
            prepared.network.examples,
            prepared.network.batch_size,
            call_of(prepared.opened.module),
        ),
        data=describe_data(
            recipe,
            prepared.calibration,
            (problem.fitting.count, problem.held_back.count),
            prepared.evaluation,
            prepared.overlapping,
            prepared.preprocessing,
        ),
        seed=recipe.seed,
        versions=versions(),
    )


def fingerprint(inputs: Inputs, recipe: Recipe) -> dict[str, Any]:
    """What a run's intermediate results depend on, by contents, not by paths. Plain data."""
    paths = {"checkpoint", "data", "eval", "output", "force", "trust_code"}
    data = inputs.data
    return {
        "model": None if inputs.checkpoint is None else inputs.checkpoint.sha256,
        "calibration data": data.fitting.fingerprint,
        "evaluation data": None if data.evaluation is None else data.evaluation.fingerprint,
        **{name: value for name, value in recipe.model_dump(mode="json").items() if name not in paths},
        "versions": inputs.versions,
    }


def layer_report(result: LayerResult, certified: Mapping[str, Certificate]) -> LayerReport:
    """A layer as a report holds it, with the certificate that a search gave it."""
    return replace(result.report, certificate=certified.get(result.name, result.report.certificate))


def report_evaluation(
    prepared: Prepared, evaluation: Evaluation | None, confidence: float | None = None
) -> EvaluationReport | None:
    """An evaluation as a report holds it."""
    if evaluation is None or prepared.evaluation is None:
        return None
    preprocessing, names = describe_preprocessing(prepared.preprocessing), prepared.evaluation.class_names
    return evaluation.report(preprocessing, names, confidence or CONFIDENCE)


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
        kept=kept_of_original(before.kept, cut.kept),
        certificates={
            layer.name: plain_data(layer.certificate) for layer in report.layers if layer.certificate is not None
        },
        outputs=tuple(output.as_report() for output in prepared.network.outputs),
        origin=prepared.checkpoint.sha256,
    )
    return write_finished(folder, network, report, recipe, lambda: first_samples(source), clock, progress)


def kept_of_original(before: Mapping[str, Any], kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Kept units by the numbers of a freshly built original, whatever was cut from it before."""
    found = {name: list(units) for name, units in before.items()}
    for name, units in kept.items():
        own = units.tolist()
        found[name] = [found[name][unit] for unit in own] if name in found else own
    return found


def demo_recipe(output: str = "compress-demo", *, force: bool = False) -> Recipe:
    """The embedded example: the packaged network trained on handwritten digits."""
    return make_recipe({**DEMO_OPTIONS, "output": output, "force": force}, "demo")


def output_folder(recipe: Recipe) -> Path:
    """Where a run writes."""
    return Path(default_output(recipe.checkpoint) if recipe.output is None else recipe.output)


def default_output(checkpoint: str) -> str:
    """Folder beside the working directory that a run writes to when none is named."""
    return f"{Path(checkpoint).stem}-compressed"

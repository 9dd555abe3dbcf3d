"""What a run tells: its inputs, what became of every layer, costs, scores, notes and gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.allocator import give_back_freed_memory
from compress.api.steps.cautions import caution_layers, listed
from compress.api.steps.cutting import Cut
from compress.api.steps.guarding import Guarded
from compress.api.steps.measuring import FEW_PASSES, measure_costs, measure_modules
from compress.api.steps.widths import describe_rule, width_rule
from compress.api.writing import (
    describe_architecture,
    describe_data,
    describe_preprocessing,
)
from compress.artifact.folder import versions
from compress.compression.layers.decisions import Within
from compress.compression.layers.layer import LayerOptions
from compress.compression.layers.result import LayerResult
from compress.compression.pricing.latency import MOST_PASSES
from compress.compression.problem import Problem
from compress.compression.resume import RunState
from compress.compression.searching.search import SearchResult, certify_widths, search_report
from compress.compression.sweep import Compressed
from compress.data.calls import call_of
from compress.measures.statistics import CONFIDENCE
from compress.preparation import Prepared
from compress.progress import Progress, Stages
from compress.recipe import Recipe
from compress.report.checks import check_gates, gated_keys
from compress.report.doubts import find_doubts
from compress.report.evaluation import Evaluation
from compress.report.model import (
    CalibrationReport,
    Certificate,
    Check,
    CostReport,
    EvaluationReport,
    GuardReport,
    Inputs,
    LayerReport,
    Measured,
    RunReport,
    SkippedLayer,
    SourceFile,
    Verification,
)

MEASURING = 0.85  # expected share of a run's time that is over when all is cut


@dataclass(frozen=True, eq=False)
class Work:
    """A compressed network with everything that led to it.

    Attributes:
        inputs: what went in, as the report says it.
        compressed: the network in its original shapes; `cut`: in its new ones, verified and evaluated.
        searched: how the widths were found; None where a rule gave them.
        evaluations: cuts that the evaluation data has seen.
        state: where a resumable run keeps what it found.
        metrics: name -> what the user's own measure says before and after; own_gates: its bound.
        guarded: what the guard sets say.
    """

    prepared: Prepared
    problem: Problem
    inputs: Inputs
    compressed: Compressed
    searched: SearchResult | None
    cut: Cut
    evaluations: int
    state: RunState | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    own_gates: tuple[Check, ...] = ()
    guarded: tuple[Guarded, ...] = ()


def report_work(work: Work, recipe: Recipe, progress: Progress, clock: Stages) -> RunReport:
    """Certify, measure, and tell what was done, with the outcome of the gates."""
    certified: dict[str, Certificate] = {}
    give_back_freed_memory()
    if work.searched is not None:
        with clock("compress"):
            certified = certify_widths(work.searched, LayerOptions.of(recipe), progress)
    with clock("measure"):
        progress.reach(MEASURING)
        progress.stage("measuring latency")
        give_back_freed_memory()
        passes = FEW_PASSES if recipe.latency is None else MOST_PASSES
        cost = measure_costs(work.prepared, work.cut.narrowed.module, work.cut.stored, work.problem.timing, passes)
    note_outcome(work, recipe, progress)
    report = replace(
        fill_report(work, recipe, cost, certified),
        notes=tuple(getattr(progress, "notes", ())),
        seconds=dict(clock.seconds),
    )
    guards = tuple(guard.gate for guard in work.guarded)
    return replace(report, gates=(*work.own_gates, *guards, *check_gates(work.cut.evaluation, report, recipe)))


def note_outcome(work: Work, recipe: Recipe, progress: Progress) -> None:
    """Say what a reader of the numbers alone would miss."""
    cut = work.cut
    for group in work.problem.groups:
        if len(group.producers) > 1 and group.name in cut.kept:
            progress.note(f"cut together: {listed(group.producers)}")
    layers = [result.report for result in work.compressed.results]
    within = work.searched is None and not recipe.merge_aligned and isinstance(width_rule(recipe), Within)
    for caution in caution_layers(layers, work.problem.held_back.count, within=within):
        progress.note(caution)
    if cut.blocks:
        progress.note(f"removed as a whole: {listed(cut.blocks)}")
    lowered = [name.rpartition(".")[0] for name in work.compressed.ranks]
    if lowered:
        progress.note(f"two layers of a low rank in the place of: {listed(lowered)}")
    added = added_biases(work)
    if added:
        progress.note(f"got a bias: {', '.join(name.rpartition('.')[0] for name in added)}")
    bound = None if recipe.own_metric else recipe.bound
    if cut.evaluation is not None and (bound is None or recipe.force_gate):
        for doubt in find_doubts(cut.evaluation, bound, gated_keys(recipe), tuned=recipe.tunes):
            progress.note(f"warning: {doubt}")


def added_biases(work: Work) -> tuple[str, ...]:
    """Names of the biases that the network had not before."""
    shapes = work.cut.narrowed.shapes
    own = {name: f"{name.removesuffix('bias')}1.bias" for name in work.prepared.network.biases}
    return tuple(name for name, of_pair in own.items() if name in shapes or of_pair in shapes)


def fill_report(work: Work, recipe: Recipe, cost: CostReport, certified: Mapping[str, Certificate]) -> RunReport:
    """All that a report holds but its gates, notes and times."""
    prepared, cut, compressed = work.prepared, work.cut, work.compressed
    return RunReport(
        work.inputs,
        recipe=recipe.model_dump(mode="json", exclude={"output", "force", "export"}),
        rule=describe_rule(recipe),
        layers=tuple(layer_report(result, certified) for result in compressed.results),
        skipped=tuple(
            SkippedLayer(group.name, group.unit_count, compressed.skipped.get(group.name) or str(group.skip_reason))
            for group in prepared.network.groups
            if group.skip_reason is not None or group.name in compressed.skipped
        ),
        cost=cost,
        verification=Verification(cut.deviation),
        calibration=CalibrationReport(
            *(None if stream is None else stream.report() for stream in (compressed.fitting, compressed.held_back))
        ),
        search=None if work.searched is None else search_report(work.searched),
        evaluation=report_evaluation(prepared, cut.evaluation, recipe.confidence),
        evaluations=work.evaluations * (1 if cut.tuning is None else 2) if cut.evaluation is not None else 0,
        finetune=None if cut.tuning is None else cut.tuning.report(report_evaluation(prepared, cut.untuned)),
        added_biases=added_biases(work),
        order=tuple(group.name for group in prepared.network.groups),
        modules=measure_modules(prepared, cut.narrowed.module),
        metrics={name: Measured(*pair) for name, pair in work.metrics.items()},
        guards=tuple(
            GuardReport(
                one.guard.name,
                recipe.guard_weight / len(work.guarded),
                one.guard.most,
                one.evaluation.report(describe_preprocessing(prepared.preprocessing), one.guard.source.class_names),
            )
            for one in work.guarded
        ),
        removed=cut.blocks,
    )


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
            tuple(stream.of(prepared.calibration).count for stream in (problem.fitting, problem.held_back)),
            prepared.evaluation,
            prepared.overlapping,
            prepared.preprocessing,
            [guard.source for guard in prepared.guards],
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
        "guards": [guard.fingerprint for guard in data.guards],
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

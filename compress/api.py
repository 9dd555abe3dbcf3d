"""What a program calls and what the command line calls: run, inspect, evaluate, demo."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.budget.layers import LayerOptions
from compress.budget.layerwise import Layerwise, Problem, compress_layers, fit_samples, record_all, select_groups
from compress.budget.search import SearchResult, milder_search, prepare_search, search_report, search_widths
from compress.budget.widths import WidthRule
from compress.data import Cast, Preprocessing, open_data
from compress.demo import DEMO_OPTIONS
from compress.diagnostics.layers import describe_group, describe_moments
from compress.errors import DataError, GateError, NothingToCompressError, RecipeError
from compress.network.cost import Cost, count_macs, count_parameters, measure_latency
from compress.network.execution import first_tensor
from compress.network.surgery import Narrowed, narrow, verify_narrowed
from compress.network.units import UnitGroup
from compress.output.artifact import (
    REPORT_JSON,
    REPORT_TEXT,
    check_reload,
    computed_state,
    read_artifact,
    stored_state,
    versions,
    write_artifact,
    write_json,
)
from compress.output.atomic import check_target, new_folder
from compress.output.evaluation import Evaluation, evaluate_networks
from compress.output.report import cost_report, evaluation_report, markdown_report
from compress.preparation import Prepared, check_device, prepare
from compress.progress import Progress, SilentProgress
from compress.recipe import Recipe, format_recipe, make_recipe

RELOAD_TOLERANCE = 1e-5
LATENCY_BATCHES = (1, 64)
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


def run(recipe: Recipe, progress: Progress | None = None, *, dry_run: bool = False) -> RunResult:
    """The main job: a checkpoint in, a smaller checkpoint and an accuracy report out.

    Args:
        dry_run: do everything except writing.

    Raises:
        CompressError: any fault, with its exit code; nothing is written then.
    """
    progress = progress or SilentProgress()
    clock = Stages()
    folder = Path(recipe.output or default_output(recipe.checkpoint))
    if not dry_run:
        check_target(folder, force=recipe.force)
    torch.manual_seed(recipe.seed)
    with clock("prepare"):
        prepared = prepare(recipe, progress, needs_data=True)
        problem = make_problem(prepared, recipe)
    with clock("compress"):
        found, searched = choose_widths(prepared, problem, recipe, progress)
    cut = make_cut(prepared, problem, found, recipe, clock, progress)
    evaluations = 1
    while searched is not None and loses_too_much(recipe, cut.evaluation) and evaluations < MOST_EVALUATIONS:
        progress.note("the evaluated accuracy fell by more than the held-back one; trying a milder cut")
        with clock("compress"):
            searched = milder_search(searched, layer_options(recipe), progress)
            found = searched.layerwise
        cut = make_cut(prepared, problem, found, recipe, clock, progress)
        evaluations += 1
    check_gate(recipe, cut.evaluation)
    with clock("measure"):
        progress.stage("measuring latency")
        costs = measure_costs(prepared, cut.narrowed.module, cut.stored)
    report = {
        **describe_inputs(prepared, recipe, problem),
        "layers": [
            *(result.as_report() for result in found.results),
            *(
                {"name": group.name, "units": group.unit_count, "skipped": group.skip_reason}
                for group in prepared.groups
                if group.skip_reason is not None
            ),
        ],
        "search": None if searched is None else search_report(searched),
        "calibration": {
            "fitting": None if found.fitting is None else found.fitting.as_report(),
            "held_back": None if found.held_back is None else found.held_back.as_report(),
        },
        "cost": cost_report(*costs),
        "evaluation": evaluation_report(cut.evaluation),
        "evaluations": evaluations if cut.evaluation is not None else 0,
        "verification": {"narrowed_deviation": cut.deviation},
        "notes": list(getattr(progress, "notes", [])),
        "versions": versions(),
    }
    if dry_run:
        report["seconds"] = clock.seconds
        return RunResult(report, None, cut.narrowed.module)
    with clock("write"):
        write_run(folder, recipe, prepared, cut, report, clock, progress)
    return RunResult(report, folder, cut.narrowed.module)


@dataclass(frozen=True, eq=False)
class Cut:
    """A narrowed network, verified and evaluated.

    Attributes:
        kept: group name -> unit numbers, of the groups that lost some.
        stored: its tensors in the checkpoint's dtypes.
        deviation: largest relative deviation from the masked original.
    """

    kept: dict[str, Tensor]
    narrowed: Narrowed
    stored: dict[str, Tensor]
    deviation: float
    evaluation: Evaluation | None


def make_cut(
    prepared: Prepared, problem: Problem, found: Layerwise, recipe: Recipe, clock: Stages, progress: Progress
) -> Cut:
    """Narrow, verify and evaluate.

    Raises:
        NothingToCompressError: no layer lost a unit.
        SurgeryError: the narrowed network differs from the masked one by more than rounding.
    """
    kept = {result.name: result.kept for result in found.results if len(result.kept) < result.units}
    if not kept:
        raise NothingToCompressError(
            "Every selected layer needs all its units at this setting; allow more with --error or --keep."
        )
    with clock("cut"):
        progress.stage("cutting and verifying")
        narrowed, deviation = cut_network(prepared, problem.groups, kept, found.state)
        stored = stored_state(narrowed.module.state_dict(), prepared.stored)
        narrowed.module.load_state_dict(computed_state(stored))
    with clock("evaluate"):
        evaluation = evaluate_pair(prepared, narrowed.module, recipe, progress)
    return Cut(kept, narrowed, stored, deviation, evaluation)


def inspect(recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """What could be compressed: structure from the weights alone; ranks and dead units too where there is data.

    Raises:
        CompressError: any fault. Nothing is solved and nothing is written.
    """
    progress = progress or SilentProgress()
    prepared = prepare(recipe, progress, needs_data=False)
    check_patterns(prepared.groups, recipe.layer)
    selected = select_groups(prepared.groups, recipe.layer, recipe.exclude)
    layers = {group.name: describe_group(group, prepared.state) for group in selected}
    usable = tuple(group for group in selected if group.skip_reason is None)
    if prepared.calibration is not None and usable:
        problem = make_problem(prepared, recipe)
        for name, moments in record_all(problem, progress).items():
            layers[name].update(describe_moments(moments, recipe.rank_tolerance))
    return {
        "file": Path(recipe.checkpoint).name,
        "sha256": prepared.checkpoint.sha256,
        "state_key": prepared.checkpoint.state_key,
        "architecture": prepared.architecture.spec,
        "recognised": prepared.architecture.how,
        "input_shape": list(prepared.probe.shape[1:]),
        "parameters": count_parameters(prepared.module),
        "macs": count_macs(prepared.module, (prepared.probe,)),
        "layers": list(layers.values()),
    }


def evaluate(
    folder: str | Path,
    eval_data: str,
    *,
    batch_size: int = 128,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores of a written artifact on evaluation data, with its own recorded preprocessing. Raises CompressError."""
    progress = progress or SilentProgress()
    check_device(device)
    artifact = read_artifact(folder)
    module = artifact.build().to(device)
    recorded = artifact.config["data"]["preprocessing"]
    source = open_data(eval_data, None if recorded is None else Preprocessing.from_dict(recorded))
    progress.stage("evaluating", source.sample_count)
    architecture = artifact.config["architecture"]
    source = Cast(source, getattr(torch, architecture.get("input_dtype", "float32")))
    only_batch = architecture.get("batch_size")
    found = evaluate_networks(
        module,
        module,
        source.batches(only_batch or batch_size),
        device=device,
        progress=progress,
        only_batch=only_batch,
    )
    report = evaluation_report(found)
    assert report is not None, "there was data"
    return {"folder": str(folder), "samples": found.samples, **(report["compressed"] or {})}


def demo_recipe(output: str = "compress-demo", *, force: bool = False) -> Recipe:
    """The embedded example: the packaged network trained on handwritten digits."""
    return make_recipe({**DEMO_OPTIONS, "output": output, "force": force}, "demo")


class Stages:
    """Wall seconds of the run's stages: `with stages("cut"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str) -> _Stage:
        return _Stage(self.seconds, stage)


@dataclass
class _Stage:
    seconds: dict[str, float]
    stage: str
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.perf_counter() - self.started


def default_output(checkpoint: str) -> str:
    """Folder beside the working directory that a run writes to when none is named."""
    return f"{Path(checkpoint).stem}-compressed"


def choose_widths(
    prepared: Prepared, problem: Problem, recipe: Recipe, progress: Progress
) -> tuple[Layerwise, SearchResult | None]:
    """Compress by the recipe's width rule, or search the widths where it names a budget or only an accuracy bound.

    Returns:
        The compressed network in its original shapes, and how the search went (None without one).
    """
    options = layer_options(recipe)
    ruled = recipe.keep is not None or recipe.error is not None or recipe.penalty is not None
    if not recipe.budgets and (recipe.max_drop is None or ruled):
        return compress_layers(problem, width_rule(recipe), options, progress), None
    parameters = dict(prepared.module.named_parameters())
    search = prepare_search(problem, options, parameters, progress)
    found = search_widths(search, options, progress, budgets=recipe.budgets, max_drop=recipe.max_drop)
    return found.layerwise, found


def width_rule(recipe: Recipe) -> WidthRule:
    """The recipe's width rule; by default the stated tolerance on held-back samples."""
    if recipe.keep is not None:
        return WidthRule(keep=recipe.keep)
    if recipe.penalty is not None:
        return WidthRule(penalty=recipe.penalty)
    return WidthRule(error=recipe.error if recipe.error is not None else recipe.tolerance)


def layer_options(recipe: Recipe) -> LayerOptions:
    """The recipe's options for solving one layer."""
    return LayerOptions(
        solver=recipe.solver,
        gap=recipe.gap,
        unit_costs=recipe.unit_costs,
        selection=recipe.selection,
        ridge=recipe.ridge,
        rank_tolerance=recipe.rank_tolerance,
        round_to=recipe.round_to,
    )


def make_problem(prepared: Prepared, recipe: Recipe) -> Problem:
    """The selected prunable groups with calibration streams.

    Raises:
        RecipeError: a layer pattern matches nothing; the names are listed.
        NothingToCompressError: nothing selected can be compressed; the reasons are listed.
    """
    groups = prepared.groups
    check_patterns(groups, recipe.layer)
    selected = select_groups(groups, recipe.layer, recipe.exclude)
    usable = tuple(group for group in selected if group.skip_reason is None)
    if not usable:
        reasons = "; ".join(f"{group.name}: {group.skip_reason}" for group in selected) or "no layers were found"
        raise NothingToCompressError(f"No selected layer can be compressed. {reasons}.")
    assert prepared.calibration is not None, "a run needs data"
    if prepared.calibration.sample_count < 8:
        raise DataError(f"At least 8 calibration samples are needed, got {prepared.calibration.sample_count}.")
    only_batch = prepared.network.batch_size
    fitting, held_back = fit_samples(
        prepared.calibration,
        recipe.calibration_samples,
        recipe.held_back,
        only_batch or recipe.batch_size,
        recipe.seed,
        whole_batches=only_batch is not None,
    )
    return Problem(
        program=prepared.program,
        state=prepared.state,
        groups=usable,
        fitting=fitting,
        held_back=held_back,
        forward_macs=count_macs(prepared.module, (prepared.probe,)),
        memory=recipe.memory_bytes,
        seed=recipe.seed,
    )


def check_patterns(groups: Sequence[UnitGroup], patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer. Raises RecipeError."""
    names = [group.name for group in groups]
    for pattern in patterns:
        if not select_groups(groups, [pattern], []):
            raise RecipeError(f"layer: {pattern!r} matches no layer; there are {', '.join(names) or 'none'}.")


def cut_network(
    prepared: Prepared, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], current: Mapping[str, Tensor]
) -> tuple[Narrowed, float]:
    """The narrowed network and its largest relative deviation from the masked one.

    Raises:
        SurgeryError: the two differ by more than rounding.
    """
    changed = {name: tensor for name, tensor in current.items() if tensor is not prepared.state[name]}
    aliases = prepared.network.aliases
    changed.update({name: changed[first] for name, first in aliases.items() if first in changed})
    narrowed = narrow(prepared.module, kept, groups, weights=changed)
    deviation = verify_narrowed(
        prepared.network, prepared.module, kept, groups, narrowed, (prepared.probe,), weights=changed
    )
    return narrowed, deviation


def evaluate_pair(prepared: Prepared, compressed: nn.Module, recipe: Recipe, progress: Progress) -> Evaluation | None:
    """Both networks on the evaluation data, or None without any."""
    source = prepared.evaluation
    if source is None:
        return None
    progress.stage("evaluating", source.sample_count)
    only_batch = prepared.network.batch_size
    return evaluate_networks(
        prepared.module,
        compressed,
        source.batches(only_batch or recipe.batch_size),
        device=recipe.device,
        progress=progress,
        only_batch=only_batch,
    )


def measure_costs(
    prepared: Prepared, compressed: nn.Module, stored: Mapping[str, Tensor]
) -> tuple[Cost, Cost, list[dict[str, Any]]]:
    """Costs of the two networks and their latencies at each of `LATENCY_BATCHES`."""
    probe, only_batch = prepared.probe, prepared.network.batch_size
    latencies = []
    for batch in LATENCY_BATCHES if only_batch is None else (only_batch,):
        inputs = probe if only_batch is not None else probe[:1].expand(batch, *probe.shape[1:])
        before, after = measure_latency((prepared.module, compressed), (inputs,))
        latencies.append(
            {
                "batch_size": batch,
                "threads": before.threads,
                "device": before.device,
                "before_ms": before.milliseconds,
                "after_ms": after.milliseconds,
            }
        )
    before_cost = Cost(
        count_parameters(prepared.module), count_macs(prepared.module, (probe,)), tensor_bytes(prepared.stored)
    )
    return (
        before_cost,
        Cost(count_parameters(compressed), count_macs(compressed, (probe,)), tensor_bytes(stored)),
        latencies,
    )


def tensor_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors of a state dict take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def loses_too_much(recipe: Recipe, evaluation: Evaluation | None) -> bool:
    """Whether the evaluated accuracy falls by more than `max_drop` points."""
    if recipe.max_drop is None or evaluation is None or evaluation.drop is None:
        return False
    return evaluation.drop > recipe.max_drop + 1e-9


def check_gate(recipe: Recipe, evaluation: Evaluation | None) -> None:
    """Raise GateError when the evaluated accuracy falls by more than `max_drop` points."""
    if loses_too_much(recipe, evaluation):
        assert evaluation is not None, "there was an evaluation"
        raise GateError(
            f"The accuracy falls by {evaluation.drop:.2f} points, at most {recipe.max_drop:g} were allowed; "
            "nothing was written."
        )


def describe_inputs(prepared: Prepared, recipe: Recipe, problem: Problem) -> dict[str, Any]:
    """What went in: file, architecture, data, options."""
    calibration = prepared.calibration
    assert calibration is not None, "a run needs data"
    return {
        "checkpoint": {
            "file": Path(recipe.checkpoint).name,
            "sha256": prepared.checkpoint.sha256,
            "state_key": prepared.checkpoint.state_key,
            "prefix": prepared.checkpoint.prefix,
            "dtype": str(prepared.checkpoint.dtype).removeprefix("torch."),
        },
        "architecture": {
            "spec": prepared.architecture.spec,
            "arguments": prepared.architecture.arguments,
            "recognised": prepared.architecture.how,
            "input_shape": list(prepared.probe.shape[1:]),
            "input_dtype": str(prepared.probe.dtype).removeprefix("torch."),
            "batch_size": prepared.network.batch_size,
        },
        "data": {
            "calibration": {
                "source": recipe.data,
                "samples": problem.fitting.count,
                "held_back": problem.held_back.count,
                "fingerprint": calibration.fingerprint,
            },
            "evaluation": None
            if prepared.evaluation is None
            else {
                "source": recipe.eval,
                "samples": prepared.evaluation.sample_count,
                "fingerprint": prepared.evaluation.fingerprint,
                "overlap": prepared.overlapping,
            },
            "preprocessing": None if prepared.preprocessing is None else prepared.preprocessing.as_dict(),
        },
        "rule": str(width_rule(recipe)),
        "seed": recipe.seed,
    }


def write_run(
    folder: Path,
    recipe: Recipe,
    prepared: Prepared,
    cut: Cut,
    report: dict[str, Any],
    clock: Stages,
    progress: Progress,
) -> None:
    """Write the artifact beside its final place, reload it in a fresh process, then put it in place."""
    progress.stage("writing and reloading")
    config = {
        **{name: report[name] for name in ("checkpoint", "architecture", "data", "seed", "versions")},
        "shapes": cut.narrowed.shapes,
        "attributes": cut.narrowed.attributes,
        "kept": {name: units.tolist() for name, units in cut.kept.items()},
        "certificates": {layer["name"]: layer["lasso"] for layer in report["layers"] if layer.get("lasso") is not None},
        "hashes": {"checkpoint": prepared.checkpoint.sha256},
    }
    with torch.inference_mode():
        expected = first_tensor(cut.narrowed.module(prepared.probe))
    with new_folder(folder, force=recipe.force) as draft, tempfile.TemporaryDirectory() as scratch:
        write_artifact(draft, cut.stored, config, {"recipe.yaml": format_recipe(recipe)})
        report["verification"]["reload_deviation"] = check_reload(
            draft, prepared.probe, expected, RELOAD_TOLERANCE, Path(scratch)
        )
        report["seconds"] = clock.seconds
        write_report(draft, report)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.md` into a folder."""
    write_json(folder / REPORT_JSON, report)
    (folder / REPORT_TEXT).write_text(markdown_report(report), encoding="utf-8")

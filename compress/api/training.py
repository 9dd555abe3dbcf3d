"""Training and fine-tuning: a recipe in, an artifact that everything else here loads out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.api.running import STATE_SUFFIX
from compress.api.writing import RELOAD_TOLERANCE
from compress.artifact.checksums import write_checksums
from compress.artifact.folder import TRAINING_JSON, check_reload, stored_state, versions, write_artifact, write_json
from compress.atomic import new_folder, reserved
from compress.checkpoint.architecture import (
    Architecture,
    describe_inputs,
    with_versions,
)
from compress.checkpoint.builders import build_architecture
from compress.checkpoint.manifest import computed_state, file_sha256
from compress.compression.resume import RunState
from compress.data import Cast, DataSource
from compress.data.source import Subset, split_held_back
from compress.errors import DataError, GateError, InterruptionError, OutputError, RecipeError
from compress.graph.cost import count_macs, count_parameters
from compress.measures.kinds import Hints, describe_outputs, need_place, read_class_counts
from compress.measures.outputs import named_outputs
from compress.preparation import (
    check_device,
    choose_preprocessing,
    make_probes,
    open_network,
    open_sources,
    run_on_probe,
)
from compress.progress import Progress, SilentProgress, Stages
from compress.recipe import Recipe, TrainingOptions, format_recipe
from compress.report.evaluation import evaluate_networks, network_outputs
from compress.report.markdown import evaluation_report
from compress.training.loop import score
from compress.training.losses import LOSSES, check_answers, constant_loss
from compress.training.outcome import describe_training
from compress.training.session import JOURNAL, train_copy

DEFAULT_OUTPUTS = {"train": "-trained", "finetune": "-finetuned"}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a training did: the content of `training.json`, the folder, the network in eval mode."""

    report: dict[str, Any]
    folder: Path
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Start:
    """A network before its training.

    Attributes:
        shapes, attributes, kept: what makes a freshly built `architecture` this network, as in a manifest.
        origin: the file it came from, plain data; None where it starts from random weights.
        stored: its tensors as stored, whose dtypes the result takes; empty for a new network.
    """

    module: nn.Module
    architecture: Architecture
    origin: dict[str, Any] | None = None
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


def train(recipe: Recipe, progress: Progress | None = None, *, resume: bool = False) -> TrainResult:
    """Train the recipe's architecture from random weights of its seed, as its `training` section says.

    Args:
        resume: go on from what a killed training of the same recipe left beside the output.

    Raises:
        RecipeError: no architecture.
        GateError: no λ within the allowed trainings reached the wanted sparsity; the journal stays for `resume`.
        CompressError: any other fault; nothing is written.
    """
    options = (recipe.training or TrainingOptions.model_validate({})).completed()
    if recipe.arch is None:
        raise RecipeError("arch: a training needs an architecture, such as compress:mlp or torchvision:resnet18.")
    module = build_architecture(recipe.arch, recipe.arch_arg, seed=recipe.seed, trusted=True)
    shape, preprocessing = describe_inputs(recipe.arch, recipe.arch_arg)
    start = Start(module, Architecture(recipe.arch, dict(recipe.arch_arg), shape, preprocessing, trusted=True))
    return train_from(start, recipe, options, progress or SilentProgress(), resume=resume)


def finetune(recipe: Recipe, progress: Progress | None = None, *, resume: bool = False) -> TrainResult:
    """Train the recipe's checkpoint on, or the network in a folder that this tool wrote; otherwise as `train`."""
    options = (recipe.training or TrainingOptions.model_validate({})).completed(finetuning=True)
    return train_from(load_start(recipe), recipe, options, progress or SilentProgress(), resume=resume)


def load_start(recipe: Recipe) -> Start:
    """The network of a checkpoint file or of a written folder. Raises CompressError."""
    opened = open_network(recipe)
    origin = {"file": Path(recipe.checkpoint).name, "sha256": opened.checkpoint.sha256}
    cut = (opened.shapes, opened.attributes, opened.kept)
    return Start(opened.module, opened.architecture, origin, opened.checkpoint.state, *cut)


def train_from(
    start: Start, recipe: Recipe, options: TrainingOptions, progress: Progress, *, resume: bool
) -> TrainResult:
    """Train a network on the recipe's data, score it, and write it beside its final place, then put it in place."""
    kind = "train" if start.origin is None else "finetune"
    folder = Path(recipe.output or f"{Path(recipe.checkpoint).stem or 'network'}{DEFAULT_OUTPUTS[kind]}")
    with reserved(folder, force=recipe.force):
        return train_into(folder, kind, start, recipe, options, progress, resume=resume)


def train_into(
    folder: Path, kind: str, start: Start, recipe: Recipe, options: TrainingOptions, progress: Progress, *, resume: bool
) -> TrainResult:
    """As `train_from`, into a folder that is held."""
    clock = Stages()
    with clock("prepare"):
        device = check_device(recipe.device)
        module = start.module.to(device)
        preprocessing = choose_preprocessing(recipe, start.architecture)
        source, evaluation, overlapping = open_sources(recipe, preprocessing, progress, needs_data=True)
        assert source is not None, "asked for"
        probes = make_probes(recipe, start.architecture, source)
        (probe,), outputs = run_on_probe(module.eval(), [tuple(part.to(device) for part in each) for each in probes])
        source = Cast(source, probe.dtype)
        evaluation = None if evaluation is None else Cast(evaluation, probe.dtype)
        check_answers(options.loss, source, outputs)
        if evaluation is not None and evaluation.targets is not None:
            check_answers(options.loss, evaluation, outputs)
        elif evaluation is not None and evaluation.has_labels:
            need_place(describe_outputs(named_outputs(outputs), len(probe), (evaluation,), Hints()), evaluation)
        if (options.crop or options.flip) and probe.ndim != 4:
            raise RecipeError(f"training: crop and flip are for images; samples have shape {tuple(probe.shape[1:])}.")
        training, validation = split_source(source, options.held_back, recipe.seed)
        described = {
            "origin": start.origin,
            "architecture": {
                "spec": start.architecture.spec,
                "arguments": start.architecture.arguments,
                "recognised": start.architecture.how,
                "input_shape": list(probe.shape[1:]),
                "input_dtype": str(probe.dtype).removeprefix("torch."),
                "batch_size": None,
            },
            "data": {
                "training": {
                    "source": recipe.data,
                    "samples": training.sample_count,
                    "held_back": 0 if validation is None else validation.sample_count,
                    "fingerprint": source.fingerprint,
                },
                "evaluation": None
                if evaluation is None
                else {
                    "source": recipe.eval,
                    "samples": evaluation.sample_count,
                    "overlap": overlapping,
                    "fingerprint": evaluation.fingerprint,
                },
                "preprocessing": None if preprocessing is None else preprocessing.as_dict(),
            },
            "seed": recipe.seed,
            "versions": versions(),
        }
    state = open_state(folder, fingerprint(described, options, recipe), resume=resume, force=recipe.force)
    with clock("train"), going_on_later(state.folder):
        trained = train_copy(
            module, probe, options, training, validation, seed=recipe.seed, folder=state.folder, progress=progress
        )
    if trained.choice is not None and not trained.choice.met:
        raise GateError(
            f"After {len(trained.choice.history)} trainings {sum(trained.choice.levels)} weights are nonzero, not "
            f"within {options.target_tolerance:g} of the target; nothing was written. --resume with more --trainings "
            f"goes on; the closest was --penalty {trained.choice.penalties[0]:.6g}."
        )
    stored = stored_state(trained.module.state_dict(), start.stored)
    trained.module.load_state_dict(with_versions(trained.module, computed_state(stored)))
    with clock("evaluate"):
        report: dict[str, Any] = {
            "kind": kind,
            **described,
            "parameters": count_parameters(trained.module),
            "macs": count_macs(trained.module, (probe,)),
            **describe_training(trained, options, training, validation, probe),
            "evaluation": score_networks(module, trained.module, evaluation, recipe, options, progress),
            "notes": list(getattr(progress, "notes", [])),
        }
        if report["undebiased"] is not None and evaluation is not None:
            scored = score_networks(module, trained.undebiased or module, evaluation, recipe, options, progress)
            report["undebiased"]["evaluation"] = None if scored is None else scored["trained"]
        if start.origin is None and report["evaluation"] is not None:
            report["evaluation"]["original"] = None
    write_trained(folder, recipe, start, trained.module, stored, probe, report, state.folder, clock, progress)
    shutil.rmtree(state.folder, ignore_errors=True)
    return TrainResult(report, folder, trained.module)


def split_source(source: DataSource, held_back: float, seed: int) -> tuple[DataSource, DataSource | None]:
    """Samples to train on and samples to validate on, disjoint; None where nothing is held back. Raises DataError."""
    if held_back == 0:
        return source, None
    try:
        own, rest = split_held_back(source.sample_count, held_back, seed)
    except ValueError as error:
        raise DataError(f"{source.name}: {error}") from None
    return Subset(source, own.numpy()), Subset(source, rest.numpy())


def fingerprint(described: Mapping[str, Any], options: TrainingOptions, recipe: Recipe) -> dict[str, Any]:
    """What a training depends on, by contents, not by paths."""
    arithmetic = options.model_dump(mode="json", exclude={"trainings"})
    origin = described["origin"]
    return {
        "network": {**described["architecture"], "sha256": None if origin is None else origin["sha256"]},
        "training data": described["data"]["training"]["fingerprint"],
        "preprocessing": described["data"]["preprocessing"],
        "seed": recipe.seed,
        "device": recipe.device,
        **arithmetic,
        "versions": described["versions"],
    }


def open_state(folder: Path, wanted: Mapping[str, Any], *, resume: bool, force: bool) -> RunState:
    """The folder beside the output where a training keeps its state. Raises OutputError, RecipeError."""
    place = folder.with_name(folder.name + STATE_SUFFIX)
    if place.exists() and not resume:
        if not force:
            raise OutputError(
                f"{str(place)!r} holds an unfinished training; give --resume to go on, or --force to start again."
            )
        shutil.rmtree(place, ignore_errors=True)
    return RunState.open(place, wanted)


@contextmanager
def going_on_later(place: Path) -> Iterator[None]:
    """Say after Ctrl-C that the state is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptionError(
            f"interrupted; {str(place)!r} is kept, the same command with --resume goes on."
        ) from None


def score_networks(
    before: nn.Module,
    after: nn.Module,
    evaluation: DataSource | None,
    recipe: Recipe,
    options: TrainingOptions,
    progress: Progress,
) -> dict[str, Any] | None:
    """Scores on the evaluation data, as in a run's report but `compressed` being the trained network.

    Real targets are scored by the loss, beside that of the best constant.
    """
    if evaluation is None:
        return None
    progress.stage("evaluating", evaluation.sample_count)
    if evaluation.targets is not None:
        losses = [score(network, evaluation, LOSSES[options.loss], recipe.batch_size)[0] for network in (before, after)]
        return {
            "samples": evaluation.sample_count,
            "original": {"loss": losses[0]},
            "trained": {"loss": losses[1]},
            "loss": options.loss,
            "constant_loss": constant_loss(options.loss, evaluation.targets),
        }
    batches = evaluation.batches(recipe.batch_size)
    first = next(iter(evaluation.batches(2))).inputs.to(recipe.device)
    with torch.inference_mode():
        tensors = network_outputs(after, (first,))
    outputs = describe_outputs(tensors, len(first), (evaluation,), Hints(class_counts=read_class_counts(after)))
    answered = need_place(outputs, evaluation).name if evaluation.has_labels else ""
    found = evaluate_networks(before.eval(), after, batches, outputs, answered, device=recipe.device, progress=progress)
    described = evaluation_report(found)
    assert described is not None, "there was data"
    return {"samples": found.samples, "original": described["original"], "trained": described["compressed"]}


def write_trained(
    folder: Path,
    recipe: Recipe,
    start: Start,
    module: nn.Module,
    stored: Mapping[str, Tensor],
    probe: Tensor,
    report: dict[str, Any],
    state: Path,
    clock: Stages,
    progress: Progress,
) -> None:
    """Write the artifact and its report, reload it in a fresh process, then put it in place."""
    progress.stage("writing and reloading")
    config = {
        **{name: report[name] for name in ("architecture", "data", "seed", "versions")},
        "checkpoint": start.origin,
        "shapes": start.shapes,
        "attributes": start.attributes,
        "kept": start.kept,
        "certificates": {},
    }
    with torch.inference_mode():
        expected = named_outputs(module(probe))
    with new_folder(folder, force=recipe.force) as draft, tempfile.TemporaryDirectory() as scratch:
        manifest = write_artifact(draft, stored, config, {"recipe.yaml": format_recipe(recipe)})
        report["reload_deviation"] = check_reload(draft, probe, expected, RELOAD_TOLERANCE, Path(scratch))
        if (state / JOURNAL).is_file():
            shutil.copyfile(state / JOURNAL, draft / JOURNAL)
            manifest["hashes"][JOURNAL] = file_sha256(draft / JOURNAL)
        report["hashes"] = manifest["hashes"]
        report["seconds"] = clock.seconds
        write_json(draft / TRAINING_JSON, report)
        write_checksums(draft)

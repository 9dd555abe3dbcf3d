"""Training and fine-tuning: a recipe in, an artifact that everything else here loads out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compress.api.writing import (
    Finished,
    describe_architecture,
    describe_data,
    file_arch,
    first_samples,
    write_finished,
)
from compress.arithmetic import reproducible
from compress.artifact.exports import check_exports
from compress.artifact.folder import versions
from compress.atomic import reserved
from compress.checkpoint.architecture import Architecture
from compress.checkpoint.building.builders import build_architecture
from compress.checkpoint.inputs import describe_inputs
from compress.compression.resume import RunState, state_folder
from compress.data import Cast, DataSource, Preprocessing
from compress.data.calls import call_of
from compress.errors import InterruptionError, OutputError, RecipeError
from compress.measures.kinds import Hints, describe_outputs, need_place
from compress.measures.outputs import named_outputs
from compress.preparation import (
    call_by_names,
    check_device,
    choose_preprocessing,
    make_probes,
    open_network,
    open_sources,
    run_on_probe,
    try_samples,
)
from compress.progress import Progress, SilentProgress, Stages
from compress.recipe import Recipe, TrainingOptions
from compress.report.model import (
    Inputs,
    SourceFile,
    TrainingReport,
    plain_data,
)
from compress.training.losses import check_answers
from compress.training.runner import Start, Taught, Training, split_source, teach
from compress.training.session import JOURNAL

DEFAULT_OUTPUTS = {"train": "-trained", "finetune": "-finetuned"}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a training did: the content of `training.json`, the folder, the network in eval mode."""

    report: TrainingReport
    folder: Path
    module: nn.Module


@reproducible()
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


def finetune_recipe(recipe: Recipe, progress: Progress | None = None, *, resume: bool = False) -> TrainResult:
    """Train the recipe's checkpoint on, or the network in a folder that this tool wrote; otherwise as `train`."""
    options = (recipe.training or TrainingOptions.model_validate({})).completed(finetuning=True)
    return train_from(load_start(recipe), recipe, options, progress or SilentProgress(), resume=resume)


def load_start(recipe: Recipe) -> Start:
    """The network of a checkpoint file or of a written folder. Raises CompressError."""
    opened = open_network(recipe)
    origin = SourceFile(Path(recipe.checkpoint).name, opened.checkpoint.sha256)
    cut = (opened.shapes, opened.attributes, opened.kept, opened.removed, opened.execution)
    return Start(opened.module, opened.architecture, origin, opened.checkpoint.state, *cut)


def train_from(
    start: Start, recipe: Recipe, options: TrainingOptions, progress: Progress, *, resume: bool
) -> TrainResult:
    """Train a network on the recipe's data, score it, and write it beside its final place, then put it in place."""
    kind = "train" if start.origin is None else "finetune"
    folder = Path(recipe.output or f"{Path(recipe.checkpoint).stem or 'network'}{DEFAULT_OUTPUTS[kind]}")
    check_exports(recipe.export)
    with reserved(folder, force=recipe.force):
        return train_into(folder, kind, start, recipe, options, progress, resume=resume)


def train_into(
    folder: Path, kind: str, start: Start, recipe: Recipe, options: TrainingOptions, progress: Progress, *, resume: bool
) -> TrainResult:
    """As `train_from`, into a folder that is held."""
    clock = Stages()
    with clock("prepare"):
        preprocessing = choose_preprocessing(recipe, start.architecture)
        sources = open_sources(recipe, preprocessing, progress, needs_data=True)
        work = make_training(start, recipe, options, preprocessing, sources)
    state = open_state(folder, fingerprint(work.inputs, options, recipe), resume=resume, force=recipe.force)
    with going_on_later(state.folder):
        taught = teach(work, recipe, progress, clock, kind=kind, folder=state.folder)
    journal = state.folder / JOURNAL
    beside = (journal,) if journal.is_file() else ()
    report = write_taught(folder, work, taught, recipe, clock, progress, beside=beside)
    shutil.rmtree(state.folder, ignore_errors=True)
    return TrainResult(report, folder, taught.module)


def make_training(
    start: Start,
    recipe: Recipe,
    options: TrainingOptions,
    preprocessing: Preprocessing | None,
    sources: tuple[DataSource | None, DataSource | None, int],
) -> Training:
    """Try a network on its data, and split that.

    Args:
        sources: as `open_sources` gives them.

    Raises:
        CompressError: the data has no labels or targets that the loss takes, or the network does not run on it.
    """
    device = check_device(recipe.device)
    module = start.module.to(device)
    source, evaluation, overlapping = sources
    source, evaluation = call_by_names(module, source, evaluation)
    assert source is not None, "asked for"
    probes = make_probes(recipe, start.architecture, source)
    examples, outputs = run_on_probe(module.eval(), [tuple(part.to(device) for part in probe) for probe in probes])
    source = Cast(source, examples[0].dtype)
    evaluation = None if evaluation is None else Cast(evaluation, examples[0].dtype)
    check_answers(options.loss, source, outputs)
    if evaluation is not None:
        try_samples(module, evaluation, "--eval", examples[0], named_outputs(outputs))
    if evaluation is not None and evaluation.targets is not None:
        check_answers(options.loss, evaluation, outputs)
    elif evaluation is not None and evaluation.has_labels:
        need_place(describe_outputs(named_outputs(outputs), len(examples[0]), (evaluation,), Hints()), evaluation)
    if (options.crop or options.flip) and examples[0].ndim != 4:
        raise RecipeError(f"training: crop and flip are for images; samples have shape {tuple(examples[0].shape[1:])}.")
    training, validation = split_source(source, options.held_back, recipe.seed)
    inputs = Inputs(
        checkpoint=start.origin,
        architecture=describe_architecture(start.architecture, examples, None, call_of(module)),
        data=describe_data(
            recipe,
            source,
            (training.sample_count, 0 if validation is None else validation.sample_count),
            evaluation,
            overlapping,
            preprocessing,
        ),
        seed=recipe.seed,
        versions=versions(),
    )
    return Training(start, options, source, training, validation, evaluation, examples, inputs)


def write_taught(
    folder: Path,
    work: Training,
    taught: Taught,
    recipe: Recipe,
    clock: Stages,
    progress: Progress,
    *,
    beside: tuple[Path, ...] = (),
    original: nn.Module | None = None,
) -> TrainingReport:
    """Write a trained network into its folder; gives the report as written.

    Args:
        beside: further files that go into the folder.
        original: the network that it is rebuilt from when it is reloaded, where no import can build that.

    Raises:
        CompressError: it cannot be written, or does not reload.
    """
    start = work.start
    network = Finished(
        module=taught.module,
        stored=taught.stored,
        examples=work.examples,
        original=original,
        arch=file_arch(start.architecture),
        shapes=start.shapes,
        attributes=start.attributes,
        kept=start.kept,
        removed=start.removed,
        execution=start.execution,
        beside=beside,
    )
    samples = work.evaluation or work.source
    return write_finished(folder, network, taught.report, recipe, lambda: first_samples(samples), clock, progress)


def fingerprint(inputs: Inputs, options: TrainingOptions, recipe: Recipe) -> dict[str, Any]:
    """What a training depends on, by contents, not by paths."""
    origin = inputs.checkpoint
    return {
        "network": {**plain_data(inputs.architecture), "sha256": None if origin is None else origin.sha256},
        "training data": inputs.data.fitting.fingerprint,
        "preprocessing": inputs.data.preprocessing,
        "seed": recipe.seed,
        "device": recipe.device,
        **options.model_dump(mode="json", exclude={"trainings"}),
        "versions": inputs.versions,
    }


def open_state(folder: Path, wanted: Mapping[str, Any], *, resume: bool, force: bool) -> RunState:
    """The folder beside the output where a training keeps its state. Raises OutputError, RecipeError."""
    place = state_folder(folder)
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

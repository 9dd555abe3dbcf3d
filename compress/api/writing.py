"""A finished network goes into a folder with its report: of a run and of a training alike."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.api.reporting import pages
from compress.artifact.checksums import write_checksums
from compress.artifact.exports.writing import EXPORTS, write_export
from compress.artifact.folder import RECIPE, check_reload, compare_reloaded, write_artifact, write_json
from compress.atomic import new_folder
from compress.checkpoint.architecture import Architecture
from compress.checkpoint.execution import Execution, is_channels_last
from compress.checkpoint.manifest import file_sha256, read_artifact
from compress.copying import deep_copy
from compress.data import DataSource, Preprocessing
from compress.data.calls import CallShape, gather
from compress.data.importing import absolute_spec, file_name_of, is_file_spec
from compress.errors import CompressError, OutputError, UnsupportedError
from compress.measures.outputs import named_outputs
from compress.progress import Progress, Stages
from compress.recipe import Recipe, format_recipe
from compress.report.model import ArchitectureUsed, DataUsed, ExportReport, InputUsed, Report, Samples, plain_data

RELOAD_TOLERANCE = 1e-5
EXPORT_SAMPLES = 64

AnyReport = TypeVar("AnyReport", bound=Report)


@dataclass(frozen=True, eq=False)
class Finished:
    """A network that is ready to be written.

    Attributes:
        module: in eval mode; `stored`: its tensors in the dtypes they are written in.
        examples: a small batch of every input, that the written one is compared on.
        arch: the user's own `file.py:factory` with its whole path, which a folder does not hold.
        original: what the written one is rebuilt from, where no import can build that; it is then reloaded here.
        shapes, attributes, kept, removed, execution: what makes a freshly built architecture this network.
        certificates: group name -> plain data, for the manifest.
        outputs: plain data of those that count, for the manifest.
        origin: SHA-256 of the checkpoint it came from.
        beside: further files that go into the folder.
    """

    module: nn.Module
    stored: Mapping[str, Tensor]
    examples: tuple[Tensor, ...]
    shapes: Mapping[str, Any]
    attributes: Mapping[str, Any]
    kept: Mapping[str, Any]
    certificates: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[dict[str, Any], ...] = ()
    origin: str | None = None
    original: nn.Module | None = None
    arch: str | None = None
    beside: tuple[Path, ...] = ()
    removed: Mapping[str, Any] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)


def file_arch(architecture: Architecture) -> str | None:
    """The user's own `file.py:factory` with its whole path; None where the network has another origin."""
    return absolute_spec(architecture.spec) if is_file_spec(architecture.spec) else None


def describe_architecture(
    architecture: Architecture, examples: Sequence[Tensor], batch_size: int | None, call: CallShape | None = None
) -> ArchitectureUsed:
    """An architecture as a report holds it; `examples` (B, …): what goes in, as `call` says."""
    first, *further = examples
    return ArchitectureUsed(
        spec=file_name_of(architecture.spec),
        arguments=dict(architecture.arguments),
        input_shape=tuple(first.shape[1:]),
        recognised=architecture.how,
        input_dtype=str(first.dtype).removeprefix("torch."),
        further_inputs=tuple(
            InputUsed(tuple(part.shape[1:]), str(part.dtype).removeprefix("torch.")) for part in further
        ),
        batch_size=batch_size,
        call=None if call is None else call.as_plain(),
    )


def describe_data(
    recipe: Recipe,
    source: DataSource,
    parts: Sequence[int],
    evaluation: DataSource | None,
    overlap: int,
    preprocessing: Preprocessing | None,
    guards: Sequence[DataSource] = (),
) -> DataUsed:
    """The data as a report holds it.

    Args:
        parts: samples of `source` that were fitted to, and that were held back.
        overlap: samples of the evaluation data that are in `source` too.
    """
    fitting, held_back = parts
    judged: Samples | None = None
    if evaluation is not None:
        judged = Samples(recipe.eval, evaluation.sample_count, evaluation.fingerprint, overlap=overlap)
    return DataUsed(
        fitting=Samples(recipe.data, fitting, source.fingerprint, held_back=held_back),
        evaluation=judged,
        preprocessing=describe_preprocessing(preprocessing),
        guards=tuple(
            Samples(spec, guard.sample_count, guard.fingerprint)
            for guard, (_, spec) in zip(guards, recipe.guards, strict=True)
        ),
    )


def describe_preprocessing(preprocessing: Preprocessing | None) -> dict[str, Any] | None:
    """Preprocessing as a report holds it."""
    return None if preprocessing is None else preprocessing.as_dict()


def write_finished(
    folder: Path,
    network: Finished,
    report: AnyReport,
    recipe: Recipe,
    samples: Callable[[], tuple[Tensor, ...]],
    clock: Stages,
    progress: Progress,
) -> AnyReport:
    """Write a network beside its final place, reload it in a fresh process, export it, then put all in place.

    Args:
        samples: gives real inputs (N, …), one tensor for each input, that exports are compared on.

    Returns:
        The report as it was written.

    Raises:
        OutputError: the written network gives other outputs.
        UnsupportedError, OutputError: an export failed; the rest is in place.
    """
    progress.stage("writing and reloading")
    laid_out = Execution(channels_last=is_channels_last(network.module))
    execution = network.execution.and_then(laid_out, {}).as_dict()
    manifest = {
        **plain_data(report.inputs),
        **{name: dict(getattr(network, name)) for name in ("shapes", "attributes", "kept", "certificates")},
        **({"removed": dict(network.removed)} if network.removed else {}),
        **({"execution": execution} if execution else {}),
        "outputs": list(network.outputs),
        "hashes": {} if network.origin is None else {"checkpoint": network.origin},
    }
    with torch.inference_mode():
        expected = named_outputs(network.module(*network.examples))
    with new_folder(folder, force=recipe.force) as draft, tempfile.TemporaryDirectory() as scratch:
        hashes = write_artifact(draft, network.stored, manifest, {RECIPE: format_recipe(recipe)})["hashes"]
        report = report.reloaded(reload(network, draft, expected, Path(scratch)))
        for file in network.beside:
            shutil.copyfile(file, draft / file.name)
            hashes[file.name] = file_sha256(draft / file.name)
        made, faults = export_all(recipe.export, draft, report, network.module, samples, progress, network.arch)
        report = replace(
            report.with_exports(made),
            hashes=hashes,
            notes=(*report.notes, *(f"not exported to {kind}: {fault}" for kind, fault in faults)),
            seconds=dict(clock.seconds),
        )
        write_report(draft, report)
        write_checksums(draft)
    if faults:
        reasons = " ".join(str(fault) for _, fault in faults)
        raise type(faults[0][1])(f"The network was written to {str(folder)!r}, but not every export: {reasons}")
    return report


def reload(network: Finished, draft: Path, expected: Mapping[str, Tensor], scratch: Path) -> float:
    """Load what was written, run the examples and compare with `expected`; the largest relative deviation.

    Raises:
        OutputError: it does not load, or gives other outputs.
    """
    if network.original is None:
        return check_reload(draft, network.examples, expected, RELOAD_TOLERANCE, scratch, arch=network.arch)
    artifact = read_artifact(draft)
    module = artifact.called(artifact.build(model=gather(copy.copy(network.original))))
    again = module.to(network.examples[0].device)
    with torch.inference_mode():
        return compare_reloaded(expected, named_outputs(again(*network.examples)), RELOAD_TOLERANCE)


def export_all(
    kinds: Iterable[str],
    draft: Path,
    report: Report,
    module: nn.Module,
    samples: Callable[[], tuple[Tensor, ...]],
    progress: Progress,
    arch: str | None = None,
) -> tuple[list[ExportReport], list[tuple[str, CompressError]]]:
    """Every export of the artifact in `draft` that works, and (kind, fault) of those that do not; no file of them."""
    exports: list[ExportReport] = []
    faults: list[tuple[str, CompressError]] = []
    for kind in kinds:
        progress.stage(f"exporting {kind}")
        try:
            exports.append(export_one(kind, draft, report, module, samples(), arch))
        except (UnsupportedError, OutputError) as error:
            faults.append((kind, error))
    return exports, faults


def export_one(
    kind: str, draft: Path, report: Report, module: nn.Module, samples: tuple[Tensor, ...], arch: str | None
) -> ExportReport:
    """One export of the artifact in `draft`, compared on samples.

    Raises:
        UnsupportedError: the network has no such form; no file is left.
        OutputError: the file gives other outputs; no file is left.
    """
    copied = deep_copy(module).cpu()
    try:
        return write_export(
            kind, draft, report, copied, samples, only_batch=report.inputs.architecture.batch_size, arch=arch
        )
    except CompressError:
        target = draft / EXPORTS[kind]
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        raise


def first_samples(source: DataSource) -> tuple[Tensor, ...]:
    """The first samples' inputs (N, …), as many as exports are compared on."""
    return next(iter(source.batches(EXPORT_SAMPLES, torch.arange(min(EXPORT_SAMPLES, source.sample_count))))).tensors


def write_report(folder: Path, report: Report) -> None:
    """Write a report and the pages made from it into a folder."""
    write_json(folder / report.FILE, report.to_json())
    for name, text in pages(report).items():
        (folder / name).write_text(text, encoding="utf-8")

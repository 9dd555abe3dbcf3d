"""write_exports(): the artifact in further formats, each loaded again and compared before it counts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artifact.exports.hub_folder import write_hub_folder
from compress.artifact.exports.onnx_file import NEEDED, OnnxNetwork, need, write_onnx
from compress.artifact.exports.pt2_file import keeps_weights_raw, load_pt2, write_pt2
from compress.artifact.folder import check_reload
from compress.checkpoint.manifest import file_sha256, open_artifact
from compress.errors import OutputError, RecipeError, UnsupportedError
from compress.graph.cost import latency_batches, measure_latency
from compress.measures.outputs import largest_deviation, named_outputs
from compress.report.model import ExportCheck, ExportLatency, ExportReport, Report

EXPORTS = {"onnx": "model.onnx", "pt2": "model.pt2", "hf": "hf"}
BATCHES = (1, 3)  # batch sizes at which a file is compared with the network
TOLERANCE = 1e-4  # relative deviation that another runtime's rounding may make
Inputs = tuple[Tensor, ...]  # (N, …) each
PLACES = {
    "onnx": "onnxruntime",
    "pt2": "torch.export, in a fresh process",
    "hf": "torch, in a fresh process",
}


def check_exports(kinds: Sequence[str]) -> None:
    """Refuse unknown kinds, and those whose packages are missing, before any work. Raises CompressError."""
    unknown = [kind for kind in kinds if kind not in EXPORTS]
    if unknown:
        raise RecipeError(f"export: {unknown[0]!r} is not one of {', '.join(EXPORTS)}.")
    if "onnx" in kinds:
        need(*NEEDED)
    if "pt2" in kinds and not keeps_weights_raw():
        raise UnsupportedError(
            f"torch {torch.__version__} keeps the weights of a .pt2 file as a pickle, which compress neither writes "
            "nor reads; install a newer torch, or export to onnx."
        )


def write_export(
    kind: str,
    folder: Path,
    report: Report,
    module: nn.Module,
    samples: Inputs,
    *,
    only_batch: int | None = None,
    arch: str | None = None,
) -> ExportReport:
    """Write one export of the artifact in `folder` beside it, load it again and compare.

    Args:
        module: the compressed network, on the CPU.
        samples: real inputs (N, …) to compare on, one tensor for each input.
        only_batch: the one batch size that the network runs on.
        arch: the user's own `file.py:factory`, where that makes the network.

    Raises:
        UnsupportedError: the network has no such form.
        OutputError: the file gives other outputs.
    """
    target = folder / EXPORTS[kind]
    batches = [first_samples(samples, size) for size in ((only_batch,) if only_batch else BATCHES)]
    opset = None
    reader: Callable[[Path], nn.Module]
    if kind == "onnx":
        opset = write_onnx(module, traced(samples, only_batch), target, dynamic=only_batch is None)
        deviations = [compare(OnnxNetwork(target), module, batch) for batch in batches]
    else:
        if kind == "pt2":
            write_pt2(module, traced(samples, only_batch), target, dynamic=only_batch is None)
            reader = load_pt2
        else:
            write_hub_folder(folder, report, target)
            reader = partial(open_called, arch=arch)
        deviations = [compare(reader(target), module, batch) for batch in batches[:-1]]
        deviations.append(reload(target, module, batches[-1], arch))
    checks = tuple(ExportCheck(len(batch[0]), deviation) for batch, deviation in zip(batches, deviations, strict=True))
    made = ExportReport(kind, target.name, PLACES[kind], checks, opset=opset)
    if kind == "hf":
        return made
    latency = measure(OnnxNetwork(target), module, samples, only_batch) if kind == "onnx" else ()
    return replace(made, sha256=file_sha256(target), bytes=target.stat().st_size, latency=latency)


def open_called(folder: Path, arch: str | None) -> nn.Module:
    """The network in a folder; what that names was built in this process before."""
    return open_artifact(folder, arch=arch, trust_code=True)[1]


def write_exports(
    kinds: Sequence[str],
    folder: Path,
    report: Report,
    module: nn.Module,
    samples: Inputs,
    *,
    only_batch: int | None = None,
    arch: str | None = None,
) -> list[ExportReport]:
    """Write several exports; see `write_export`."""
    return [write_export(kind, folder, report, module, samples, only_batch=only_batch, arch=arch) for kind in kinds]


def first_samples(samples: Inputs, count: int) -> Inputs:
    """The first `count` samples (count, …) of every input, again from the start where there are fewer."""
    return tuple(part[torch.arange(count) % len(part)] for part in samples)


def traced(samples: Inputs, only_batch: int | None) -> Inputs:
    """The batch that a network is traced with; two, so that no size is taken for a constant."""
    return first_samples(samples, only_batch or 2)


def compare(exported: nn.Module, module: nn.Module, batch: Inputs) -> float:
    """Largest deviation of any output, relative to its largest magnitude. Raises OutputError above the tolerance."""
    with torch.inference_mode():
        expected = named_outputs(module(*batch))
        outputs = named_outputs(exported(*batch))
    deviation, where = largest_deviation(expected, outputs)
    if not deviation <= TOLERANCE:
        said = "other outputs" if len(expected) == 1 else f"another output `{where}`"
        raise OutputError(
            f"The exported file gives {said} at batch size {len(batch[0])}: relative deviation {deviation:.1e}, "
            f"at most {TOLERANCE:.0e} was expected."
        )
    return deviation


def reload(target: Path, module: nn.Module, batch: Inputs, arch: str | None) -> float:
    """The same of a fresh process that loads the file or folder."""
    with torch.inference_mode():
        expected = named_outputs(module(*batch))
    with tempfile.TemporaryDirectory() as scratch:
        return check_reload(target, batch, expected, TOLERANCE, Path(scratch), arch=arch)


def measure(
    exported: nn.Module, module: nn.Module, samples: Inputs, only_batch: int | None
) -> tuple[ExportLatency, ...]:
    """Latencies of the network in torch and of the exported file, their passes interleaved."""
    latencies = []
    for size in (only_batch,) if only_batch else latency_batches(samples):
        inputs = first_samples(samples, size)
        direct, other = measure_latency((module, exported), inputs, seconds=1.0)
        latencies.append(ExportLatency(size, direct.threads, other.milliseconds, direct.milliseconds))
    return tuple(latencies)

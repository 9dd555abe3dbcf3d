"""Scores of an artifact that a run wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.arithmetic import reproducible
from compress.checkpoint.manifest import Artifact, open_artifact
from compress.data import Cast, DataSource, Preprocessing, open_data
from compress.errors import DataError
from compress.measures.kinds import Hints, describe_outputs, need_place, read_class_counts
from compress.measures.outputs import Output
from compress.preparation import call_by_names, check_device
from compress.progress import Progress, SilentProgress
from compress.report.evaluation import Evaluation, evaluate_networks, network_outputs

PROBED = 2  # samples that show what the network returns


@reproducible()
def evaluate(
    folder: str | Path,
    eval_data: str,
    *,
    batch_size: int = 128,
    device: str = "cpu",
    arch: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores of a written artifact on evaluation data, with its own recorded preprocessing. Raises CompressError.

    `arch` and `trust_code`: as of `open_artifact`.
    """
    progress = progress or SilentProgress()
    check_device(device)
    artifact, module = open_artifact(folder, arch=arch, trust_code=trust_code)
    module = module.to(device)
    evaluation, _ = evaluate_artifact(artifact, module, eval_data, batch_size, device, progress)
    figures = {figure.key: figure.values[1] for figure in evaluation.figures}
    return {"folder": str(folder), "samples": evaluation.samples, **figures}


def evaluate_artifact(
    artifact: Artifact, module: nn.Module, eval_data: str, batch_size: int, device: str, progress: Progress
) -> tuple[Evaluation, str]:
    """Scores of the loaded network, and the fingerprint of the data."""
    source = open_evaluation(artifact, module, eval_data)
    progress.stage("evaluating", source.sample_count)
    only_batch = artifact.config["architecture"].get("batch_size")
    outputs, answered = artifact_outputs(artifact, module, source, device)
    evaluation = evaluate_networks(
        module,
        module,
        source.batches(only_batch or batch_size),
        outputs,
        answered,
        device=device,
        progress=progress,
        only_batch=only_batch,
    )
    return evaluation, source.fingerprint


def artifact_outputs(
    artifact: Artifact, module: nn.Module, source: DataSource, device: str
) -> tuple[tuple[Output, ...], str]:
    """The loaded network's outputs, as the run described them and as these data's labels or targets say.

    Raises:
        DataError: labels or targets fit no output.
    """
    size = artifact.config["architecture"].get("batch_size") or PROBED
    first = [part.to(device) for part in next(iter(source.batches(min(size, source.sample_count)))).tensors]
    with torch.inference_mode():
        tensors = network_outputs(module, first, artifact.config["architecture"].get("batch_size"))
    known = artifact.outputs
    hints = Hints(artifact.config["architecture"]["spec"], read_class_counts(module), known=known)
    weights = {name: float(known[name]["weight"]) if name in known else 0.0 for name in tensors} if known else {}
    outputs = describe_outputs(tensors, len(first[0]), (source,), hints, weights)
    if source.labels is None and source.targets is None:
        return outputs, ""
    return outputs, need_place(outputs, source).name


def open_evaluation(artifact: Artifact, module: nn.Module, spec: str) -> DataSource:
    """Data for a written artifact, with its recorded preprocessing and in the dtype it reads. Raises DataError."""
    data = artifact.config.get("data")
    if not isinstance(data, dict) or "preprocessing" not in data:
        raise DataError("The manifest does not say how inputs were prepared (`data.preprocessing` is missing).")
    recorded = data["preprocessing"]
    source = open_data(spec, None if recorded is None else Preprocessing.from_dict(recorded))
    (called,) = call_by_names(module, source)
    assert called is not None, "one was given"
    return Cast(called, getattr(torch, artifact.config["architecture"].get("input_dtype", "float32")))

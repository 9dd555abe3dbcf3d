"""Scores of an artifact that a run wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint.manifest import Artifact, open_artifact
from compress.data import Cast, DataSource, Preprocessing, open_data
from compress.errors import DataError
from compress.preparation import check_device
from compress.progress import Progress, SilentProgress
from compress.report.evaluation import Evaluation, evaluate_networks
from compress.report.markdown import evaluation_report


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
    found, _ = evaluate_artifact(artifact, module, eval_data, batch_size, device, progress)
    report = evaluation_report(found)
    assert report is not None, "there was data"
    error = {} if found.squared_error is None else {"squared_error": found.squared_error[1]}
    return {"folder": str(folder), "samples": found.samples, **(report["compressed"] or {}), **error}


def evaluate_artifact(
    artifact: Artifact, module: nn.Module, eval_data: str, batch_size: int, device: str, progress: Progress
) -> tuple[Evaluation, str]:
    """Scores of the loaded network, and the fingerprint of the data."""
    source = open_evaluation(artifact, eval_data)
    progress.stage("evaluating", source.sample_count)
    only_batch = artifact.config["architecture"].get("batch_size")
    evaluation = evaluate_networks(
        module,
        module,
        source.batches(only_batch or batch_size),
        device=device,
        progress=progress,
        only_batch=only_batch,
    )
    return evaluation, source.fingerprint


def open_evaluation(artifact: Artifact, spec: str) -> DataSource:
    """Data for a written artifact, with its recorded preprocessing and in the dtype it reads. Raises DataError."""
    data = artifact.config.get("data")
    if not isinstance(data, dict) or "preprocessing" not in data:
        raise DataError("The manifest does not say how inputs were prepared (`data.preprocessing` is missing).")
    recorded = data["preprocessing"]
    source = open_data(spec, None if recorded is None else Preprocessing.from_dict(recorded))
    return Cast(source, getattr(torch, artifact.config["architecture"].get("input_dtype", "float32")))

"""compress verify: an artifact is looked at again, from its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.api.evaluating import evaluate_artifact
from compress.api.measuring import LATENCY_BATCHES
from compress.api.reporting import MALFORMED, explain, is_training, read_report, read_training
from compress.artifact.checksums import check_checksums
from compress.checkpoint.manifest import Artifact, open_artifact
from compress.checkpoint.restoring import named_tensors
from compress.errors import CompressError, DataError, OutputError, RecipeError, UntrustedCodeError
from compress.graph.cost import batch_of, count_macs, count_parameters, measure_latency
from compress.measures.outputs import named_outputs
from compress.preparation import check_device
from compress.progress import Progress, SilentProgress
from compress.report.checks import Check, check_drop, failures
from compress.report.evaluation import Evaluation

TOLERANCE = 0.1  # points of accuracy by which another machine may differ
ERROR_TOLERANCE = 1e-3  # of a squared error, relative


def verify(
    folder: str | Path,
    eval_data: str | None = None,
    *,
    max_drop: float | None = None,
    tolerance: float = TOLERANCE,
    batch_size: int = 128,
    device: str = "cpu",
    arch: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a written folder against itself: hashes, widths, costs; accuracy where there is data; latency measured.

    Nothing is built from a folder whose hashes do not hold. The hashes tell damage and carelessness, not forgery.

    Args:
        max_drop: also a gate: points of accuracy that may be lost against the original's in the report.
        tolerance: points by which the accuracy may differ from the report's.
        arch, trust_code: as of `open_artifact`.

    Returns:
        `passed`, `checks` (each name, wanted, measured, passed, message), `evaluation` and `latency`.

    Raises:
        CompressError: the folder was not written by this tool, or the data cannot be used.
    """
    progress = progress or SilentProgress()
    check_device(device)
    if max_drop is not None and eval_data is None:
        raise RecipeError("max_drop needs evaluation data: give eval.")
    folder = Path(folder)
    report = read_claims(folder) if is_training(folder) else read_report(folder)
    checks = check_files(folder)
    word = {"arch": arch, "trust_code": trust_code}
    found: dict[str, Any] = {"folder": str(folder), "evaluation": None, "latency": []}
    if not failures(checks):
        try:
            checks += check_network(
                folder, report, found, eval_data, max_drop, tolerance, batch_size, device, word, progress
            )
        except MALFORMED as error:
            raise OutputError(f"{str(folder)!r} is damaged: {explain(error)}.") from None
    found["passed"] = not failures(checks)
    found["checks"] = [check.as_report() for check in checks]
    return found


def read_claims(folder: Path) -> dict[str, Any]:
    """What a training says about its network, in the form of a run's report. Raises OutputError."""
    training = read_training(folder)
    try:
        scored = training["evaluation"]
        evaluation = None
        if scored is not None:
            evaluation = {"original": scored["original"], "compressed": scored["trained"]}
            if scored.get("loss") == "squared":
                evaluation["squared_error"] = [None, scored["trained"]["loss"]]
        return {
            "layers": [],
            "cost": {name: [None, training[name]] for name in ("parameters", "macs")} | {"latency": []},
            "evaluation": evaluation,
            "data": training["data"],
        }
    except MALFORMED as error:
        raise OutputError(f"{str(folder)!r} is damaged: {explain(error)}.") from None


def check_files(folder: Path) -> list[Check]:
    """Every file against the list of hashes."""
    found = check_checksums(folder)
    return [
        Check(
            name=f"file {name}",
            wanted="as it was written",
            measured=status,
            passed=status == "same",
            message=f"{name} is {status}" if status != "same" else f"{name} is as it was written",
        )
        for name, status in found.items()
    ]


def check_network(
    folder: Path,
    report: Mapping[str, Any],
    found: dict[str, Any],
    eval_data: str | None,
    max_drop: float | None,
    tolerance: float,
    batch_size: int,
    device: str,
    word: Mapping[str, Any],
    progress: Progress,
) -> list[Check]:
    """The network as it loads, against the manifest and the report; fills in `evaluation` and `latency`."""
    progress.stage("loading")
    try:
        artifact, module = open_artifact(folder, **word)
        module = module.to(device)
    except UntrustedCodeError:
        raise
    except CompressError as error:
        return [Check("the model loads", "a network", "a fault", False, f"The model does not load: {error}")]
    checks = [Check("the model loads", "a network", type(module).__name__, True, "The model loads")]
    checks += check_widths(artifact, module, report)
    probe = make_probe(artifact, device)
    with torch.inference_mode():
        outputs = named_outputs(module(probe))
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in outputs.values())
    checks.append(
        Check("outputs", "finite numbers", "finite" if finite else "NaN or Inf", finite, "Outputs on a first batch")
    )
    for name, value in (("parameters", count_parameters(module)), ("macs", count_macs(module, (probe,)))):
        wanted = report["cost"][name][1]
        same = f"{name}: the report says {wanted:,}, the network has {value:,}"
        checks.append(Check(name, f"{wanted:,}", f"{value:,}", value == wanted, same))
    if eval_data is not None:
        evaluation, fingerprint = evaluate_artifact(artifact, module, eval_data, batch_size, device, progress)
        scored = evaluation.compressed
        found["evaluation"] = {
            "samples": evaluation.samples,
            "fingerprint": fingerprint,
            **({} if scored is None else {"top1": scored.top1, "loss": scored.loss}),
            **({} if evaluation.squared_error is None else {"squared_error": evaluation.squared_error[1]}),
        }
        checks += check_accuracy(evaluation, fingerprint, report, max_drop, tolerance)
    progress.stage("measuring latency")
    found["latency"] = measure(artifact, module, probe, report)
    return checks


def check_widths(artifact: Artifact, module: nn.Module, report: Mapping[str, Any]) -> list[Check]:
    """The tensors' shapes against the manifest, and the kept units against the report."""
    held = {**named_tensors(module), **artifact.state}  # the file, and buffers that no file holds
    wrong = [
        name
        for name, shape in artifact.config["shapes"].items()
        if name not in held or list(held[name].shape) != list(shape)
    ]
    checks = [
        Check(
            name="shapes",
            wanted=f"{len(artifact.config['shapes'])} tensors as in the manifest",
            measured=f"{len(wrong)} differ",
            passed=not wrong,
            message="Shapes are those of the manifest" if not wrong else f"Other shapes: {', '.join(wrong[:5])}",
        )
    ]
    kept = artifact.config["kept"]
    for layer in report["layers"]:
        if "skipped" not in layer:
            name, wanted = layer["name"], layer["kept"]
            count = len(kept[name]) if name in kept else layer["units"]
            said = f"{name}: the report says {wanted} units, the manifest {count}"
            checks.append(Check(f"width of {name}", str(wanted), str(count), count == wanted, said))
    return checks


def check_accuracy(
    evaluation: Evaluation, fingerprint: str, report: Mapping[str, Any], max_drop: float | None, tolerance: float
) -> list[Check]:
    """The accuracy, or the squared error, against the report's, where both are of the same samples.

    Raises:
        DataError: a gate was asked for on samples that the original was not evaluated on.
    """
    recorded, own = report["evaluation"], report["data"]["evaluation"]
    same = recorded is not None and own is not None and own["fingerprint"] == fingerprint
    if same and max_drop is None and evaluation.squared_error is not None and "squared_error" in recorded:
        return [check_squared_error(recorded["squared_error"][1], evaluation.squared_error[1])]
    scored = evaluation.compressed is not None and same and "top1" in (recorded["compressed"] or {})
    if not scored or (max_drop is not None and recorded["original"] is None):
        why = "The report holds no accuracy on these samples, so there is nothing to compare with"
        if max_drop is not None:
            raise DataError(f"{why}; --max-drop needs the evaluation data and labels of the run.")
        return [Check("accuracy as reported", "the report's samples", "other samples", None, why)]
    assert evaluation.compressed is not None, "checked above"
    wanted, value = (100 * top1 for top1 in (recorded["compressed"]["top1"], evaluation.compressed.top1))
    close = abs(value - wanted) <= tolerance + 1e-9
    said = f"The report says {wanted:.2f} % on these samples, {value:.2f} % was measured"
    checks = [Check("accuracy as reported", f"{wanted:.2f} ± {tolerance:g} %", f"{value:.2f} %", close, said)]
    return checks if max_drop is None else [*checks, check_drop(100 * recorded["original"]["top1"] - value, max_drop)]


def check_squared_error(wanted: float, value: float) -> Check:
    """The squared error against the report's, which another machine may change in its fourth digit."""
    close = abs(value - wanted) <= ERROR_TOLERANCE * wanted
    said = f"The report says {wanted:.5g} on these samples, {value:.5g} was measured"
    return Check("squared error as reported", f"{wanted:.5g}", f"{value:.5g}", close, said)


def make_probe(artifact: Artifact, device: str) -> Tensor:
    """A small batch of valid inputs: seeded noise, or zeros where the network reads whole numbers."""
    architecture = artifact.config["architecture"]
    dtype = getattr(torch, architecture.get("input_dtype", "float32"))
    shape = (architecture.get("batch_size") or 2, *artifact.input_shape)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device=device, dtype=dtype)


def measure(artifact: Artifact, module: nn.Module, probe: Tensor, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Latency of the loaded network, beside what the report says; another machine gives other numbers."""
    only_batch = artifact.config["architecture"].get("batch_size")
    recorded = {one["batch_size"]: one["after_ms"] for one in report["cost"]["latency"]}
    found = []
    for batch in LATENCY_BATCHES if only_batch is None else (only_batch,):
        inputs = batch_of((probe,), None if only_batch is not None else batch)
        latency = measure_latency((module,), inputs)[0]
        found.append(
            {
                "batch_size": batch,
                "threads": latency.threads,
                "device": latency.device,
                "milliseconds": latency.milliseconds,
                "recorded_milliseconds": recorded.get(batch),
            }
        )
    return found

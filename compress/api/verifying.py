"""compress verify: an artifact is looked at again, from its files alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.api.evaluating import evaluate_artifact
from compress.api.reporting import read_any_report
from compress.arithmetic import reproducible
from compress.artifact.checksums import check_checksums
from compress.checkpoint.manifest import TOKENS, Artifact, open_artifact
from compress.checkpoint.restoring import named_tensors
from compress.errors import CompressError, DataError, RecipeError, UntrustedCodeError, first_line
from compress.graph.cost import batch_of, count_macs, count_parameters, latency_batches, measure_latency
from compress.measures.figures import GATED, Figure
from compress.measures.outputs import are_numbers, named_outputs
from compress.measures.statistics import SLACK
from compress.preparation import FORWARD_FAULTS, check_device
from compress.progress import Progress, SilentProgress
from compress.report.checks import check_doubt, check_drop, failures
from compress.report.doubts import near_chance, too_few
from compress.report.evaluation import Evaluation
from compress.report.model import Check, Claims

TOLERANCE = 0.1  # points of accuracy by which another machine may differ
ERROR_TOLERANCE = 1e-3  # of a squared error, relative


RUNS = "the model runs"


@dataclass(frozen=True)
class MeasuredScores:
    """What the network in a folder scored now. `figures`: by key; empty where the data has no labels and targets."""

    samples: int
    fingerprint: str
    figures: dict[str, float]


@dataclass(frozen=True)
class MeasuredLatency:
    """Milliseconds a batch of the network in a folder, now and as its report has it."""

    batch_size: int
    threads: int
    device: str
    milliseconds: float
    recorded_milliseconds: float | None


@dataclass(frozen=True)
class Verified:
    """What was found when a folder was looked at again.

    Attributes:
        passed: no check failed.
        evaluation, latency: None and empty where nothing was measured.
    """

    folder: str
    passed: bool
    checks: tuple[Check, ...]
    evaluation: MeasuredScores | None = None
    latency: tuple[MeasuredLatency, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        document = asdict(self)
        if self.evaluation is not None:
            document["evaluation"] |= document["evaluation"].pop("figures")
        return document


@reproducible()
def verify(
    folder: str | Path,
    eval_data: str | None = None,
    *,
    max_drop: float | None = None,
    tolerance: float = TOLERANCE,
    force_gate: bool = False,
    batch_size: int = 128,
    device: str = "cpu",
    arch: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Check a written folder against itself: hashes, widths, costs; accuracy where there is data; latency measured.

    Nothing is built from a folder whose hashes do not hold. The hashes tell damage and carelessness, not forgery.

    Args:
        max_drop: also a gate: points of accuracy that may be lost against the original's in the report.
        tolerance: points by which the accuracy may differ from the report's.
        force_gate: let the gate pass although the evaluation data cannot show a loss.
        arch, trust_code: as of `open_artifact`.

    Raises:
        CompressError: the folder was not written by this tool, or the data cannot be used.
    """
    progress = progress or SilentProgress()
    check_device(device)
    if max_drop is not None and eval_data is None:
        raise RecipeError("max_drop needs evaluation data: give eval.")
    folder = Path(folder)
    claims = read_any_report(folder).claims()
    checks = check_files(folder)
    if failures(checks):
        return Verified(str(folder), False, tuple(checks))
    progress.stage("loading")
    try:
        artifact, module = open_artifact(folder, arch=arch, trust_code=trust_code)
        module = module.to(device)
    except UntrustedCodeError:
        raise
    except CompressError as error:
        fault = Check("the model loads", "a network", "a fault", False, f"The model does not load: {error}")
        return Verified(str(folder), False, (*checks, fault))
    examples = find_examples(artifact, module, device)
    checks += check_network(artifact, module, examples, claims)
    if not checks[-1].passed and checks[-1].name == RUNS:
        return Verified(str(folder), False, tuple(checks))
    scores = None
    if eval_data is not None:
        evaluation, fingerprint = evaluate_artifact(artifact, module, eval_data, batch_size, device, progress)
        figures = {figure.key: figure.values[1] for figure in evaluation.figures}
        scores = MeasuredScores(evaluation.samples, fingerprint, figures)
        checks += check_accuracy(evaluation, fingerprint, claims, max_drop, tolerance, force_gate)
    progress.stage("measuring latency")
    latency = measure(artifact, module, examples, claims)
    return Verified(str(folder), not failures(checks), tuple(checks), scores, latency)


def check_files(folder: Path) -> list[Check]:
    """Every file against the list of hashes."""
    statuses = check_checksums(folder)
    return [
        Check(
            name=f"file {name}",
            wanted="as it was written",
            measured=status,
            passed=status == "same",
            message=f"{name} is {status}" if status != "same" else f"{name} is as it was written",
        )
        for name, status in statuses.items()
    ]


def check_network(artifact: Artifact, module: nn.Module, examples: tuple[Tensor, ...], claims: Claims) -> list[Check]:
    """The network as it loads, against the manifest and the report; that it does not run is the last check."""
    checks = [Check("the model loads", "a network", type(module).__name__, True, "The model loads")]
    checks += check_widths(artifact, module, claims)
    try:
        with torch.inference_mode():
            outputs = named_outputs(module(*examples))
            finite = all(map(are_numbers, outputs.values()))
    except FORWARD_FAULTS as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in examples)
        said = f"The model does not run on inputs of shape {shapes}, as the manifest says them: {first_line(error)}"
        return [*checks, Check(RUNS, "a first batch", type(error).__name__, False, said)]
    checks.append(
        Check("outputs", "finite numbers", "finite" if finite else "NaN or Inf", finite, "Outputs on a first batch")
    )
    for name, wanted, value in (
        ("parameters", claims.parameters, count_parameters(module)),
        ("macs", claims.macs, count_macs(module, examples)),
    ):
        same = f"{name}: the report says {wanted:,}, the network has {value:,}"
        checks.append(Check(name, f"{wanted:,}", f"{value:,}", value == wanted, same))
    return checks


def check_widths(artifact: Artifact, module: nn.Module, claims: Claims) -> list[Check]:
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
    for name, width in claims.widths.items():
        count = len(kept[name]) if name in kept else width.before
        said = f"{name}: the report says {width.after} units, the manifest {count}"
        checks.append(Check(f"width of {name}", str(width.after), str(count), count == width.after, said))
    return checks


def check_accuracy(
    evaluation: Evaluation,
    fingerprint: str,
    claims: Claims,
    max_drop: float | None,
    tolerance: float,
    force_gate: bool,
) -> list[Check]:
    """What labels or targets say, against the report's figures, where both are of the same samples.

    Raises:
        DataError: a gate was asked for on samples that the original was not evaluated on.
    """
    known = claims.figures if claims.fingerprint == fingerprint else {}
    compared = [figure for figure in evaluation.figures if figure.key in (*GATED, "squared_error")]
    scored = [figure for figure in compared if figure.key in known]
    bounded = [figure for figure in scored if figure.key in GATED and known[figure.key][0] is not None]
    if not scored or (max_drop is not None and not bounded):
        why = "The report holds no accuracy on these samples, so there is nothing to compare with"
        if max_drop is not None:
            raise DataError(f"{why}; --max-drop needs the evaluation data and labels of the run.")
        return [Check("accuracy as reported", "the report's samples", "other samples", None, why)]
    checks = [check_figure(figure, known[figure.key][1], tolerance) for figure in scored]
    for figure in bounded:
        before, after = known[figure.key][0], figure.values[1]
        if max_drop is None or before is None:
            continue
        doubts = [] if force_gate else list(too_few(evaluation.samples, max_drop))
        if not force_gate and figure.hits is not None:
            doubts += near_chance(figure, before, evaluation.samples, evaluation.guess)
        checks += [*map(check_doubt, doubts), check_drop(100 * (before - after), max_drop, naming(figure))]
    return checks


def naming(figure: Figure) -> str:
    """A figure's name in a check."""
    return "accuracy" if figure.key == "top1" else figure.meaning.name


def check_figure(figure: Figure, wanted: float, tolerance: float) -> Check:
    """A figure against the report's: a share within points, a number within what another machine may change."""
    value, name = figure.values[1], f"{naming(figure)} as reported"
    if not figure.meaning.share:
        said = f"The report says {wanted:.5g} on these samples, {value:.5g} was measured"
        return Check(name, f"{wanted:.5g}", f"{value:.5g}", abs(value - wanted) <= ERROR_TOLERANCE * wanted, said)
    close = abs(value - wanted) * 100 <= tolerance + SLACK
    said = f"The report says {100 * wanted:.2f} % on these samples, {100 * value:.2f} % was measured"
    return Check(name, f"{100 * wanted:.2f} ± {tolerance:g} %", f"{100 * value:.2f} %", close, said)


def find_examples(artifact: Artifact, module: nn.Module, device: str) -> tuple[Tensor, ...]:
    """A small batch of every input that the network makes numbers of; of zeros in place of tokens where none is."""
    candidates = [artifact.examples(token, device) for token in TOKENS]
    for examples in candidates:
        try:
            with torch.inference_mode():
                outputs = named_outputs(module(*examples))
        except FORWARD_FAULTS:
            continue
        if all(map(are_numbers, outputs.values())):
            return examples
    return candidates[0]


def measure(
    artifact: Artifact, module: nn.Module, examples: tuple[Tensor, ...], claims: Claims
) -> tuple[MeasuredLatency, ...]:
    """Latency of the loaded network, beside what the report says; another machine gives other numbers."""
    only_batch = artifact.config["architecture"].get("batch_size")
    latencies = []
    for batch in latency_batches(examples) if only_batch is None else (only_batch,):
        inputs = batch_of(examples, None if only_batch is not None else batch)
        latency = measure_latency((module,), inputs)[0]
        recorded = claims.latency.get(batch)
        latencies.append(MeasuredLatency(batch, latency.threads, latency.device, latency.milliseconds, recorded))
    return tuple(latencies)

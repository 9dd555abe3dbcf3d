"""What the original and the compressed network score and cost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compress.compression.pricing.latency import Timing
from compress.errors import DataError, GateError
from compress.graph.cost import (
    batch_of,
    count_by_module,
    count_macs,
    count_parameters,
    latency_batches,
    measure_latency,
)
from compress.preparation import Prepared
from compress.progress import Progress
from compress.recipe import Recipe
from compress.report.checks import check_doubt, check_losses, failures, gated_keys
from compress.report.doubts import find_doubts
from compress.report.evaluation import Evaluation, evaluate_networks
from compress.report.model import CostReport, Counts, Latency, ModuleCost

FEW_PASSES = 15


def evaluate_pair(prepared: Prepared, compressed: nn.Module, recipe: Recipe, progress: Progress) -> Evaluation | None:
    """Both networks on the evaluation data, or None without any."""
    source = prepared.evaluation
    if source is None:
        return None
    progress.stage("evaluating", source.sample_count)
    only_batch = prepared.network.batch_size
    return evaluate_networks(
        prepared.network.module,
        compressed,
        source.batches(prepared.network.batch_within(recipe.batch_size)),
        prepared.network.outputs,
        prepared.network.answered if source.labels is not None or source.targets is not None else "",
        device=recipe.device,
        progress=progress,
        only_batch=only_batch,
        asked=gated_keys(recipe),
    )


def measure_costs(
    prepared: Prepared,
    compressed: nn.Module,
    stored: Mapping[str, Tensor],
    timing: Timing | None = None,
    passes: int = FEW_PASSES,
) -> CostReport:
    """Costs of the two networks and their latencies at each of `latency_batches`, and at the batch of `timing`.

    Args:
        passes: of each network, at most; more where time was what counts.
    """
    timing = timing or Timing()
    examples, only_batch, original = prepared.network.examples, prepared.network.batch_size, prepared.opened.module
    latencies = []
    for batch in sorted({*latency_batches(examples), timing.batch}) if only_batch is None else (only_batch,):
        inputs = batch_of(examples, None if only_batch is not None else batch)
        with timing.running():
            before, after = measure_latency((original, compressed), inputs, most=passes)
        latencies.append(Latency(batch, before.threads, before.device, before.milliseconds, after.milliseconds))
    return CostReport(
        parameters=Counts(*(count_parameters(module) for module in (original, compressed))),
        macs=Counts(*(count_macs(module, examples) for module in (original, compressed))),
        bytes=Counts(tensor_bytes(prepared.stored), tensor_bytes(stored)),
        latency=tuple(latencies),
    )


def measure_modules(prepared: Prepared, compressed: nn.Module) -> tuple[ModuleCost, ...]:
    """What each part of the network costs, before and after."""
    before, after = (
        count_by_module(module, prepared.network.examples) for module in (prepared.opened.module, compressed)
    )
    return tuple(
        ModuleCost(name, *(Counts(*pair) for pair in zip(costs, costs_after(name, before, after), strict=True)))
        for name, costs in before.items()
    )


def costs_after(
    name: str, before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> tuple[int, ...]:
    """Parameters and multiply-accumulates of a module, or of the two new ones in its place."""
    inside = [part for part in after if part.startswith(f"{name}.") and part not in before]
    parts = [after[part] for part in (name, *inside) if part in after]
    return tuple(sum(counts) for counts in zip(*parts, strict=True)) or (0, 0)


def tensor_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors of a state dict take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def loses_too_much(recipe: Recipe, evaluation: Evaluation | None) -> bool:
    """Whether the evaluated accuracy falls by more than `max_drop` points, or may, where a confidence is asked for."""
    if recipe.bound is None or evaluation is None or recipe.own_metric:
        return False
    return bool(failures(check_losses(evaluation, recipe.bound, gated_keys(recipe))))


def check_original(prepared: Prepared, recipe: Recipe, progress: Progress) -> None:
    """Refuse, before any work, an accuracy gate that these evaluation data cannot decide. Raises GateError."""
    bound, keys = recipe.bound, gated_keys(recipe)
    if bound is None or recipe.own_metric or (recipe.force_gate and recipe.metric is None):
        return
    evaluation = evaluate_pair(prepared, prepared.network.module, recipe, progress)
    if evaluation is not None and evaluation.figure(*keys) is None and recipe.metric is not None:
        known = ", ".join(figure.key.replace("_", "-") for figure in evaluation.figures) or "none"
        raise DataError(f"--metric {recipe.metric.replace('_', '-')}: the figures of these data are {known}.")
    doubts = [] if evaluation is None or recipe.force_gate else find_doubts(evaluation, bound, keys)
    if doubts:
        raise GateError(f"{'; '.join(check_doubt(doubt).message for doubt in doubts)}; nothing was compressed.")

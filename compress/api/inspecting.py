"""What could be compressed, without compressing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.api.widths import check_patterns, make_problem
from compress.compression.problem import record_all, select_groups
from compress.diagnostics.deep import describe_depth
from compress.diagnostics.layers import describe_group, describe_moments
from compress.diagnostics.lipschitz import jacobian_norms
from compress.graph.cost import count_macs, count_parameters
from compress.preparation import prepare
from compress.progress import Progress, SilentProgress
from compress.recipe import Recipe

LIPSCHITZ_SAMPLES = 32


def inspect(recipe: Recipe, progress: Progress | None = None, *, deep: bool = False) -> dict[str, Any]:
    """What could be compressed: structure from the weights alone; ranks and dead units too where there is data.

    `deep` adds what the layers have learned (`describe_depth`) and the network's Jacobian norms; it needs data.

    Raises:
        CompressError: any fault. Nothing is solved and nothing is written.
    """
    progress = progress or SilentProgress()
    prepared = prepare(recipe, progress, needs_data=deep)
    check_patterns(prepared.network.groups, recipe.layer)
    selected = select_groups(prepared.network.groups, recipe.layer, recipe.exclude)
    layers = {group.name: describe_group(group, prepared.network.state) for group in selected}
    usable = tuple(group for group in selected if group.prunable)
    if prepared.calibration is not None and usable:
        problem = make_problem(prepared, recipe)
        groups = {group.name: group for group in usable}
        recorded = record_all(problem, progress)
        for name, reason in recorded.skipped.items():
            layers[name]["skipped"] = reason
        for name, moments in recorded.moments.items():
            layers[name].update(describe_moments(moments, recipe.rank_tolerance))
            if deep:
                layers[name].update(describe_depth(groups[name], moments, problem.state, recipe.rank_tolerance))
    found: dict[str, Any] = {
        "file": Path(recipe.checkpoint).name,
        "sha256": prepared.checkpoint.sha256,
        "state_key": prepared.checkpoint.state_key,
        "architecture": prepared.architecture.spec,
        "recognised": prepared.architecture.how,
        "input_shape": list(prepared.network.examples[0].shape[1:]),
        "parameters": count_parameters(prepared.network.module),
        "macs": count_macs(prepared.network.module, prepared.network.examples),
        "layers": list(layers.values()),
    }
    if (
        deep
        and prepared.calibration is not None
        and len(prepared.network.examples) == 1
        and prepared.network.examples[0].is_floating_point()
    ):
        count = min(LIPSCHITZ_SAMPLES, prepared.calibration.sample_count)
        if prepared.network.batch_size is not None:
            count = min(count, prepared.network.batch_size)
        inputs = next(iter(prepared.calibration.batches(count, torch.arange(count)))).inputs
        norms = jacobian_norms(prepared.network.module, inputs.to(prepared.network.examples[0].device))
        found["jacobian_norms"] = {"samples": count, "median": float(norms.median()), "largest": float(norms.max())}
    return found

"""What could be compressed, without compressing it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress.api.live import choose_progress, prepare_live
from compress.api.steps.widths import check_patterns, make_problem
from compress.arithmetic import reproducible
from compress.compression.problem import record_all, select_groups
from compress.data.importing import file_name_of
from compress.diagnostics.deep import describe_depth
from compress.diagnostics.layers import describe_group, describe_moments
from compress.diagnostics.lipschitz import jacobian_norms
from compress.errors import first_line
from compress.graph.cost import count_macs, count_parameters
from compress.preparation import Prepared, prepare
from compress.progress import Progress, SilentProgress
from compress.recipe import Recipe

LIPSCHITZ_SAMPLES = 32


@reproducible()
def inspect(
    network: Recipe | nn.Module,
    example: Any = None,
    *,
    data: Any = None,
    progress: Progress | bool | None = None,
    deep: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What could be compressed: structure from the weights alone; ranks and dead units too where there is data.

        compress.inspect(net, torch.randn(1, 3, 32, 32))
        compress.inspect(net, data=loader, layer="classifier")

    Args:
        network: a recipe, which names its data itself; or a module, that is not changed.
        example: of a module: what it is called with, a tensor, a tuple of arguments or a mapping of keywords.
        data: of a module: an iterable of batches, as `prune` takes it; without it an example will do.
        deep: also what the layers have learned (`describe_depth`) and the network's Jacobian norms; needs data.
        options: of a module: options of a recipe (`layer`, `exclude`, `couple`, `calibration_samples`, …).

    Raises:
        CompressError: any fault. Nothing is solved and nothing is written.
    """
    if isinstance(network, Recipe):
        given: Any = progress if example is None else example  # a progress may stand behind a recipe
        if options or data is not None or not (given is None or hasattr(given, "advance")):
            raise ValueError("a recipe says itself what is inspected; give data and options there.")
        shown: Progress = given or SilentProgress()
        return inspect_prepared(prepare(network, shown, needs_data=deep), network, shown, deep=deep)
    if example is None and data is None:
        raise ValueError("give `example`, what the module is called with, or `data`, an iterable of batches.")
    if deep and data is None:
        raise ValueError("`deep` looks at activations: give `data`, an iterable of batches.")
    shown = choose_progress(progress)
    prepared, recipe = prepare_live(network, [example] if data is None else data, None, options, shown, "inspect")
    if data is None:
        prepared = replace(prepared, calibration=None)
    return inspect_prepared(prepared, recipe, shown, deep=deep)


def inspect_prepared(prepared: Prepared, recipe: Recipe, progress: Progress, *, deep: bool) -> dict[str, Any]:
    """What could be compressed of a prepared network. Raises CompressError."""
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
    facts: dict[str, Any] = {
        "file": prepared.checkpoint.path.name,
        "sha256": prepared.checkpoint.sha256,
        "state_key": prepared.checkpoint.state_key,
        "architecture": file_name_of(prepared.architecture.spec),
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
        try:
            norms = jacobian_norms(prepared.network.module, inputs.to(prepared.network.examples[0].device))
        except RuntimeError as fault:  # of autograd: an operation without a second derivative, an output without one
            progress.note(
                f"norms of the Jacobian are left out, the network cannot be differentiated: {first_line(fault)}"
            )
        else:
            facts["jacobian_norms"] = {"samples": count, "median": float(norms.median()), "largest": float(norms.max())}
    return facts

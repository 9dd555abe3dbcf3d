"""Neural balance of a checkpoint: the same function with the least sum of squares that rescaling units can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.arithmetic import reproducible
from compress.atomic import new_file
from compress.checkpoint.fitting import load_weights
from compress.checkpoint.manifest import computed_state
from compress.checkpoint.reading.read import load_checkpoint
from compress.copying import deep_copy
from compress.data.importing import file_name_of
from compress.diagnostics.balance import Balanced, balance_units
from compress.errors import CheckpointError, OutputError, SurgeryError
from compress.preparation import Prepared, prepare
from compress.progress import Progress, SilentProgress
from compress.recipe import Recipe
from compress.units.scaling import find_scalings
from compress.units.surgery import module_outputs, relative_deviation

OUTPUT_TOLERANCE = 1e-5  # relative to the largest output, in the precision that the network computes in
CHECKED_SAMPLES = 64


@reproducible()
def balance(
    recipe: Recipe,
    *,
    per: Literal["unit", "layer"] = "unit",
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Balance a checkpoint and write its state dict, read back and verified; gives the report.

    Each rescaling is tried in float64 first (`find_scalings`). The written file's network then gives the original's
    outputs to 1e-5 of the largest, on up to 64 samples of the data (on noise without any). `output` is a safetensors
    file, by default FILE-balanced.safetensors in the current folder. Half-precision checkpoints are written in float32,
    since rounding back would move the outputs.

    Raises:
        CompressError: any fault of the file or the network; OutputError where the file exists and `force` is not given.
    """
    progress = progress or SilentProgress()
    target = Path(output or f"{Path(recipe.checkpoint).stem}-balanced.safetensors")
    if target.is_dir() or (target.exists() and not force):
        raise OutputError(f"The output {str(target)!r} exists; give --force to replace it, or choose another --output.")
    prepared = prepare(recipe, progress, needs_data=False)
    if prepared.opened.shapes:
        raise CheckpointError(
            f"{recipe.checkpoint!r} was cut, and a state dict alone would not say to which shapes; balance the network "
            "that it was made from."
        )
    progress.stage("balancing")
    scalings, reasons = find_scalings(
        prepared.network.graph, prepared.network.groups, prepared.network.state, seed=recipe.seed
    )
    names = [name for name, _ in prepared.network.module.named_parameters()]
    balanced = balance_units(prepared.network.state, scalings, names, per=per)
    progress.stage("writing and reading back")
    with new_file(target) as draft:
        save_file(balanced_state(prepared, balanced), draft, metadata={"format": "pt"})
        deviation = check_written(prepared, draft)
    return {
        "file": Path(recipe.checkpoint).name,
        "sha256": prepared.checkpoint.sha256,
        "architecture": file_name_of(prepared.architecture.spec),
        "output": str(target),
        "per": per,
        "sweeps": balanced.sweeps,
        "sum_of_squares": list(balanced.squares),
        "factor": balanced.factor,
        "weight_decay_objective": [value / 2 for value in balanced.squares],
        "sum_of_squares_with_biases": list(balanced.parameters),
        "deviation": deviation,
        "layers": list(balanced.layers),
        "left_alone": reasons,
    }


def balanced_state(prepared: Prepared, balanced: Balanced) -> dict[str, Tensor]:
    """The checkpoint's tensors with the balanced ones in their place, under the checkpoint's names."""
    stored = computed_state(prepared.stored)
    for name in stored:
        if name in balanced.state:
            stored[name] = balanced.state[name].cpu().to(stored[name].dtype)
    return {name: value.clone().contiguous() for name, value in stored.items()}


def check_written(prepared: Prepared, path: Path) -> float:
    """Largest relative deviation of the written network's outputs from the original's.

    Raises:
        SurgeryError: it is more than rounding.
    """
    inputs = prepared.network.examples[0]
    source = prepared.evaluation or prepared.calibration
    if source is not None and prepared.network.batch_size is None:
        numbers = torch.arange(min(CHECKED_SAMPLES, source.sample_count))
        inputs = next(iter(source.batches(CHECKED_SAMPLES, numbers))).inputs.to(inputs.device)
    written = deep_copy(prepared.network.module)
    load_weights(written, load_checkpoint(path).state)
    deviation = relative_deviation(
        module_outputs(prepared.network.module, (inputs,)), module_outputs(written, (inputs,))
    )
    if not deviation <= OUTPUT_TOLERANCE:
        raise SurgeryError(
            f"Balancing moved the outputs by {deviation:.1e} of the largest, more than {OUTPUT_TOLERANCE:.0e} allowed; "
            "nothing was written."
        )
    return deviation

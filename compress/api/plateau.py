"""Where the loss of small nets stops falling as they grow wider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.arithmetic import reproducible
from compress.data import open_data
from compress.errors import DataError, RecipeError
from compress.preparation import choose_preprocessing
from compress.progress import Progress
from compress.recipe import Recipe, TrainingOptions
from compress.recipe.texts import parse_counts
from compress.training.losses import answers_of
from compress.training.plateau import measure_plateau


@reproducible()
def plateau(
    recipe: Recipe,
    widths: str | Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    layers: int = 2,
    samples: int = 500,
    penalty: float = 1e-3,
    steps: int = 1000,
    seeds: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train fully connected nets of every width on the recipe's data and loss, and compare.

    Args:
        widths: of the hidden layers, as numbers or as a text with commas between them.
        samples: at most so many of the data's first samples.
        penalty: λ of the weight decay, in λ/2 Σ‖W‖².

    Returns:
        `losses` (each width, loss), `plateau_starts_at`, and the ranks and bounds it is compared with.

    Raises:
        CompressError: the data cannot be used, or no net can be trained on it with this loss.
    """
    try:
        counts = parse_counts(widths) if isinstance(widths, str) else tuple(widths)
    except ValueError as error:
        raise RecipeError(f"--widths: {error}.") from None
    if recipe.data is None:
        raise DataError("No training data: give --data.")
    loss = (recipe.training or TrainingOptions.model_validate({})).loss
    source = open_data(recipe.data, choose_preprocessing(recipe))
    if source.labels is None and source.targets is None:
        raise DataError(f"{recipe.data} has no labels and no targets; a net cannot be trained on it.")
    if source.targets is not None and loss == "cross_entropy":
        raise RecipeError("--loss: cross_entropy wants labels, and the data has real targets; give --loss squared.")
    batch = next(iter(source.batches(min(samples, source.sample_count))))
    measured = measure_plateau(
        batch.inputs.float(),
        answers_of(batch),
        counts,
        layers=layers,
        penalty=penalty,
        loss=loss,
        steps=steps,
        seeds=range(recipe.seed, recipe.seed + seeds),
        progress=progress,
    )
    return measured.describe()

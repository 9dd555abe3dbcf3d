"""`compress plateau`."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from compress.cli.app import app
from compress.cli.options import Json, Mean, Std, parse_counts, parse_numbers, print_json
from compress.errors import DataError, RecipeError


@app.command("plateau")
def plateau_command(
    data: Annotated[str, Option(help="Training data with labels, as for a run.")],
    widths: Annotated[str, Option(help="Widths to train, such as 1,2,5,10,20.")] = "1,2,4,8,16,32",
    layers: Annotated[int, Option(help="Linear layers, 2 or more.", min=2)] = 2,
    samples: Annotated[int, Option(help="At most so many samples, the first ones.", min=2)] = 500,
    penalty: Annotated[float, Option(help="λ of the weight decay, in λ/2 Σ‖W‖².", min=0)] = 1e-3,
    loss: Annotated[str, Option(help="cross_entropy, squared or poisson.")] = "cross_entropy",
    steps: Annotated[int, Option(help="Full-batch steps for each net.", min=1)] = 1000,
    seeds: Annotated[int, Option(help="Nets for each width; the best one counts.", min=1)] = 1,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """Train small nets over widths and say where the loss plateaus: `compress plateau --data digits`."""
    from compress.data import Preprocessing, open_data
    from compress.training.losses import LOSSES, answers_of
    from compress.training.plateau import measure_plateau

    if loss not in LOSSES:
        raise RecipeError(f"loss: one of {', '.join(LOSSES)} was expected, got {loss!r}.")
    try:
        counts = parse_counts(widths)
        given: dict[str, Any] = {
            name: parse_numbers(text) for name, text in (("mean", mean), ("std", std)) if text is not None
        }
    except ValueError as error:
        raise RecipeError(f"{error}.") from None
    source = open_data(data, Preprocessing(**given) if given else None)
    if source.labels is None and source.targets is None:
        raise DataError(f"{data} has no labels and no targets; a net cannot be trained on it.")
    if source.targets is not None and loss == "cross_entropy":
        raise RecipeError("loss: cross_entropy wants labels, and the data has real targets; give --loss squared.")
    batch = next(iter(source.batches(min(samples, source.sample_count))))
    from compress.cli.display import StderrProgress

    with StderrProgress() as progress:
        found = measure_plateau(
            batch.inputs.float(),
            answers_of(batch),
            counts,
            layers=layers,
            penalty=penalty,
            loss=loss,
            steps=steps,
            seeds=range(seeds),
            progress=progress,
        ).describe()
    if as_json:
        print_json(found)
        return
    for row in found["losses"]:
        print(f"width {row['width']:>6}  loss {row['loss']:.6g}")
    print(
        f"the plateau starts at width {found['plateau_starts_at']} ({found['tolerance']:.0%} above the lowest loss); "
        f"rank(Φ)·rank(Ψ) = {found['rank_features']}·{found['rank_outputs']} = {found['bound']}, "
        f"N(N + 1) = {found['data_bound']}"
    )
    for name, bound in (("rank", found["bound"]), ("data", found["data_bound"])):
        verdict = "met" if found["plateau_starts_at"] <= bound else "short"
        print(f"goal plateau-within-the-{name}-bound measured {found['plateau_starts_at']} wanted <={bound} {verdict}")

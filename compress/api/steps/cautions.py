"""What a result must not be read without: samples that are few, equal or unlike, widths and errors that look too good.

Each is one line that begins with "warning:" and goes to the terminal and into the report's notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compress.compression.problem import Problem
from compress.data import DataSource
from compress.data.source import draw_indices
from compress.errors import DataError
from compress.preparation import Prepared
from compress.report.model import LayerReport

FEW_SAMPLES = 100
DISTINCT = 0.9  # share of different samples below which the others are called copies
COMPARED = 256  # samples of either data set
SHIFT, CERTAIN = 1.0, 6.0  # a distance of means in standard deviations, and in standard errors
SPREAD = 3.0  # a ratio of standard deviations
INHERITED = 0.7  # error through the cuts before a layer, above which they are said to reach it enlarged
PARTING, FACTOR = 0.05, 2.0  # how much held-back errors exceed the fitting ones when they are said to part
SHOWN = 4


def caution_samples(prepared: Prepared, problem: Problem) -> Iterator[str]:
    """About the calibration samples that a run draws. Raises DataError where they are all equal."""
    calibration = prepared.calibration
    assert calibration is not None, "a run needs data"
    fitting, held_back = (stream.of(calibration) for stream in (problem.fitting, problem.held_back))
    drawn = torch.cat([fitting.indices, held_back.indices]).tolist()
    if problem.calibration.extremes.numbers:
        yield f"warning: {problem.calibration.extremes}"
    if len(drawn) < FEW_SAMPLES:
        yield (
            f"warning: there are only {len(drawn)} calibration samples, {fitting.count} to fit and "
            f"{held_back.count} to check on; what is chosen on so few may not hold for others."
        )
    if problem.program.network.inputs and prepared.network.examples[0].is_floating_point():
        hashes = calibration.ordered_hashes
        distinct = len({hashes[number] for number in drawn})
        if distinct == 1:
            raise DataError(
                f"{calibration.name}: the calibration samples are all equal; nothing can be told from them about what "
                "the network's units do. Give different samples."
            )
        if distinct < DISTINCT * len(drawn) and not problem.calibration.related:
            yield (
                f"warning: of {len(drawn)} calibration samples only {distinct} are different ones; copies of fitting "
                "samples flatter the held-back errors."
            )
    if problem.calibration.related:
        yield (
            f"warning: {problem.calibration.related} of {len(drawn)} calibration samples look like crops, frames or "
            "windows of the same things as others: these are held back together, so that errors on them stay honest. "
            "All of them tell less than as many different ones would."
        )
    if prepared.evaluation is not None:
        yield from caution_shift(calibration, prepared.evaluation)


def caution_shift(calibration: DataSource, evaluation: DataSource) -> Iterator[str]:
    """That the calibration samples are distributed otherwise than the evaluation samples, by means and spreads."""
    first, second = (read_some(source) for source in (calibration, evaluation))
    if first.shape[2:] != second.shape[2:] and first.shape[1] != second.shape[1]:
        return
    if not first.is_floating_point():
        unknown = float((~torch.isin(second, first)).double().mean())
        if unknown > 0.5:
            yield (
                f"warning: {100 * unknown:.0f} % of the evaluation's tokens are none of the calibration's first "
                f"{len(first)} samples; what is fitted to the one may not hold for the other."
            )
        return
    means, deviations = zip(*(describe(rows) for rows in (first, second)), strict=True)
    pooled = ((deviations[0].square() + deviations[1].square()) / 2).sqrt()
    errors = (deviations[0].square() / len(first) + deviations[1].square() / len(second)).sqrt()
    distance = (means[0] - means[1]).abs()
    tiny = 1e-6 * torch.maximum(means[0].abs(), means[1].abs()) + 1e-30
    moved = (distance > SHIFT * pooled + tiny) & (distance > CERTAIN * errors + tiny)
    wide, narrow = torch.maximum(*deviations), torch.minimum(*deviations)
    moved |= (wide > SPREAD * narrow + tiny) & (min(len(first), len(second)) >= 30)
    if bool(moved.any()):
        worst = int((distance / (pooled + tiny)).where(moved, -1.0).argmax())
        count = len(moved)
        where = f"in {int(moved.sum())} of {count} features" if count > 1 else "throughout"
        yield (
            f"warning: the calibration samples are unlike the evaluation samples {where}: mean "
            f"{float(means[0][worst]):.3g}, deviation {float(deviations[0][worst]):.3g} in the one, "
            f"{float(means[1][worst]):.3g} and {float(deviations[1][worst]):.3g} in the other; what fits the one may "
            "not hold for the other."
        )


def read_some(source: DataSource) -> Tensor:
    """A seeded draw of at most `COMPARED` samples (n, …)."""
    numbers = draw_indices(source.sample_count, COMPARED, 0)
    first = next(iter(source.batches(1, numbers[:1]))).inputs
    size = max(1, min(len(numbers), (1 << 24) // max(1, first[0].numel())))
    parts = [batch.inputs for batch in source.batches(size, numbers[: max(32, size)])]
    if len({part.shape[1:] for part in parts}) > 1:
        return first
    return torch.cat(parts)


def describe(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations over samples (n, …) of what describes one: its numbers, or the mean of each channel."""
    features = rows.double() if rows.ndim == 2 else rows.double().flatten(2).mean(2) if rows.ndim > 2 else rows[:, None]
    return features.mean(0), features.std(0, unbiased=False)


def caution_layers(layers: Sequence[LayerReport], held_back: int, *, within: bool = False) -> Iterator[str]:
    """About a cut's layers as they stand in a report: single units, errors that part or that earlier cuts leave.

    Args:
        within: every layer was allowed an error of its own, so that no one counts what they come to together.
    """
    cut = [layer for layer in layers if layer.kept < layer.units]
    single = [layer.name for layer in cut if layer.kept == 1]
    if single:
        yield f"warning: a single unit is left of {listed(single)}."
    parted = [
        (layer.name, layer.fit.error, layer.fit.held_back_error)
        for layer in cut
        if layer.fit.error is not None
        and layer.fit.held_back_error is not None
        and parts(layer.fit.error, layer.fit.held_back_error)
    ]
    if parted:
        _, error, held_back_error = max(parted, key=lambda errors: errors[2])
        yield (
            f"warning: errors on the {held_back} held-back samples exceed those on the fitting samples in "
            f"{listed([name for name, _, _ in parted])}, at most {held_back_error:.2f} beside {error:.2f}: the refit "
            "does not hold for other samples; give more of them, or cut less."
        )
    left = {layer.name: layer.fit.inherited_error for layer in layers}
    enlarged = {name: error for name, error in left.items() if error is not None and error > INHERITED}
    if enlarged and within:
        yield (
            f"warning: small errors grow from layer to layer: all units of {listed(list(enlarged))} would err by up to "
            f"{max(enlarged.values()):.2f} through the cuts before; cut less (a smaller --tolerance or --error), or "
            "give --macs, which weighs what all layers do together."
        )


def parts(error: float, held_back: float) -> bool:
    """Whether a held-back error is far above the error on the fitting samples."""
    return held_back > max(error + PARTING, FACTOR * error)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more layers" if more > 0 else "")

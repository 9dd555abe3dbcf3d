"""Why an evaluation cannot tell whether accuracy was lost, however the gate comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.measures.figures import GATED, Figure
from compress.measures.statistics import compare_figure, guesses_as_well, most_lost
from compress.recipe import Bound
from compress.report.evaluation import Evaluation

BETTER = 5.0  # points by which a cut network without fine-tuning does not surpass a sound original
CAUSES = "are the labels, their order and the preprocessing those it was trained with?"


def find_doubts(
    evaluation: Evaluation, bound: Bound | None = None, keys: Sequence[str] = GATED, *, tuned: bool = False
) -> list[str]:
    """One line for each reason not to believe an accuracy gate on this evaluation; empty where there is none.

    Args:
        bound: of what may be lost, where that is bounded.
        keys: the figures that it is of.
        tuned: whether the network was fine-tuned, which may make it better than its original.
    """
    figure = evaluation.figure(*keys)
    if figure is None or figure.key not in GATED:
        return []
    doubts = [
        *too_few(evaluation.samples, None if bound is None else most_lost(figure, bound)),
        *near_chance(figure, figure.values[0], evaluation.samples, evaluation.guess),
    ]
    return doubts if doubts or tuned else list(_better(figure))


def too_few(samples: int, most: float | None) -> Iterator[str]:
    """One sample alone is more than what may be lost."""
    if most and 100 / samples > most * (1 + 1e-9):
        needed = -(-100 // most)
        yield (
            f"{samples:,} evaluation samples cannot show a loss of {most:g} points, of which one sample alone is "
            f"{100 / samples:.3g}; give at least {needed:,.0f}"
        )


def near_chance(figure: Figure, accuracy: float, samples: int, guess: float) -> Iterator[str]:
    """The original's accuracy is no better than always giving one label (right with the share `guess`) could be."""
    if figure.hits is not None:
        lost = guesses_as_well(round(min(max(accuracy, 0.0), 1.0) * samples), samples, guess)
    else:
        lost = figure.key != "mean_iou" and accuracy <= guess
    if lost:
        yield (
            f"the original's {figure.meaning.name} of {100 * accuracy:.2f} % on {samples:,} samples is no better than "
            f"always giving the commonest label ({100 * guess:.2f} %); {CAUSES}"
        )


def _better(figure: Figure) -> Iterator[str]:
    """Far better than the original although nothing was trained."""
    change = compare_figure(figure)
    if change.loss <= -BETTER and change.interval[1] < 0:
        before, after = (100 * value for value in figure.values)
        yield (
            f"the compressed network's {figure.meaning.name} of {after:.2f} % is far above the original's "
            f"{before:.2f} %, so the original is broken on these data; {CAUSES}"
        )

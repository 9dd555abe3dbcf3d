"""Whether batch norms are folded into the layers in front of them in the network that is written."""

from __future__ import annotations

from dataclasses import replace

from compress.compression.problem import Problem
from compress.compression.searching.search import time_cut
from compress.progress import Progress
from compress.recipe import Recipe
from compress.units.folding import find_foldable

FASTER = 0.98  # of the original's time, that a network without them takes at most


def choose_folds(problem: Problem, recipe: Recipe, progress: Progress) -> Problem:
    """The problem with the batch norms that go: where it was asked for, or where time was and that saves some."""
    if recipe.fold == "off" or (recipe.fold == "auto" and recipe.latency is None):
        return problem
    progress.stage("folding batch norms")
    folding = replace(problem, folds=find_foldable(problem.network))
    count = len(folding.folds)
    if not count:
        if recipe.fold == "on":
            progress.note("--fold: no batch norm stands right behind a layer that could take it in.")
        return problem
    said = f"{count} batch norm{'s' if count > 1 else ''} folded into the layers in front: the outputs stay"
    if recipe.latency is not None:
        share = time_cut(folding, {})
        if recipe.fold == "auto" and share > FASTER:
            return problem
        said += f", {share:.2f} of the time by that alone"
    progress.note(said)
    return folding

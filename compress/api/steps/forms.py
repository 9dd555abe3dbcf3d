"""The form in which the network is written: as was asked for, and under a budget of time as is faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from compress.checkpoint.execution import Execution, is_channels_last
from compress.compression.problem import Problem
from compress.compression.searching.search import time_forms
from compress.progress import Progress
from compress.recipe import Recipe
from compress.units.folding import find_foldable
from compress.units.forms import Form, can_be_channels_last, find_in_place
from compress.units.network import Network

FASTER = 0.98  # of the time without it, that a network takes at most with what nobody asked for


def choose_form(problem: Problem, recipe: Recipe, progress: Progress) -> tuple[Problem, float]:
    """The problem with the form of its network, and the time that this alone takes as a fraction of the original's."""
    form, share = Form(), 1.0
    for choice, refused, change in changes(problem.network, recipe, progress):
        if not change:
            if choice != "auto":
                progress.note(refused)
            continue
        wider = form.and_then(change)
        if recipe.latency is not None:
            before, after = time_forms(problem, (form, wider))
            if choice == "auto" and after > FASTER * before:
                continue
            share = after
        form = wider
    if form and recipe.latency is not None:
        share = max(share, *time_forms(problem, (form,)))  # what one lucky timing says is not all
    if form:
        told = "" if recipe.latency is None else f", {share:.2f} of the time by that alone"
        progress.note(f"{form.describe()}: the outputs stay{told}")
    channels_last = form.channels_last or is_channels_last(problem.network.module)
    return replace(problem, form=form, timing=replace(problem.timing, channels_last=channels_last)), share


def changes(network: Network, recipe: Recipe, progress: Progress) -> Iterator[tuple[str, str, Form]]:
    """What may be changed of the form: the recipe's choice, what is said where it cannot be, and the change."""
    left = ("off", "keep") if recipe.latency is not None else ("off", "keep", "auto")
    if recipe.fold not in left:
        progress.stage("folding batch norms")
        refused = "--fold: no batch norm stands right behind a layer that could take it in."
        yield recipe.fold, refused, Form(find_foldable(network))
    if recipe.in_place not in left:
        progress.stage("looking for activations in place")
        refused = "--in-place: no activation may write over what it reads."
        yield recipe.in_place, refused, Form(execution=Execution(find_in_place(network)))
    if recipe.memory_format not in left and not is_channels_last(network.module):
        progress.stage("laying out convolutions")
        refused = "--memory-format: the network has no convolutions that could have their channels last."
        yield recipe.memory_format, refused, Form(execution=Execution(channels_last=can_be_channels_last(network)))

"""What errors of a given size in every layer would do to the outputs, before anything is cut.

A layer that is cut errs by a linear map of its features. So does one whose weights are disturbed at random: how far
that moves the outputs says, without any moments, what a relative error in each layer is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.compression.known import KnownOriginal
from compress.compression.layers.refit import put_matrix
from compress.compression.problem import Problem
from compress.compression.searching.curves import affordable_samples
from compress.compression.searching.damage import Cut, measure_cuts
from compress.compression.turns import changed_tensors
from compress.graph.program import iterate
from compress.progress import Progress
from compress.recording.readings import Reading, read_rows, sample_positions
from compress.units.groups import UnitGroup

ROWS = 1024  # of Φ that a layer's disturbance is sized on
VALUES = 2**24  # numbers that these rows may have
LARGEST = 2**25  # weights of a reading, above which it is left as it is
MEMORY_SHARE = 0.25  # of the memory bound, that a copy of all these weights may take


def expected_distance(problem: Problem, error: float, progress: Progress, known: KnownOriginal | None) -> float:
    """What the outputs move on held-back samples if every layer's consumers err so much, at once.

    0 where their weights are too many to be held twice; consumers of very many weights are left as they are.

    Args:
        error: relative to each consumer's outputs about their mean, as a tolerance is.
        known: what was kept of the original network.
    """
    names = {consumer.weight for group in problem.groups for consumer in group.consumers}
    if sum(problem.state[name].nbytes for name in names) > MEMORY_SHARE * problem.memory:
        return 0.0
    samples = affordable_samples(problem, len(problem.groups))
    progress.stage("disturbing all layers", samples)
    disturbed = joined(problem, disturbed_layers(problem, error))
    return measure_cuts(problem, [disturbed], samples=samples, known=known, advance=progress.advance)[0]


def disturbed_layers(problem: Problem, error: float) -> list[Cut]:
    """Every group with its consumers' weights disturbed, sized on the first held-back batch."""
    generator = torch.Generator().manual_seed(problem.seed)
    waiting = {group.name: group for group in problem.groups}
    needed = {
        name: {each for reading in problem.readings(group) for each in reading.inputs}
        for name, group in waiting.items()
    }
    values: dict[str, Tensor] = {}
    cuts: dict[str, Cut] = {}
    with torch.inference_mode():
        inputs = [tensor.to(problem.device) for tensor in problem.held_back.read(0)]
        wanted = sorted({name for names in needed.values() for name in names})
        for name, (value,) in iterate(problem.program, (problem.state,), inputs, wanted, fast=True):
            values[name] = value
            for ready in [each for each in waiting if needed[each] <= values.keys()]:
                cuts[ready] = disturbed(problem, waiting.pop(ready), values, error, generator)
            values = {name: value for name, value in values.items() if any(name in needed[each] for each in waiting)}
    return [cuts[group.name] for group in problem.groups if group.name in cuts]


def disturbed(
    problem: Problem, group: UnitGroup, values: Mapping[str, Tensor], error: float, generator: torch.Generator
) -> Cut:
    """The group's consumers with weights that err so much on what they read; constants that are free take the mean."""
    weights: dict[str, Tensor] = {}
    for reading in problem.readings(group):
        if sum(problem.state[consumer.weight].numel() for consumer in reading.consumers) > LARGEST:
            continue
        rows = drawn_rows(reading, values, generator)
        before = reading.weights(problem.state)
        noise = torch.randn(before.shape, generator=generator, dtype=torch.float32).to(before)
        aim, moved = rows @ before.to(rows), rows @ noise.to(rows)  # (n, D)
        free = reading.takes_constant
        mean = moved.mean(0) if free else torch.zeros_like(moved[0])
        wanted = error * float(torch.linalg.vector_norm(aim - aim.mean(0) if free else aim))
        size = float(torch.linalg.vector_norm(moved - mean))
        if 0 < size < math.inf and math.isfinite(wanted):
            scale = wanted / size
            constants = -scale * mean.to(before) if free else None
            put_matrix(reading, weights, before + scale * noise, constants, problem.state, problem.state)
    tensors = {name for consumer in group.consumers for name in changed_tensors(consumer)}
    return Cut(group.name, group.unit_count, weights, problem.program.frontier(tensors, problem.output_nodes))


def drawn_rows(reading: Reading, values: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Some rows (n, K·s) of what a reading multiplies, from samples as many as there are."""
    site = reading.sites[0]
    inputs = values[site.input]
    most = max(1, min(ROWS, VALUES // max(1, reading.columns)))
    count = math.ceil(most / len(inputs)) if reading.kernel else 1
    rows = read_rows(reading, site, inputs, sample_positions(reading, site, inputs, count, generator), own=True)
    return rows if len(rows) <= most else rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]


def joined(problem: Problem, cuts: Sequence[Cut]) -> Cut:
    """All of them in one network: changes of the same tensor add up."""
    weights: dict[str, Tensor] = {}
    for cut in cuts:
        for name, tensor in cut.weights.items():
            weights[name] = weights[name] + (tensor - problem.state[name]) if name in weights else tensor
    return Cut("all", 0, weights, problem.program.frontier(set(weights), problem.output_nodes))

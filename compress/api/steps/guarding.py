"""Guard sets: further domains that are calibrated on as well, and whose loss has a bound of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from compress.compression.problem import Problem, SampleStream, fit_samples
from compress.data.mixing import Mixed
from compress.measures.figures import GATED
from compress.preparation import Guard, Prepared
from compress.progress import Progress
from compress.recipe import Bound, Recipe
from compress.report.checks import check_loss
from compress.report.evaluation import Evaluation, evaluate_networks
from compress.report.model import Check


@dataclass(frozen=True, eq=False)
class Guarded:
    """A guard set after a cut."""

    guard: Guard
    evaluation: Evaluation
    gate: Check


def mix_guards(problem: Problem, prepared: Prepared, recipe: Recipe) -> Problem:
    """The problem with the guards' samples among those that are fitted to and checked on.

    They are `guard_weight` of all samples, each guard as many; a guard of fewer samples is counted several times.
    Which samples check is decided for each source alone, so none is in both parts.
    """
    if not prepared.guards or prepared.calibration is None:
        return problem
    sources = [prepared.calibration, *(guard.source for guard in prepared.guards)]
    mixed = Mixed(sources)
    share = recipe.guard_weight / (1 - recipe.guard_weight) / len(prepared.guards)
    streams: list[SampleStream] = []
    batch_size = problem.fitting.batch_size
    drawn = [
        fit_samples(guard.source, recipe.calibration_samples, recipe.held_back, batch_size, recipe.seed)
        for guard in prepared.guards
    ]
    for which, stream in enumerate((problem.fitting, problem.held_back)):
        wanted = max(1, round(share * stream.count))
        parts = [stream.indices]
        for start, guard in zip(mixed.starts[1:], drawn, strict=False):
            numbers = (guard.fitting, guard.held_back)[which].indices
            times = -(-wanted // len(numbers))
            parts.append(numbers.repeat(times)[:wanted] + int(start))
        indices = torch.cat(parts)
        generator = torch.Generator().manual_seed(recipe.seed + which)
        indices = indices[torch.randperm(len(indices), generator=generator)]
        if prepared.network.batch_size is not None:
            indices = indices[: len(indices) // stream.batch_size * stream.batch_size]
        streams.append(SampleStream(mixed, indices, stream.batch_size))
    calibration = problem.calibration
    answered = calibration.answered if mixed.labels is not None or mixed.targets is not None else None
    fitting, held_back = streams
    return replace(problem, calibration=replace(calibration, fitting=fitting, held_back=held_back, answered=answered))


def check_guards(prepared: Prepared, network: nn.Module, recipe: Recipe, progress: Progress) -> tuple[Guarded, ...]:
    """Each guard set on both networks, against its bound."""
    guarded = []
    for guard in prepared.guards:
        progress.stage(f"evaluating guard {guard.name}", guard.source.sample_count)
        only_batch = prepared.network.batch_size
        answered = guard.source.labels is not None or guard.source.targets is not None
        evaluation = evaluate_networks(
            prepared.network.module,
            network,
            guard.source.batches(prepared.network.batch_within(recipe.batch_size)),
            prepared.network.outputs,
            guard.answered if answered else "",
            device=recipe.device,
            progress=progress,
            only_batch=only_batch,
        )
        guarded.append(Guarded(guard, evaluation, check_guard(guard, evaluation, recipe.confidence)))
    return tuple(guarded)


def check_guard(guard: Guard, evaluation: Evaluation, confidence: float | None) -> Check:
    """A guard's accuracy, else its agreement, else how far outputs move, against its bound in points."""
    name, most = f"guard {guard.name}", guard.most
    figure = evaluation.figure(*GATED)
    if figure is not None:
        check = check_loss(figure, Bound(most, confidence=confidence))
        return replace(check, name=f"{name}: {check.name}", message=f"Guard {guard.name}: {check.message}")
    what, lost = "agreement", 100 * (1 - (evaluation.agreement or 0.0))
    if evaluation.agreement is None:
        what, lost = "relative output change", 100 * evaluation.relative_output_change
    verb = "falls" if what == "agreement" else "rises"
    said = f"Guard {guard.name}: The {what} {verb} by {lost:.2f} points, at most {most:g} were allowed"
    return Check(
        f"{name}: {what}", f"at most {most:g} points lost", f"{lost:.2f} points lost", lost <= most + 1e-9, said
    )


def failed(guarded: Sequence[Guarded]) -> bool:
    """Whether a guard lost more than it may."""
    return any(guard.gate.passed is False for guard in guarded)

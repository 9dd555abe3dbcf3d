"""Checks of a run or of an artifact, each with what was wanted and what was measured; the gate is made of them."""

from __future__ import annotations

from collections.abc import Iterable

from compress.recipe import Recipe, parse_reduction
from compress.report.escaping import escaped
from compress.report.model import Check, CostReport, RunReport

SLACK = 1e-9  # relative and in points, for a bound that is met exactly
REDUCED = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "latency"}


def check_gates(report: RunReport, recipe: Recipe) -> tuple[Check, ...]:
    """The gates that the recipe sets on a finished run: points of accuracy that may be lost, reductions to reach."""
    gates = []
    drop = None if report.evaluation is None else report.evaluation.drop_points
    if recipe.max_drop is not None and drop is not None:
        gates.append(check_drop(drop, recipe.max_drop))
    gates += [check_reduction(report.cost, *parse_reduction(text)) for text in recipe.min_reduction]
    return tuple(gates)


def check_drop(drop: float, most: float) -> Check:
    """Whether at most `most` points of accuracy were lost."""
    return Check(
        name="accuracy",
        wanted=f"at most {most:g} points lost",
        measured=f"{drop:.2f} points lost",
        passed=drop <= most + SLACK,
        message=f"The accuracy falls by {drop:.2f} points, at most {most:g} were allowed",
    )


def check_reduction(cost: CostReport, quantity: str, factor: float) -> Check:
    """Whether a cost was divided by at least `factor`; latency is that of the largest batch measured."""
    reached = {
        "params": cost.parameters.factor,
        "macs": cost.macs.factor,
        "bytes": cost.bytes.factor,
        "latency": cost.latency[-1].factor if cost.latency else 1.0,
    }[quantity]
    name = REDUCED[quantity]
    return Check(
        name=f"reduction of {name}",
        wanted=f"at least {factor:g}×",
        measured=f"{reached:.2f}×",
        passed=reached >= factor * (1 - SLACK),
        message=f"{name[:1].upper()}{name[1:]} fall by a factor of {reached:.2f}, at least {factor:g} was asked for",
    )


def check_run(report: RunReport) -> list[Check]:
    """What a finished run has shown about itself, then its gates."""
    checks = []
    for deviation, name in (
        (report.verification.narrowed_deviation, "the narrowed network equals the masked original"),
        (report.verification.reload_deviation, "the written model gives the same outputs in a fresh process"),
    ):
        if deviation is not None:
            measured = f"{deviation:.1e} relative"
            checks.append(Check(name, "equal up to rounding", measured, True, f"Relative deviation {deviation:.1e}"))
    for layer in report.layers:
        lasso = layer.certificate
        if lasso is not None:
            measured = f"relative duality gap {lasso.relative_duality_gap:.1e}"
            checks.append(
                Check(f"certificate of {layer.name}", "a duality gap", measured, True, f"{lasso.form}: {measured}")
            )
    return [*checks, *report.gates]


def failures(checks: Iterable[Check]) -> list[Check]:
    """Those that failed; what could not be judged has not."""
    return [check for check in checks if check.passed is False]


def checks_markdown(title: str, checks: Iterable[Check]) -> str:
    """A table of checks for people."""
    verdicts = {True: "passed", False: "**failed**", None: "not judged"}
    rows = [
        f"| {escaped(one.name)} | {escaped(one.wanted)} | {escaped(one.measured)} | {verdicts[one.passed]} |"
        for one in checks
    ]
    head = [f"# {escaped(title)} verified", "", "| check | wanted | measured | |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"

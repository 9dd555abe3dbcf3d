"""Checks of a run or of an artifact, each with what was wanted and what was measured; the gate is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compress.recipe import Recipe, parse_reduction
from compress.report.markdown import ratio

SLACK = 1e-9  # relative and in points, for a bound that is met exactly
REDUCED = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "latency"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        passed: None where it could not be judged; `message` says why.
        message: one sentence for people.
    """

    name: str
    wanted: str
    measured: str
    passed: bool | None
    message: str

    def as_report(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check_gates(report: Mapping[str, Any], recipe: Recipe) -> list[Check]:
    """The gates that the recipe sets on a finished run: points of accuracy that may be lost, reductions to reach."""
    gates = []
    evaluation = report["evaluation"]
    if recipe.max_drop is not None and evaluation is not None and evaluation["drop_points"] is not None:
        gates.append(check_drop(evaluation["drop_points"], recipe.max_drop))
    for text in recipe.min_reduction:
        gates.append(check_reduction(report["cost"], *parse_reduction(text)))
    return gates


def check_drop(drop: float, most: float) -> Check:
    """Whether at most `most` points of accuracy were lost."""
    return Check(
        name="accuracy",
        wanted=f"at most {most:g} points lost",
        measured=f"{drop:.2f} points lost",
        passed=drop <= most + SLACK,
        message=f"The accuracy falls by {drop:.2f} points, at most {most:g} were allowed",
    )


def check_reduction(cost: Mapping[str, Any], quantity: str, factor: float) -> Check:
    """Whether a cost was divided by at least `factor`; latency is that of the largest batch measured."""
    if quantity == "latency":
        latency = cost["latency"][-1]
        reached = latency["before_ms"] / latency["after_ms"]
    else:
        reached = ratio(cost["parameters" if quantity == "params" else quantity])
    name = REDUCED[quantity]
    return Check(
        name=f"reduction of {name}",
        wanted=f"at least {factor:g}×",
        measured=f"{reached:.2f}×",
        passed=reached >= factor * (1 - SLACK),
        message=f"{name[:1].upper()}{name[1:]} fall by a factor of {reached:.2f}, at least {factor:g} was asked for",
    )


def check_run(report: Mapping[str, Any]) -> list[Check]:
    """What a finished run has shown about itself, then its gates."""
    checks = []
    for key, name in (
        ("narrowed_deviation", "the narrowed network equals the masked original"),
        ("reload_deviation", "the written model gives the same outputs in a fresh process"),
    ):
        deviation = report["verification"].get(key)
        if deviation is not None:
            measured = f"{deviation:.1e} relative"
            checks.append(Check(name, "equal up to rounding", measured, True, f"Relative deviation {deviation:.1e}"))
    for layer in report["layers"]:
        if layer.get("lasso"):
            lasso = layer["lasso"]
            measured = f"relative duality gap {lasso['relative_duality_gap']:.1e}"
            checks.append(
                Check(
                    f"certificate of {layer['name']}", "a duality gap", measured, True, f"{lasso['form']}: {measured}"
                )
            )
    return [*checks, *(Check(**gate) for gate in report.get("gates") or [])]


def failures(checks: Iterable[Check]) -> list[Check]:
    """Those that failed; what could not be judged has not."""
    return [check for check in checks if check.passed is False]


def checks_markdown(title: str, checks: Iterable[Check]) -> str:
    """A table of checks for people."""
    verdicts = {True: "passed", False: "**failed**", None: "not judged"}
    rows = [f"| {one.name} | {one.wanted} | {one.measured} | {verdicts[one.passed]} |" for one in checks]
    return "\n".join([f"# {title} verified", "", "| check | wanted | measured | |", "|---|---|---|---|", *rows]) + "\n"

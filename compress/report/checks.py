"""Checks of a run or of an artifact, each with what was wanted and what was measured; the gate is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from compress.measures.figures import GATED, Figure
from compress.measures.own import OwnMeasure
from compress.measures.statistics import CONFIDENCE, SLACK, compare_figure, judge, most_lost, shown_loss
from compress.recipe import Bound, Recipe, parse_reduction
from compress.report.doubts import find_doubts
from compress.report.escaping import escaped
from compress.report.evaluation import Evaluation
from compress.report.model import Check, CostReport, RunReport

REDUCED = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "latency"}


def check_gates(evaluation: Evaluation | None, report: RunReport, recipe: Recipe) -> tuple[Check, ...]:
    """The gates that the recipe sets on a finished run: points of accuracy that may be lost, reductions to reach."""
    gates = [] if evaluation is None or recipe.own_metric else check_evaluation(evaluation, recipe)
    gates += [check_reduction(report.cost, *parse_reduction(text)) for text in recipe.min_reduction]
    return tuple(gates)


def check_evaluation(evaluation: Evaluation, recipe: Recipe) -> list[Check]:
    """The accuracy gates, and before them what keeps the evaluation from showing a loss; empty without a bound."""
    bound, keys = recipe.bound, gated_keys(recipe)
    if bound is None:
        return []
    doubts = [] if recipe.force_gate else find_doubts(evaluation, bound, keys, tuned=recipe.tunes)
    return [*map(check_doubt, doubts), *check_losses(evaluation, bound, keys)]


def gated_keys(recipe: Recipe) -> Sequence[str]:
    """The figures that the recipe's bound is of."""
    return GATED if recipe.metric is None or recipe.own_metric else (recipe.metric,)


def check_own(measure: OwnMeasure, bound: Bound, before: Mapping[str, float], after: Mapping[str, float]) -> Check:
    """Whether the first number that a user's measure gives stays within a bound."""
    name, first = next(iter(before.items()))
    loss, most = measure.loss(before, after), bound.allowed(first)
    said = (
        f"{name} worsens by {loss:.4g} ({first:.4g} → {after[name]:.4g}), at most {most:.4g} "
        f"{f'({bound}) ' if bound.relative else ''}were allowed"
    )
    passed = loss <= most + SLACK * max(1.0, abs(first))
    return Check(name, f"at most {most:.4g} lost", f"{loss:.4g} lost", passed, said)


def check_doubt(doubt: str) -> Check:
    """A reason why an evaluation cannot show a loss, as a check that fails."""
    said = f"{doubt[:1].upper()}{doubt[1:]} (--force-gate overrules this)"
    return Check("evaluation", "data on which a loss would show", "not such data", False, said)


def check_losses(evaluation: Evaluation, bound: Bound, keys: Sequence[str] = GATED) -> list[Check]:
    """Whether each figure with one of the keys stays within a bound: by the estimate, or with a confidence."""
    return [check_loss(figure, bound) for figure in evaluation.figures if figure.key in keys]


def check_loss(figure: Figure, bound: Bound) -> Check:
    """Whether one figure stays within a bound."""
    confidence, most = bound.confidence, most_lost(figure, bound)
    change = compare_figure(figure, confidence or CONFIDENCE)
    unit = " points" if figure.meaning.share else ""
    verdict = judge(change, most, unit, tested=confidence is not None)
    name = "accuracy" if figure.key == "top1" else figure.meaning.name
    said = f"The {name} {'falls' if figure.meaning.higher else 'rises'} by {shown_loss(figure, change.loss)}"
    if confidence is not None:
        said += f", with {100 * confidence:g} % confidence by at most {format(change.bound, '.2f' if unit else '.4g')}"
    said += f", at most {most:.4g} {f'({bound}) ' if bound.relative else ''}were allowed"
    if verdict.needed is not None:
        said += f": not enough samples to be so sure, about {verdict.needed:,} would do"
    return Check(name, f"at most {most:.4g}{unit} lost", verdict.measured, verdict.passed, said)


def check_drop(drop: float, most: float, name: str = "accuracy") -> Check:
    """Whether at most `most` points of accuracy were lost, where only that number is known."""
    return Check(
        name=name,
        wanted=f"at most {most:g} points lost",
        measured=f"{drop:.2f} points lost",
        passed=drop <= most + SLACK,
        message=f"The {name} falls by {drop:.2f} points, at most {most:g} were allowed",
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
        f"| {escaped(check.name)} | {escaped(check.wanted)} | {escaped(check.measured)} | {verdicts[check.passed]} |"
        for check in checks
    ]
    head = [f"# {escaped(title)} verified", "", "| check | wanted | measured | |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"

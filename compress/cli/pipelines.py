"""What `--github` and `--junit` add to a command: its outcome in the forms that CI systems read."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from compress.cli.options import OUTPUT, declare
from compress.errors import CompressError, GateError

if TYPE_CHECKING:  # these know pydantic, and every command starts here
    from compress.report.model import Check, RunReport

Github = Annotated[
    bool,
    Option("--github", help="Annotations, step summary and outputs for GitHub Actions.", rich_help_panel=OUTPUT),
]
Junit = Annotated[
    str | None, Option(metavar="FILE", help="Write the checks as JUnit XML to this file.", rich_help_panel=OUTPUT)
]


@dataclass
class Outcome:
    """What a command found, filled in while it works.

    Attributes:
        checks: of everything looked at.
        headline, markdown: one sentence, and the step summary.
        outputs: name -> value for later steps.
        wanted: whether anybody asked to be told.
    """

    checks: list[Check] = field(default_factory=list)
    headline: str = ""
    markdown: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    wanted: bool = False


def tells_pipelines(suite: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command gets `--github` and `--junit`, and fills in the `outcome` that it is called with."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def telling(*, github: bool, junit: str | None, **given: Any) -> None:
            with told_to_pipelines(suite, github, junit) as outcome:
                command(outcome=outcome, **given)

        parameters = inspect.signature(command, eval_str=True).parameters.values()
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for name, annotation, default in (("github", Github, False), ("junit", Junit, None))
        ]
        rest = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters if each.name != "outcome"]
        return declare(telling, [*rest, *added])

    return decorate


@contextmanager
def told_to_pipelines(suite: str, github: bool, junit: str | None) -> Iterator[Outcome]:
    """Tell the outcome of the block, whether it ends well or in a fault; the fault goes on.

    A gate that failed is one of the checks; any other fault is an error of its own.
    """
    outcome = Outcome(wanted=github or junit is not None)
    try:
        yield outcome
    except CompressError as error:
        if isinstance(error, GateError) and error.report is not None and not outcome.checks:
            describe_run(outcome, error.report, None)
        tell(suite, outcome, github, junit, error)
        raise
    tell(suite, outcome, github, junit, None)


def describe_run(outcome: Outcome, report: RunReport, folder: Path | None) -> None:
    """Fill in the outcome of a run from its report."""
    from compress.report.checks import check_run, failures
    from compress.report.markdown import markdown_report
    from compress.report.rows import headline

    outcome.checks = check_run(report)
    outcome.headline = headline(report)
    outcome.markdown = markdown_report(report)
    drop = None if report.evaluation is None else report.evaluation.drop_points
    agreement = None if report.evaluation is None else report.evaluation.agreement
    outcome.outputs = {
        "passed": "false" if failures(outcome.checks) else "true",
        "folder": "" if folder is None else str(folder),
        "parameters-reduction": f"{report.cost.parameters.factor:.4f}",
        "macs-reduction": f"{report.cost.macs.factor:.4f}",
        "drop-points": "" if drop is None else f"{drop:.4f}",
        "agreement": "" if agreement is None else f"{agreement:.6f}",
    }


def describe_checks(outcome: Outcome, folder: str, checks: Sequence[Check]) -> None:
    """Fill in the outcome of a verification from its checks."""
    from compress.report.checks import checks_markdown

    outcome.checks = list(checks)
    outcome.headline = f"{folder}: {len(checks)} checks passed."
    outcome.markdown = checks_markdown(folder, checks)
    outcome.outputs = {"folder": folder}


def tell(suite: str, outcome: Outcome, github: bool, junit: str | None, fault: CompressError | None) -> None:
    """Write what was asked for. Annotations go to stderr, which the runner reads too, so that `--json` stays pure."""
    from compress.report.checks import failures
    from compress.report.github import annotation, write_outputs, write_summary
    from compress.report.junit import write_junit

    failed = failures(outcome.checks)
    unexplained = None if fault is None or failed else str(fault)
    if github:
        lines = [annotation("error", check.message, f"compress: {check.name}") for check in failed]
        if unexplained:
            lines.append(annotation("error", unexplained, "compress"))
        if fault is None and outcome.headline:
            lines.append(annotation("notice", outcome.headline, "compress"))
        print("\n".join(lines), file=sys.stderr)
        verdict = f"**Failed.** {fault}\n\n" if fault is not None else ""
        write_summary(f"{verdict}{outcome.markdown}\n")
        write_outputs({**outcome.outputs, "passed": "true" if fault is None else "false"})
    if junit:
        write_junit(junit, suite, outcome.checks, unexplained)

"""What balance, training and their searches print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from compress.cli.showing.console import PlainConsole
from compress.report.model import Scores, TrainingEvaluation, TrainingReport

SHOWN_EPOCHS = 12


def show_balance(balance: Mapping[str, Any]) -> None:
    """Balance and path norm of every layer before and after, then the sums."""
    console = PlainConsole()
    table = Table("layer", "units", "‖w‖/‖v‖", "after", "path norm", "after", box=SIMPLE_HEAD)
    for layer in balance["layers"]:
        cells = (*layer["balance"], *layer["path_norm"])
        table.add_row(layer["name"], str(layer["units"]), *("–" if cell is None else f"{cell:.4g}" for cell in cells))
    for name, reason in balance["left_alone"].items():
        table.add_row(name, "left alone", reason)
    console.print(table)
    before, after = balance["sum_of_squares"]
    _say(
        console,
        f"sum of squares {before:.6g} → {after:.6g} (× {balance['factor']:.4f}), outputs ± {balance['deviation']:.0e}",
    )
    _say(console, f"written to {balance['output']}")


def show_depth(inspection: Mapping[str, Any]) -> None:
    """Costs and forces of every layer, then the Jacobian norms."""
    console = PlainConsole()
    table = Table("layer", "cost", "‖V‖²", "attraction", "repulsion", "residual", "aligned", "path", box=SIMPLE_HEAD)
    for layer in inspection["layers"]:
        if layer.get("force_residual") is None:
            continue
        keys = ("representation_cost", "output_squares", "attraction", "repulsion", "force_residual")
        merged = sum(len(group) - 1 for group in layer["aligned"])
        table.add_row(layer["name"], *(f"{layer[key]:.4g}" for key in keys), str(merged), f"{layer['path_norm']:.4g}")
    console.print(table)
    norms = inspection.get("jacobian_norms")
    if norms is not None:
        _say(
            console,
            f"spectral norm of the Jacobian on {norms['samples']} samples: median {norms['median']:.4g}, "
            f"largest {norms['largest']:.4g}",
        )


def _say(console: PlainConsole, text: str) -> None:
    console.print(text)


def _evaluated(score: Scores | None) -> str:
    """A score on the evaluation data, in words."""
    if score is None:
        return ""
    return f", accuracy {score.top1:.2%}" if score.top1 is not None else f", evaluated loss {score.loss:.5g}"


def show_training(report: TrainingReport, folder: Path) -> None:
    """The last epochs, then losses, sparsity and where the network lies."""
    console = PlainConsole()
    table = Table("epoch", "rate", "loss", "validation loss", "validation top-1", box=SIMPLE_HEAD)
    for row in report.curve[-SHOWN_EPOCHS:]:
        cells = (row.rate, row.loss, row.validation_loss, row.validation_top1)
        table.add_row(str(row.epoch), *("–" if cell is None else f"{cell:.4g}" for cell in cells))
    console.print(table)
    active = report.active_fraction
    units = "" if active is None else f", {active:.1%} of the coupled units active"
    loss = "–" if report.training is None else f"{report.training.loss:.4g}"
    _say(
        console,
        f"{report.method}, best epoch {report.best_epoch}: training loss {loss}, "
        f"{report.nonzeros:,} of {report.weights:,} weights nonzero{units}",
    )
    before = report.undebiased
    if before is not None and before.training is not None:
        debiased = [row for row in report.curve if row.phase == "debias"]
        kept = "" if any(row.epoch == report.best_epoch for row in debiased) else ", not kept"
        _say(
            console,
            f"{len(debiased)} epochs without penalty{kept}: training loss "
            f"{before.training.loss:.4g} before{_evaluated(before.evaluation)}",
        )
    search = report.penalty_search
    if search is not None:
        shown = ", ".join(f"{value:.4g}" for value in search.penalties)
        _say(console, f"penalty {shown} after {search.trainings} trainings")
    if report.evaluation is not None and report.evaluation.trained is not None:
        _say(console, _scored(report.evaluation, report.evaluation.trained))
    _say(console, f"written to {folder}")


def show_plateau(measured: Mapping[str, Any]) -> None:
    """The loss of every width, then where it plateaus."""
    for row in measured["losses"]:
        print(f"width {row['width']:>6}  loss {row['loss']:.6g}")
    print(
        f"the plateau starts at width {measured['plateau_starts_at']} "
        f"({measured['tolerance']:.0%} above the lowest loss); "
        f"rank(Φ)·rank(Ψ) = {measured['rank_features']}·{measured['rank_outputs']} = {measured['bound']}, "
        f"N(N + 1) = {measured['data_bound']}"
    )


def _scored(evaluation: TrainingEvaluation, trained: Scores) -> str:
    """The scores on the evaluation data before and after, in words."""
    original = evaluation.original
    if evaluation.loss is not None and evaluation.constant_loss is not None:
        before = "" if original is None else f"{original.loss:.5g} → "
        return (
            f"{evaluation.loss} loss {before}{trained.loss:.5g} of {evaluation.samples:,} samples "
            f"(the best constant: {evaluation.constant_loss:.5g})"
        )
    before = "" if original is None or original.top1 is None else f"{100 * original.top1:.2f} → "
    return f"accuracy {before}{100 * (trained.top1 or 0):.2f} % of {evaluation.samples:,} samples"

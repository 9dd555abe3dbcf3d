"""Compressing a network that a program holds: module, data and measure in memory, nothing on disk unless asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compress.api.live import choose_progress, dress_like, prepare_live
from compress.api.running import compress_prepared, raise_failed_gates, write_run
from compress.api.steps.metric import OwnMetric
from compress.api.steps.telling import Work, report_work
from compress.arithmetic import reproducible
from compress.atomic import reserved
from compress.checkpoint.unwrapping import unwrap
from compress.copying import deep_copy
from compress.measures.own import Function as Measure
from compress.measures.own import OwnMeasure
from compress.progress import LineProgress, Progress, SilentProgress, Stages
from compress.recipe import IN_MEMORY, Recipe
from compress.report.model import RunReport


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A network compressed in memory.

    Attributes:
        model: of the class of the network that was given, with smaller tensors, eval mode, on its device.
        report: everything that was decided and measured.
        metrics: name -> (before, after), of what `evaluate` said.
    """

    model: nn.Module
    report: RunReport
    metrics: Mapping[str, tuple[float, float]]
    _work: Work
    _recipe: Recipe
    _original: nn.Module

    @reproducible()
    def save(self, folder: str | Path, *, force: bool = False, progress: Progress | None = None) -> Path:
        """Write the network with manifest and report; it reloads with `compress.load(folder, model=MyNet())`.

        Where the network's class can be imported and built without arguments, `compress.load(folder, trust_code=True)`
        builds it too. Nothing is pickled.

        Raises:
            OutputError: the folder exists and is not ours, or cannot be written; nothing is left.
        """
        recipe = self._recipe.model_copy(update={"output": str(folder), "force": force})
        with reserved(Path(folder), force=force):
            shown = progress or SilentProgress()
            write_run(Path(folder), recipe, self._work, self.report, Stages(), shown, original=self._original)
        return Path(folder)

    def __repr__(self) -> str:
        before, after = self.report.cost.parameters.before, self.report.cost.parameters.after
        said = "".join(f", {name} {before:.4g} → {after:.4g}" for name, (before, after) in self.metrics.items())
        return f"PruneResult({type(self.model).__name__}: {before:,} → {after:,} parameters{said})"

    def _repr_html_(self) -> str:
        """The report, as a notebook shows it."""
        from compress.report.html import render_report

        page = render_report(self.report).replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{page}" style="width:100%;height:36em;border:0" title="report"></iframe>'


@reproducible()
def prune(
    model: nn.Module,
    data: Any,
    *,
    evaluate: Measure | None = None,
    higher_is_better: bool = True,
    test: Any = None,
    guards: Mapping[str, Any] | None = None,
    guard_drop: float | Mapping[str, float] | None = None,
    macs: float | str | None = None,
    params: float | str | None = None,
    latency: float | str | None = None,
    max_drop: float | str | None = None,
    keep: float | int | str | None = None,
    error: float | None = None,
    layer: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    couple: bool = False,
    round_to: int = 1,
    calibration_samples: int = 50_000,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | bool | None = None,
    **options: Any,
) -> PruneResult:
    """Compress a module in memory; the module that is given is never changed.

        result = compress.prune(net, loader, macs=0.5, evaluate=accuracy)
        result.model                                     # the same class, smaller tensors
        result.save("net-half")                          # compress.load("net-half", model=Net())

    Args:
        model: any module that `torch.export` can trace; wrappers of `torch.compile` and `DataParallel` are taken off.
        data: an iterable of batches to calibrate on, as a DataLoader, a list or a generator gives them: what the model
            takes, alone or with labels or targets behind. At most `calibration_samples` are read and held in memory.
        evaluate: a network to a number, or to several by name; called with copies and the same random numbers,
            twice before (a measure that does not repeat itself is told of) and once after. With `max_drop` and without
            another width rule or budget the smallest network is searched for, and it is called for each that is tried.
        higher_is_better: of the first number, which `max_drop` bounds: in its own unit, or "2%" of its value before.
        test: labelled batches disjoint from `data`, for the built-in figures.
        guards: name -> batches of a further domain, calibrated on as well (`guard_weight`, 0.2 of all samples), whose
            accuracy or agreement may not fall by more than `guard_drop` points (5, for all or by name).
        macs, params, latency, max_drop, keep, error, layer, exclude, couple, round_to, batch_size, seed: as the command
            line's options of these names.
        progress: True: a line on stderr, False: nothing, None: the line where a terminal or a notebook shows it; or a
            `Progress` of your own.
        options: any other option of a recipe, by its name.

    Raises:
        CompressError: what is wrong with the module, the data, the measure or the options, in one line.
        GateError: a budget or a bound is not kept.
    """
    shown = choose_progress(progress)
    plain = unwrap(model)
    given: dict[str, Any] = {
        "macs": macs, "params": params, "latency": latency, "keep": keep, "error": error, "couple": couple,
        "round_to": round_to, "calibration_samples": calibration_samples, "batch_size": batch_size, "seed": seed,
        "layer": layer, "exclude": exclude, "max_drop": max_drop,
        "guard_drop": guard_drop, **options,
    }  # fmt: skip
    metric_options = {} if evaluate is None else {"metric": IN_MEMORY, "lower_is_better": not higher_is_better}
    clock, dress = Stages(), dress_like(plain)
    with clock("prepare"):
        prepared, recipe = prepare_live(plain, data, test, given, shown, "prune", guards, **metric_options)
    metric = None
    if evaluate is not None:
        metric = OwnMetric.of_network(OwnMeasure(evaluate, higher=higher_is_better, seed=recipe.seed, dress=dress))
    work = compress_prepared(prepared, recipe, shown, clock, metric=metric)
    report = report_work(work, recipe, shown, clock)
    raise_failed_gates(report)
    network = dress(deep_copy(work.cut.narrowed.module)).eval()
    if isinstance(shown, LineProgress):
        shown.close()
    return PruneResult(network, report, work.metrics, work, recipe, prepared.opened.module)

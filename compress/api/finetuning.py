"""Training a network on: of a recipe, into a folder; or one that a program holds, nothing on disk unless asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from compress.api.live import choose_progress, dress_like, live_recipe, open_live
from compress.api.training import TrainResult, finetune_recipe, make_training, write_taught
from compress.arithmetic import reproducible
from compress.atomic import reserved
from compress.checkpoint.unwrapping import unwrap
from compress.copying import deep_copy
from compress.measures.own import Function as Measure
from compress.measures.own import OwnMeasure
from compress.progress import LineProgress, Progress, SilentProgress, Stages
from compress.recipe import Recipe, TrainingOptions
from compress.report.model import SourceFile, TrainingReport
from compress.training.runner import Start, Taught, Training, teach


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """A network trained on in memory.

    Attributes:
        model: of the class of the network that was given, eval mode, on its device.
        report: curve and scores.
        metrics: name -> (before, after), of what `evaluate` said.
    """

    model: nn.Module
    report: TrainingReport
    metrics: Mapping[str, tuple[float, float]]
    _work: Training
    _taught: Taught
    _recipe: Recipe

    @reproducible()
    def save(self, folder: str | Path, *, force: bool = False, progress: Progress | None = None) -> Path:
        """Write the network with manifest and report, as `PruneResult.save`. Raises OutputError."""
        recipe = self._recipe.model_copy(update={"output": str(folder), "force": force})
        with reserved(Path(folder), force=force):
            shown, original = progress or SilentProgress(), self._work.start.module
            write_taught(Path(folder), self._work, self._taught, recipe, Stages(), shown, original=original)
        return Path(folder)

    def __repr__(self) -> str:
        said = "".join(f", {name} {before:.4g} → {after:.4g}" for name, (before, after) in self.metrics.items())
        losses = [scores.loss for scores in (self.report.training, self.report.validation) if scores is not None]
        shown = " / ".join(f"{loss:.4g}" for loss in losses)
        return f"FinetuneResult({type(self.model).__name__}: {len(self.report.curve)} epochs, loss {shown}{said})"


@overload
def finetune(network: Recipe, data: Progress | None = None, *, resume: bool = False) -> TrainResult: ...


@overload
def finetune(
    network: nn.Module,
    data: Any,
    *,
    test: Any = None,
    evaluate: Measure | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
    **options: Any,
) -> FinetuneResult: ...


@reproducible()
def finetune(
    network: Recipe | nn.Module,
    data: Any = None,
    *,
    test: Any = None,
    evaluate: Measure | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
    resume: bool = False,
    **options: Any,
) -> TrainResult | FinetuneResult:
    """Train a network on, with labels or targets: a recipe's into its folder, or a module's copy in memory.

        result = compress.finetune(pruned.model, loader, epochs=3, lr=0.01, evaluate=accuracy)
        result.model
        result.save("net-half-tuned")

    Args:
        network: a recipe, as `compress finetune` takes it; or a module that returns one tensor, and is not changed.
        data: of a module: an iterable of batches with labels or targets behind, read whole and held in memory.
        test: labelled batches disjoint from `data`, scored before and after.
        evaluate: a network to a number, or to several by name; called with copies, before and after.
        progress: as of `prune`.
        resume: of a recipe: go on from what a killed training left.
        options: of a module: those of a training (`method`, `loss`, `epochs`, `lr`, `penalty`, …).

    Raises:
        CompressError: what is wrong with the module, the data, the measure or the options, in one line.
        GateError: the wanted sparsity was not reached.
    """
    if isinstance(network, Recipe):
        shown = data if progress is None else progress
        if options or test is not None or evaluate is not None or isinstance(shown, bool):
            raise ValueError("a recipe says itself how it is trained; give data and options there.")
        return finetune_recipe(network, shown, resume=resume)
    shown = choose_progress(progress)
    plain = unwrap(network)
    recipe = live_recipe(plain, test, {"training": options, "seed": seed}, "finetune")
    chosen = (recipe.training or TrainingOptions.model_validate({})).completed(finetuning=True)
    dress, clock = dress_like(plain), Stages()
    measure = None if evaluate is None else OwnMeasure(evaluate, seed=seed, dress=dress)
    torch.manual_seed(seed)
    with clock("prepare"):
        shown.stage("reading samples")
        whole = recipe.model_copy(update={"calibration_samples": 2**62})
        opened, sources = open_live(plain, data, test, whole)
        origin = SourceFile(opened.checkpoint.path.name, opened.checkpoint.sha256)
        start = Start(opened.module, opened.architecture, origin, opened.checkpoint.state)
        work = make_training(start, recipe, chosen, None, sources)
    before: dict[str, float] = {}
    if measure is not None:
        before, noise = measure.of_original(opened.module)
        if noise is not None:
            shown.note(f"warning: {noise}.")
    taught = teach(work, recipe, shown, clock, kind="finetune")
    taught = replace(taught, report=replace(taught.report, seconds=dict(clock.seconds)))
    after = {} if measure is None else measure.of(taught.module, "the trained network")
    if isinstance(shown, LineProgress):
        shown.close()
    metrics = {name: (value, after.get(name, value)) for name, value in before.items()}
    model = dress(deep_copy(taught.module)).eval()
    return FinetuneResult(model, taught.report, metrics, work, taught, recipe)

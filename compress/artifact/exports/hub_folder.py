"""A folder for the Hugging Face Hub: the artifact's tensors and manifest, and a model card made from its report."""

from __future__ import annotations

import shutil
from functools import singledispatch
from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.manifest import CONFIG, MODEL
from compress.report.escaping import code, escaped
from compress.report.model import Report, RunReport, Scores, TrainingReport
from compress.report.rows import headline, summary_rows

CARD = "README.md"


def write_hub_folder(artifact: Path, report: Report, folder: Path) -> None:
    """Copy tensors and manifest of the artifact in `artifact` into the new `folder`, and write the model card."""
    folder.mkdir()
    for name in (MODEL, CONFIG):
        shutil.copyfile(artifact / name, folder / name)
    (folder / CARD).write_text(model_card(report), encoding="utf-8")


@singledispatch
def model_card(report: Report) -> str:
    """The model card: metadata as the Hub reads it, then what the network is, how to use it and what it was checked on.

    Licence, base model and intended use are not known to this tool and are left to whoever publishes.
    """
    raise TypeError(f"no card for {type(report).__name__}")


@model_card.register
def run_card(report: RunReport) -> str:
    """The card of a compressed network."""
    checkpoint, fitting = report.checkpoint, report.inputs.data.fitting
    title = f"{Path(checkpoint.file).stem} compressed"
    scores = None if report.evaluation is None else report.evaluation.compressed
    metadata = card_metadata(report, title, ["compressed", "structured-pruning"], scores)
    rows = "\n".join(f"| {' | '.join(escaped(cell) for cell in row)} |" for row in summary_rows(report))
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {escaped(title)}

{headline(report)} Made from {code(checkpoint.file)} (SHA-256 {code(checkpoint.sha256)}){how_it_was_made(report)}:
units were removed and the next layer's weights refitted.

| | before | after | |
|---|---:|---:|---:|
{rows}

{card_use(report)}

## How it was made and checked

Widths: {escaped(report.rule)}. Calibrated on {fitting.samples} samples of {code(str(fitting.source))}, checked on
{fitting.held_back} held back; seed {report.inputs.seed}. The figures above are of this very file, on the
machine that made it.

## Limits

Whatever the original network could not do, this one cannot do either. Accuracy was measured on the evaluation data
named above only; classes and groups may have changed unevenly (see the report of the run).
"""


def how_it_was_made(report: RunReport) -> str:
    """Whether weights were trained after the cut, in words."""
    return " without\nretraining" if report.finetune is None else f" with\n{report.finetune.effort} after the cut"


@model_card.register
def training_card(report: TrainingReport) -> str:
    """The card of a network that a training wrote."""
    architecture, fitting, options = report.inputs.architecture, report.inputs.data.fitting, report.options
    title = f"{architecture.spec.partition(':')[2]} trained by {report.method}"
    final = None if report.evaluation is None else report.evaluation.trained
    scores = {"training": report.training, "held back": report.validation, "evaluation": final}
    rows = "\n".join(
        f"| {name} | {score.loss:.4g} | {'–' if score.top1 is None else format(score.top1, '.2%')} |"
        for name, score in scores.items()
        if score is not None
    )
    origin = report.inputs.checkpoint
    start = "random weights" if origin is None else f"{code(origin.file)} (SHA-256 {code(origin.sha256)})"
    metadata = card_metadata(report, title, [report.method], final)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {escaped(title)}

{report.parameters:,} parameters, {report.nonzeros:,} of {report.weights:,} weights nonzero. Trained from
{start}.

| samples | {escaped(str(options.get("loss", "loss")))} | top-1 |
|---|---:|---:|
{rows}

{card_use(report)}

## How it was made

Method {escaped(report.method)}, best of {len(report.curve)} epochs: {report.best_epoch};
λ {option(options, "penalty")}, learning rate {option(options, "lr")}, batches of {option(options, "batch_size")};
{fitting.samples} samples of {code(str(fitting.source))}, {fitting.held_back} held back; seed {report.inputs.seed}.

## Limits

The figures are of the data named above only.
"""


def option(options: dict[str, Any], name: str) -> str:
    """One option of a training in few digits."""
    value = options.get(name)
    return f"{value:g}" if isinstance(value, (int, float)) else escaped(str(value))


def card_metadata(report: Report, title: str, tags: list[str], scores: Scores | None) -> dict[str, Any]:
    """What the Hub reads at the head of a card; an accuracy where one was measured."""
    metadata: dict[str, Any] = {"library_name": "compress-networks", "tags": [*tags, "pytorch", "safetensors"]}
    evaluation = report.inputs.data.evaluation
    if scores is not None and scores.top1 is not None and evaluation is not None:
        images = len(report.inputs.architecture.input_shape) == 3
        evaluated = {
            "task": {"type": "image-classification" if images else "other"},
            "dataset": {"name": evaluation.source, "type": "custom"},
            "metrics": [{"type": "accuracy", "value": round(scores.top1, 6), "name": "top-1 accuracy"}],
        }
        metadata["model-index"] = [{"name": title, "results": [evaluated]}]
    return metadata


def card_use(report: Report) -> str:
    """How the network in the folder is loaded."""
    architecture = report.inputs.architecture
    shape = ", ".join(str(side) for side in architecture.input_shape)
    return f"""## Use

```python
import compress

network = compress.load("this-folder")  # inputs (batch, {shape}), {architecture.input_dtype}
```

Architecture: {code(architecture.spec)}. `config.json` holds its arguments, the new shapes, the kept units and
the preprocessing; it is not a configuration of `transformers`."""

"""A folder for the Hugging Face Hub: the artifact's tensors and manifest, and a model card made from its report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.manifest import CONFIG, MODEL
from compress.report.markdown import headline, summary_rows

CARD = "README.md"


def write_hub_folder(artifact: Path, report: Mapping[str, Any], folder: Path) -> None:
    """Copy tensors and manifest of a written artifact into the new `folder`, and write the model card."""
    folder.mkdir()
    for name in (MODEL, CONFIG):
        shutil.copyfile(artifact / name, folder / name)
    card = training_card(report) if "method" in report else model_card(report)
    (folder / CARD).write_text(card, encoding="utf-8")


def model_card(report: Mapping[str, Any]) -> str:
    """The model card: metadata as the Hub reads it, then what the network is, how to use it and what it was checked on.

    Licence, base model and intended use are not known to this tool and are left to whoever publishes.
    """
    title = f"{Path(report['checkpoint']['file']).stem} compressed"
    metadata = card_metadata(report, title, ["compressed", "structured-pruning"])
    rows = "\n".join(
        f"| {name} | {before} | {after} | {change} |" for name, before, after, change in summary_rows(report)
    )
    calibration = report["data"]["calibration"]
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {title}

{headline(report)} Made from `{report["checkpoint"]["file"]}` (SHA-256 `{report["checkpoint"]["sha256"]}`) without
retraining: units were removed and the next layer's weights refitted.

| | before | after | |
|---|---:|---:|---:|
{rows}

{card_use(report)}

## How it was made and checked

Widths: {report["rule"]}. Calibrated on {calibration["samples"]} samples of `{calibration["source"]}`, checked on
{calibration["held_back"]} held back; seed {report["seed"]}. The figures above are of this very file, on the
machine that made it.

## Limits

Whatever the original network could not do, this one cannot do either. Accuracy was measured on the evaluation data
named above only; classes and groups may have changed unevenly (see the report of the run).
"""


def training_card(report: Mapping[str, Any]) -> str:
    """The model card of a network that a training wrote, as `model_card`."""
    architecture, options = report["architecture"], report["options"]
    title = f"{architecture['spec'].partition(':')[2]} trained by {report['method']}"
    data, evaluation = report["data"], report["evaluation"]
    scores = {"training": report["training"], "held back": report["validation"]}
    if evaluation is not None:
        scores["evaluation"] = evaluation["trained"]
    lines = [
        f"| {name} | {score['loss']:.4g} | {'–' if score.get('top1') is None else format(score['top1'], '.2%')} |"
        for name, score in scores.items()
        if score is not None
    ]
    rows = "\n".join(lines)
    origin = report["origin"]
    start = "random weights" if origin is None else f"`{origin['file']}` (SHA-256 `{origin['sha256']}`)"
    metadata = card_metadata(report, title, [report["method"]])
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}
---

# {title}

{report["parameters"]:,} parameters, {report["nonzeros"]:,} of {report["weights"]:,} weights nonzero. Trained from
{start}.

| samples | {options["loss"]} | top-1 |
|---|---:|---:|
{rows}

{card_use(report)}

## How it was made

Method {report["method"]}, best of {len(report["curve"])} epochs: {report["best_epoch"]}; λ {options["penalty"]:g},
learning rate {options["lr"]:g}, batches of {options["batch_size"]}; {data["training"]["samples"]} samples of
`{data["training"]["source"]}`, {data["training"]["held_back"]} held back; seed {report["seed"]}.

## Limits

The figures are of the data named above only.
"""


def card_metadata(report: Mapping[str, Any], title: str, tags: list[str]) -> dict[str, Any]:
    """What the Hub reads at the head of a card."""
    metadata: dict[str, Any] = {"library_name": "compress-networks", "tags": [*tags, "pytorch", "safetensors"]}
    metric = card_metric(report)
    if metric is not None:
        dataset = {"name": report["data"]["evaluation"]["source"], "type": "custom"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        if len(report["architecture"]["input_shape"]) != 3:
            result["task"] = {"type": "other"}
        metadata["model-index"] = [{"name": title, "results": [result]}]
    return metadata


def card_use(report: Mapping[str, Any]) -> str:
    """How the network in the folder is loaded."""
    shape = ", ".join(str(side) for side in report["architecture"]["input_shape"])
    dtype = report["architecture"].get("input_dtype", "float32")
    return f"""## Use

```python
import compress

network = compress.load("this-folder")  # inputs (batch, {shape}), {dtype}
```

Architecture: `{report["architecture"]["spec"]}`. `config.json` holds its arguments, the new shapes, the kept units and
the preprocessing; it is not a configuration of `transformers`."""


def card_metric(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The accuracy as the Hub's metadata want it; None where none was measured."""
    evaluation = report["evaluation"]
    scored = None if evaluation is None else evaluation.get("compressed", evaluation.get("trained"))
    if scored is None or "top1" not in scored:
        return None
    return {"type": "accuracy", "value": round(scored["top1"], 6), "name": "top-1 accuracy"}

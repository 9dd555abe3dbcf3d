"""Reports that release 0.1.0 wrote, in today's form. What is missing or wrong in them stays so for the check after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SAMPLES = ("source", "samples", "fingerprint", "held_back", "overlap")
FACTS = ("dead", "duplicates", "rank_features", "rank_outputs", "bound", "bound_text", "spectra")
FIT = ("error", "held_back_error", "inherited_error", "rows", "sampling")
UNCHANGED = (
    "rule", "search", "calibration", "cost", "evaluations", "added_biases", "verification", "gates", "exports",
    "hashes", "notes", "seconds",
)  # fmt: skip
TRAINING = (
    "kind", "method", "options", "parameters", "macs", "samples", "curve", "best_epoch", "stopped_early", "training",
    "validation", "nonzeros", "weights", "layers", "couplings", "active_fraction", "weight_decay_objective",
    "undebiased", "penalty_search", "evaluation", "reload_deviation", "exports", "hashes", "notes", "seconds",
)  # fmt: skip


def upgraded_run(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a run's report."""
    layers = content.get("layers", ())
    return {
        "recipe": content.get("recipe", {}),
        **pick(content, UNCHANGED),
        "inputs": {
            **pick(content, ("checkpoint", "architecture", "seed", "versions")),
            "data": upgraded_data(content.get("data"), "calibration"),
        },
        "layers": each(layers, upgraded_layer, lambda layer: "skipped" not in layer),
        "skipped": each(layers, upgraded_skipped, lambda layer: "skipped" in layer),
        "evaluation": upgraded_evaluation(content.get("evaluation")),
        "finetune": upgraded_tuning(content.get("finetune")),
    }


def upgraded_training(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a training's report."""
    return {
        **pick(content, TRAINING),
        "inputs": {
            **pick(content, ("architecture", "seed", "versions")),
            "checkpoint": content.get("origin"),
            "data": upgraded_data(content.get("data"), "training"),
        },
    }


def upgraded_data(data: Any, fitting: str) -> Any:
    """The samples that were read; `fitting` is how those to fit to were called."""
    if not isinstance(data, dict):
        return data
    return {
        "fitting": pick(data.get(fitting), SAMPLES),
        "evaluation": pick(data.get("evaluation"), SAMPLES),
        "preprocessing": data.get("preprocessing"),
    }


def upgraded_layer(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer, its figures nested by what they belong to."""
    return {
        **pick(layer, ("name", "units", "kept", "seconds")),
        "facts": pick(layer, FACTS),
        "widths": {"curve": layer.get("curve"), "tried": layer.get("held_back_curve", ())},
        "fit": pick(layer, FIT),
        "certificate": layer.get("lasso"),
    }


def upgraded_skipped(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer that was left as it is."""
    return {**pick(layer, ("name", "units")), "reason": layer["skipped"]}


def upgraded_evaluation(evaluation: Any) -> Any:
    """An evaluation, its classes as a list."""
    if not isinstance(evaluation, dict):
        return evaluation
    classes = evaluation.get("per_class", {})
    if isinstance(classes, dict):
        classes = [
            {"label": label, **scores} if isinstance(scores, dict) else scores for label, scores in classes.items()
        ]
    return {**evaluation, "per_class": classes, "figures": scored_figures(evaluation)}


def scored_figures(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of both networks as figures; their intervals are not known."""
    scores = [evaluation.get(name) for name in ("original", "compressed")]
    pairs = {}
    if all(isinstance(score, dict) for score in scores):
        pairs = {key: [score.get(key) for score in scores] for key in ("top1", "top5", "loss")}  # type: ignore[union-attr]
    errors = evaluation.get("squared_error")
    if isinstance(errors, list) and len(errors) == 2:
        pairs["squared_error"] = errors
    return [
        {"key": key, "output": "", "original": before, "compressed": after}
        for key, (before, after) in pairs.items()
        if before is not None and after is not None
    ]


def upgraded_tuning(tuning: Any) -> Any:
    """A fine-tuning: distillation and a training method in one form."""
    if not isinstance(tuning, dict):
        return tuning
    upgraded = {
        **pick(tuning, ("divergences", "options", "held_back_before", "curve")),
        "evaluation_before": upgraded_evaluation(tuning.get("evaluation_before")),
    }
    if "method" in tuning:
        return {
            **upgraded,
            "method": tuning["method"],
            "length": tuning.get("epochs"),
            "kept": tuning.get("kept_epoch"),
        }
    return {**upgraded, "method": "distillation", "length": tuning.get("steps"), "kept": tuning.get("kept_step")}


def pick(value: Any, names: tuple[str, ...]) -> Any:
    """Of a mapping these parts, where it has them; anything else as it is."""
    return {name: value[name] for name in names if name in value} if isinstance(value, Mapping) else value


def each(values: Any, change: Callable[[dict[str, Any]], Any], wanted: Callable[[dict[str, Any]], bool]) -> Any:
    """The mappings of a list that are wanted, changed, and what is no mapping as it is."""
    if not isinstance(values, list):
        return values
    return [
        change(value) if isinstance(value, dict) else value
        for value in values
        if not isinstance(value, dict) or wanted(value)
    ]

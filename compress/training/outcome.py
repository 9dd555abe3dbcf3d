"""What a training came to, as plain data for `training.json`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compress.data.source import DataSource
from compress.recipe import TrainingOptions
from compress.training.couplings import find_couplings, weight_decay_objective
from compress.training.loop import score
from compress.training.losses import LOSSES
from compress.training.methods import weight_names
from compress.training.session import Trained


def describe_scores(
    module: nn.Module, options: TrainingOptions, training: DataSource, validation: DataSource | None
) -> dict[str, Any]:
    """Loss and top-1 on the training and the validation samples."""
    found: dict[str, Any] = {"training": None, "validation": None}
    for name, source in (("training", training), ("validation", validation)):
        if source is not None:
            loss, top1 = score(module, source, LOSSES[options.loss], options.batch_size)
            found[name] = {"loss": loss, "top1": top1}
    return found


def describe_training(
    trained: Trained, options: TrainingOptions, training: DataSource, validation: DataSource | None, example: Tensor
) -> dict[str, Any]:
    """Plain data: curve, losses, objective of weight decay, nonzeros of every layer, active units, the search."""
    module, fitted = trained.module, trained.fitted
    scores = describe_scores(module, options, training, validation)
    layers = {name: module.get_parameter(name).detach() for name in weight_names(module)}
    couplings = find_couplings(module, example)
    active = [pair.active_units() for pair in couplings.pairs]
    return {
        "method": options.method,
        "options": options.model_dump(mode="json"),
        "samples": training.sample_count,
        "curve": list(fitted.curve),
        "best_epoch": fitted.best_epoch,
        "stopped_early": fitted.stopped_early,
        **scores,
        "undebiased": None
        if trained.undebiased is None
        else describe_scores(trained.undebiased, options, training, validation),
        "weight_decay_objective": weight_decay_objective(module, scores["training"]["loss"], options.penalty),
        "nonzeros": sum(int(value.count_nonzero()) for value in layers.values()),
        "weights": sum(value.numel() for value in layers.values()),
        "layers": [
            {"name": name, "weights": value.numel(), "nonzeros": int(value.count_nonzero())}
            for name, value in layers.items()
        ],
        "couplings": [
            {"name": pair.name, "units": pair.units, "active": count}
            for pair, count in zip(couplings.pairs, active, strict=True)
        ],
        "active_fraction": couplings.fraction_active() if couplings.pairs else None,
        "penalty_search": None
        if trained.choice is None
        else {
            "met": trained.choice.met,
            "penalties": list(trained.choice.penalties),
            "levels": list(trained.choice.levels),
            "trainings": len(trained.choice.history),
        },
    }

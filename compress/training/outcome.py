"""What a training came to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from compress.data.source import DataSource
from compress.recipe import TrainingOptions
from compress.report.model import CouplingReport, Epoch, PenaltySearch, Scores, Undebiased, WeightsReport
from compress.training.loop import score
from compress.training.losses import LOSSES
from compress.training.methods import weight_names
from compress.training.proximal.couplings import find_couplings, weight_decay_objective
from compress.training.session import Trained


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training came to, whatever becomes of its network; see `TrainingReport`."""

    method: str
    curve: tuple[Epoch, ...]
    best_epoch: int
    stopped_early: bool
    training: Scores
    validation: Scores | None
    undebiased: Undebiased | None
    weight_decay_objective: float
    nonzeros: int
    weights: int
    layers: tuple[WeightsReport, ...]
    couplings: tuple[CouplingReport, ...]
    active_fraction: float | None
    penalty_search: PenaltySearch | None


def score_samples(module: nn.Module, options: TrainingOptions, source: DataSource) -> Scores:
    """Loss and top-1 on the samples of a source."""
    return Scores(*score(module, source, LOSSES[options.loss], options.batch_size))


def describe_training(
    trained: Trained,
    options: TrainingOptions,
    training: DataSource,
    validation: DataSource | None,
    example: Tensor | tuple[Tensor, ...],
) -> TrainingOutcome:
    """Curve, losses, objective of weight decay, nonzeros of every layer, active units, the search."""
    module, fitted, before = trained.module, trained.fitted, trained.undebiased
    layers = {name: module.get_parameter(name).detach() for name in weight_names(module)}
    couplings = find_couplings(module, example)
    scores = score_samples(module, options, training)

    def validated(network: nn.Module) -> Scores | None:
        return None if validation is None else score_samples(network, options, validation)

    return TrainingOutcome(
        method=options.method,
        curve=fitted.epochs,
        best_epoch=fitted.best_epoch,
        stopped_early=fitted.stopped_early,
        training=scores,
        validation=validated(module),
        undebiased=None if before is None else Undebiased(score_samples(before, options, training), validated(before)),
        weight_decay_objective=weight_decay_objective(module, scores.loss, options.penalty),
        nonzeros=sum(int(value.count_nonzero()) for value in layers.values()),
        weights=sum(value.numel() for value in layers.values()),
        layers=tuple(WeightsReport(name, value.numel(), int(value.count_nonzero())) for name, value in layers.items()),
        couplings=tuple(CouplingReport(pair.name, pair.units, pair.active_units()) for pair in couplings.pairs),
        active_fraction=couplings.fraction_active() if couplings.pairs else None,
        penalty_search=None
        if trained.choice is None
        else PenaltySearch(
            trained.choice.met,
            tuple(trained.choice.penalties),
            tuple(trained.choice.levels),
            len(trained.choice.history),
        ),
    )

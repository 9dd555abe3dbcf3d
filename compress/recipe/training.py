"""How a network is trained: the `training` section of a recipe, for `compress train`, `finetune` and `--finetune`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from compress.recipe.option import Section, option
from compress.recipe.texts import counts

Method = Literal["sgd", "pathprox", "lasso", "group_lasso", "l1"]
METHODS: tuple[str, ...] = get_args(Method)
TRAIN_DEFAULTS: dict[str, Any] = {"epochs": 20, "lr": 0.1}
FINETUNE_DEFAULTS: dict[str, Any] = {"epochs": 2, "lr": 0.01}
HERE = Section.TRAINING


class TrainingOptions(BaseModel):
    """Method, steps and data handling of a training. Without `epochs` and `lr`: 20 and 0.1, fine-tuning 2 and 0.01.

    Methods, with λ = `penalty`: `sgd` minimises loss + λ/2 Σ‖W‖² (weight decay), `pathprox` the same by proximal steps
    on units, `lasso` loss + λ Σ|w| and `group_lasso` loss + λ Σ‖columns‖ by SGD, `l1` loss + λ Σ|w| by proximal steps,
    which leave exact zeros. Biases and normalisation parameters are free in all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = option("sgd", "What is minimised, and how: sgd is weight decay.", HERE, everyday=True)
    loss: Literal["cross_entropy", "squared", "poisson"] = option(
        "cross_entropy", "Loss: cross_entropy for classes, squared or poisson also for real targets.", HERE
    )
    epochs: int | None = option(
        None, "Passes over the training samples.", HERE, "COUNT", everyday=True, ge=1,
        default_text="20, fine-tuning 2",
    )  # fmt: skip
    batch_size: int = option(128, "Samples of one step.", HERE, "COUNT", flag="train-batch-size", ge=1)
    lr: float | None = option(
        None, "Largest learning rate.", HERE, "NUMBER", everyday=True, gt=0, lt=1e6,
        default_text="0.1, fine-tuning 0.01",
    )  # fmt: skip
    momentum: float = option(0.9, "Momentum of the steps.", HERE, "NUMBER", ge=0, lt=1)
    nesterov: bool = option(False, "Nesterov's momentum.", HERE)
    penalty: float = option(1e-4, "λ of the method.", HERE, "NUMBER", everyday=True, ge=0, lt=1e6)
    schedule: Literal["cosine", "constant", "step"] = option("cosine", "How the learning rate falls.", HERE)
    clip_norm: float = option(
        0.0, "Gradients are scaled down to this norm; 0: they are not.", HERE, "NUMBER", ge=0, lt=1e6
    )
    ramp: float = option(0.0, "Epochs over which λ rises linearly from 0.", HERE, "NUMBER", ge=0)
    debias: int = option(0, "Epochs without penalty at the end, in which zeros stay zeros.", HERE, "COUNT", ge=0)
    debias_lr: float | None = option(
        None, "Largest learning rate of these.", HERE, "NUMBER", gt=0, lt=1e6, default_text="as --lr"
    )
    warmup: float = option(0.0, "Epochs over which the learning rate rises linearly.", HERE, "NUMBER", ge=0)
    milestones: Annotated[tuple[int, ...], BeforeValidator(counts)] = option(
        (), "Epochs after which the step schedule multiplies the rate by --gamma.", HERE, "COUNT,…"
    )
    gamma: float = option(0.1, "Factor of the step schedule.", HERE, "NUMBER", gt=0, le=1)
    crop: int = option(
        0, "Images are padded by so many pixels and cropped at random.", HERE, "COUNT", flag="train-crop", ge=0
    )
    flip: bool = option(False, "Images are mirrored left to right at random.", HERE)
    held_back: float = option(
        0.1, "Share of the training samples that only validates.", HERE, "SHARE", flag="train-held-back", ge=0, lt=0.9
    )
    patience: int | None = option(
        None, "Epochs without a lower validation loss after which to stop.", HERE, "COUNT", ge=1
    )
    half: bool = option(False, "Forward pass in bfloat16.", HERE)
    published: bool = option(False, "PathProx as published, without moving magnitudes into v.", HERE)
    radius: float = option(
        1.0, "‖w‖ of every unit that PathProx holds; 0: the balanced one.", HERE, "NUMBER", ge=0, lt=1e6
    )
    layer_balance: bool = option(True, "PathProx makes the path norms of linked layers equal.", HERE)
    target_sparsity: float | None = option(
        None, "Find the λ of l1 that makes this share of the weights zero.", HERE, "SHARE", gt=0, lt=1
    )
    target_nonzeros: int | None = option(None, "Find the λ of l1 that leaves so many weights.", HERE, "COUNT", ge=1)
    per_layer: bool = option(False, "A λ for each layer, each to reach the target share.", HERE)
    target_tolerance: float = option(
        0.01, "Relative error allowed of the number of nonzeros.", HERE, "SHARE", gt=0, lt=1
    )
    trainings: int = option(20, "Trainings at most in the search for λ.", HERE, "COUNT", ge=1)

    @model_validator(mode="after")
    def _options_agree(self) -> TrainingOptions:
        faults = []
        if self.patience is not None and self.held_back == 0:
            faults.append("patience needs validation samples: give held_back above 0")
        if self.nesterov and self.momentum == 0:
            faults.append("nesterov needs a momentum above 0")
        if self.schedule == "step" and not self.milestones:
            faults.append("the step schedule needs milestones")
        if self.milestones and (self.schedule != "step" or min(self.milestones) < 1):
            faults.append("milestones are epochs from 1 on, of the step schedule")
        if self.target_sparsity is not None and self.target_nonzeros is not None:
            faults.append("give one of target_sparsity and target_nonzeros")
        if self.epochs is not None and self.ramp >= self.epochs:
            faults.append(f"λ must have risen before the end: give ramp below epochs, {self.epochs}, got {self.ramp:g}")
        if self.searches and self.method != "l1":
            faults.append(f"a target is reached by choosing the penalty of method l1, got {self.method}")
        if self.per_layer and self.target_sparsity is None:
            faults.append("per_layer needs target_sparsity, the share that every layer is to reach")
        if self.searches and self.patience is not None:
            faults.append("the search for a penalty trains to the last epoch; leave patience out")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def searches(self) -> bool:
        """Whether λ is chosen for a wanted sparsity."""
        return self.target_sparsity is not None or self.target_nonzeros is not None

    def completed(self, *, finetuning: bool = False) -> TrainingOptions:
        """The options with `epochs` and `lr` filled in."""
        defaults = FINETUNE_DEFAULTS if finetuning else TRAIN_DEFAULTS
        return self.model_copy(update={name: value for name, value in defaults.items() if getattr(self, name) is None})

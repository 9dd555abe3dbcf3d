"""How a network is trained: the `training` section of a recipe, for `compress train`, `finetune` and `--finetune`."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["sgd", "pathprox", "lasso", "group_lasso", "l1"]
METHODS: tuple[str, ...] = get_args(Method)
TRAIN_DEFAULTS: dict[str, Any] = {"epochs": 20, "lr": 0.1}
FINETUNE_DEFAULTS: dict[str, Any] = {"epochs": 2, "lr": 0.01}


class TrainingOptions(BaseModel):
    """Method, steps and data handling of a training. Without `epochs` and `lr`: 20 and 0.1, fine-tuning 2 and 0.01.

    Methods, with λ = `penalty`: `sgd` minimises loss + λ/2 Σ‖W‖² (weight decay), `pathprox` the same by proximal steps
    on units, `lasso` loss + λ Σ|w| and `group_lasso` loss + λ Σ‖columns‖ by SGD, `l1` loss + λ Σ|w| by proximal steps,
    which leave exact zeros. Biases and normalisation parameters are free in all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = "sgd"
    loss: Literal["cross_entropy", "squared", "poisson"] = "cross_entropy"
    epochs: int | None = Field(None, ge=1, description="passes over the training samples")
    batch_size: int = Field(128, ge=1, description="samples of one step")
    lr: float | None = Field(None, gt=0, lt=1e6, description="largest learning rate")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    penalty: float = Field(1e-4, ge=0, lt=1e6, description="λ of the method")
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    clip_norm: float = Field(0.0, ge=0, lt=1e6, description="gradients are scaled down to this norm; 0: they are not")
    ramp: float = Field(0.0, ge=0, description="epochs over which λ rises linearly from 0")
    debias: int = Field(0, ge=0, description="epochs without penalty at the end, in which zeros stay zeros")
    debias_lr: float | None = Field(None, gt=0, lt=1e6, description="largest learning rate of these; lr by default")
    warmup: float = Field(0.0, ge=0, description="epochs over which the rate rises linearly")
    milestones: tuple[int, ...] = Field((), description="epochs after which `step` multiplies the rate by `gamma`")
    gamma: float = Field(0.1, gt=0, le=1)
    crop: int = Field(0, ge=0, description="images are padded by so many pixels and cropped at random")
    flip: bool = Field(False, description="images are mirrored left to right at random")
    held_back: float = Field(0.1, ge=0, lt=0.9, description="share of the training samples that only validates")
    patience: int | None = Field(None, ge=1, description="epochs without a lower validation loss after which to stop")
    half: bool = Field(False, description="forward pass in bfloat16")
    published: bool = Field(False, description="PathProx as published, without moving magnitudes into v")
    radius: float = Field(1.0, ge=0, lt=1e6, description="‖w‖ of every unit that PathProx holds; 0: the balanced one")
    layer_balance: bool = Field(True, description="PathProx makes the path norms of linked layers equal")
    target_sparsity: float | None = Field(None, gt=0, lt=1, description="share of the weights to become zero")
    target_nonzeros: int | None = Field(None, ge=1, description="weights to stay nonzero")
    per_layer: bool = Field(False, description="a λ for each layer, each to reach the target share")
    target_tolerance: float = Field(0.01, gt=0, lt=1, description="relative error of the number of nonzeros")
    trainings: int = Field(20, ge=1, description="trainings at most in the search for λ")

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

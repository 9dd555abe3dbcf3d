"""The other methods: ℓ1 proximal gradient (L1-choice, algorithm 3), and lasso and group lasso as terms of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.training.proximal.descent import ProximalDescent, check_settings


class ProximalL1(ProximalDescent):
    """Minimise  loss + Σ_j λ_j ‖W_j‖₁  by mini-batch proximal gradient: weights are thresholded, biases are not.

    Weights are the tensors of two or more dimensions. Give each layer a parameter group of its own for λ_j of its own.
    With momentum m the gradient step takes the running direction, which adds up to g/(1 − m); the threshold is
    ηλ_j/(1 − m), so that |∂loss/∂w| = λ_j on the nonzeros of a stationary point whatever m is.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor = 0.1,
        penalty: float = 1e-4,
        momentum: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        check_settings(lr=lr, penalty=penalty, momentum=momentum, nesterov=nesterov)
        super().__init__(params, {"lr": lr, "penalty": penalty, "momentum": momentum, "nesterov": nesterov})

    def _proximal(self) -> None:
        for group in self.param_groups:
            amount = float(group["lr"]) * group["penalty"] / (1 - group["momentum"])
            for parameter in group["params"]:
                if parameter.ndim >= 2 and amount and parameter.grad is not None:
                    parameter.copy_(soft_threshold(parameter, amount))


def soft_threshold(values: Tensor, amount: float) -> Tensor:
    """sign(x)·max(0, |x| − amount): the proximal operator of amount·‖x‖₁."""
    return values.sign() * (values.abs() - amount).clamp_min(0)


def lasso_term(module: nn.Module) -> Tensor:
    """Σ |w| over the tensors of two or more dimensions."""
    return torch.stack([value.abs().sum() for value in module.parameters() if value.ndim >= 2]).sum()


def group_lasso_term(module: nn.Module) -> Tensor:
    """Σ of the 2-norms of all units' outgoing weights: the columns (input channels) of every weight tensor."""
    norms = [
        torch.linalg.vector_norm(value.transpose(0, 1).flatten(1) + 0.0, dim=1).sum()
        for value in module.parameters()
        if value.ndim >= 2
    ]
    return torch.stack(norms).sum()

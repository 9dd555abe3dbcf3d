"""The other methods: ℓ1 proximal gradient (L1-choice, algorithm 3), and lasso and group lasso as terms of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class ProximalL1(Optimizer):
    """Minimise  loss + Σ_j λ_j ‖W_j‖₁  by mini-batch proximal gradient: weights are thresholded, biases are not.

    Weights are the tensors of two or more dimensions. Give each layer a parameter group of its own for λ_j of its own.
    With momentum m the gradient step takes the running direction, which adds up to g/(1 − m); the threshold is
    ηλ_j/(1 − m), so that |∂loss/∂w| = λ_j on the nonzeros of a stationary point whatever m is.
    """

    def __init__(self, params: Any, *, lr: float | Tensor = 0.1, penalty: float = 1e-4, momentum: float = 0.0) -> None:
        for name, value in (("lr", float(lr)), ("penalty", penalty), ("momentum", momentum)):
            if not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if not momentum < 1:
            raise ValueError(f"`momentum` must lie below 1, got {momentum}.")
        super().__init__(params, {"lr": lr, "penalty": penalty, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One proximal step. A closure is evaluated first, with gradients, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate = float(group["lr"])
            for parameter in group["params"]:
                direction = parameter.grad
                if direction is None:
                    continue
                if group["momentum"]:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.clone(direction).detach()
                    else:
                        state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
                    direction = state["momentum_buffer"]
                parameter.add_(direction, alpha=-rate)
                if parameter.ndim >= 2 and group["penalty"]:
                    parameter.copy_(soft_threshold(parameter, rate * group["penalty"] / (1 - group["momentum"])))
        return loss


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

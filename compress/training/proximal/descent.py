"""What proximal optimizers share: a gradient step of every parameter with momentum, then a step of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class ProximalDescent(Optimizer):
    """x ← prox(x − ηd), d the gradient or its running direction; groups have `lr`, `momentum` and `nesterov`.

    A subclass defines `_proximal`, and may add to the gradient in `_gradient`. With momentum m the direction adds up to
    g/(1 − m), so a penalty λ asks for a proximal step of ηλ/(1 − m).
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. A closure is evaluated first, with gradients, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = self._running(parameter, self._gradient(parameter, parameter.grad, group), group)
                    parameter.add_(direction, alpha=-float(group["lr"]))
        self._proximal()
        return loss

    def _gradient(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient to descend along."""
        return gradient

    def _running(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        if not group["momentum"]:
            return gradient
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.clone(gradient).detach()
        else:
            buffer.mul_(group["momentum"]).add_(gradient)
        return gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer

    def _proximal(self) -> None:
        """The proximal step of all parameters."""
        raise NotImplementedError


def check_settings(*, lr: float | Tensor, penalty: float, momentum: float, nesterov: bool) -> None:
    """Refuse rates and penalties below 0, and momenta that do not settle. Raises ValueError."""
    for name, value in (("lr", float(lr)), ("penalty", penalty), ("momentum", momentum)):
        if not value >= 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
    if not momentum < 1:
        raise ValueError(f"`momentum` must lie below 1, got {momentum}.")
    if nesterov and momentum == 0:
        raise ValueError("`nesterov` needs a `momentum` above 0.")

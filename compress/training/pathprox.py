"""PathProx: proximal gradient on the path-norm objective of weight decay (Yang et al. 2022, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.training.couplings import Bound, Coupling, Couplings


class PathProx(Optimizer):
    """Minimise  loss + λ Σ_couplings Σ_k ‖w_k‖‖v_k‖ + λ/2 Σ_rest ‖W‖²,  whose minimisers are those of weight decay λ.

    One step: a (momentum) gradient step of every parameter on the loss; each w_k is projected to the unit sphere, its
    magnitude moved into v_k and out of its bias, so that the network stays the same; then
    v_k ← v_k·max(0, 1 − ηλ/‖v_k‖); weights outside the couplings decay as usual; last, layers are balanced: path norms
    of linked couplings are made equal, again without changing the network. Momentum follows every rescaling.

    A unit whose v_k reaches zero stays there as long as its gradient is below λ. Units with w_k = 0 are set to v_k = 0.

    Args:
        params: parameters or groups, as for every torch optimizer. A group's `lr` and `penalty` act on the weights in
            it; a coupling takes both from the group that holds its v. A coupling with a parameter that is in no group
            (frozen, say) is left out, and its weights decay.
        couplings: from `find_couplings(module, example_inputs)`; of the module whose parameters these are.
        lr: η. penalty: λ. momentum, nesterov: as for SGD.
        weight_decay: for weights outside couplings; None: `penalty` for tensors of two or more dimensions, else 0.
        published: the paper's own step, which projects w_k without moving its magnitude into v_k.
        layer_balance: make the path norms of linked couplings equal.
    """

    def __init__(
        self,
        params: Any,
        couplings: Couplings,
        *,
        lr: float | Tensor = 0.1,
        penalty: float = 1e-4,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float | None = None,
        published: bool = False,
        layer_balance: bool = True,
    ) -> None:
        for name, value in (("lr", float(lr)), ("penalty", penalty), ("momentum", momentum)):
            if not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if nesterov and momentum == 0:
            raise ValueError("`nesterov` needs a `momentum` above 0.")
        if weight_decay is not None and weight_decay < 0:
            raise ValueError(f"`weight_decay` must be at least 0, got {weight_decay}.")
        defaults = {
            "lr": lr,
            "penalty": penalty,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.published = published
        self.layer_balance = layer_balance
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        self.couplings = tuple(pair for pair in couplings.pairs if _held(pair, held))
        kept = {pair.name for pair in self.couplings}
        self._links = tuple(
            (couplings.pairs[one], couplings.pairs[other], units)
            for one, other, units in couplings.links
            if {couplings.pairs[one].name, couplings.pairs[other].name} <= kept and _held(units, held)
        )
        self._coupled = {
            id(bound.tensor) for pair in self.couplings for bound in (*pair.inputs, *pair.shifts, *pair.outputs)
        }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One PathProx step. A closure is evaluated first, with gradients, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owner: dict[int, dict[str, Any]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                owner[id(parameter)] = group
                if parameter.grad is not None:
                    self._descend(parameter, group)
        for pair in self.couplings:
            group = owner[id(pair.outputs[0].tensor)]
            self._project(pair)
            self._threshold(pair, float(group["lr"]) * float(group["penalty"]))
        if self.layer_balance and not self.published:
            for one, other, units in self._links:
                self._equalise(one, other, units)
        return loss

    @torch.no_grad()
    def project(self) -> None:
        """Put every w_k on the unit sphere without changing the network, as at the end of a step."""
        for pair in self.couplings:
            self._project(pair)

    def _descend(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None, "the caller has checked"
        if group["momentum"]:
            state = self.state[parameter]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = state["momentum_buffer"] = torch.clone(gradient).detach()
            else:
                buffer.mul_(group["momentum"]).add_(gradient)
            gradient = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        if id(parameter) not in self._coupled:
            decay = group["weight_decay"]
            if decay is None:
                decay = group["penalty"] if parameter.ndim >= 2 else 0.0
            if decay:
                parameter.mul_(1 - float(group["lr"]) * decay)
        parameter.add_(gradient, alpha=-float(group["lr"]))

    def _project(self, pair: Coupling) -> None:
        norms = pair.input_norms()
        alive = norms > 0
        inverse = torch.where(alive, norms.clamp_min(torch.finfo(norms.dtype).tiny).reciprocal(), 1.0)
        for bound in pair.inputs:
            self._rescale(bound, inverse)
        if self.published:
            return
        for bound in pair.shifts:
            self._rescale(bound, inverse)
        for bound in pair.outputs:
            self._rescale(bound, torch.where(alive, norms, 1.0))
            if not bool(alive.all()):
                bound.scale_(alive.to(norms.dtype))

    @staticmethod
    def _threshold(pair: Coupling, amount: float) -> None:
        shrink = shrink_factors(pair.output_norms(), amount)
        for bound in pair.outputs:
            bound.scale_(shrink)

    def _equalise(self, one: Coupling, other: Coupling, units: Coupling) -> None:
        first, second = one.path_norm(), other.path_norm()
        if not (float(first) > 0 and float(second) > 0):
            return
        factor = (second / first).sqrt().expand(units.units)
        for bound in (*units.inputs, *units.shifts):
            self._rescale(bound, factor)
        for bound in units.outputs:
            self._rescale(bound, factor.reciprocal())
        self._project(other)

    def _rescale(self, bound: Bound, factors: Tensor) -> None:
        """Scale a parameter, and its momentum inversely, as its gradient scales."""
        bound.scale_(factors)
        buffer = self.state[bound.tensor].get("momentum_buffer") if bound.tensor in self.state else None
        if buffer is not None and not self.published:
            bound.part.scale_(buffer, factors.reciprocal())


def shrink_factors(norms: Tensor, amount: float) -> Tensor:
    """max(0, 1 − amount/‖v_k‖) (K,): the proximal operator of amount·Σ_k‖v_k‖₂ multiplies v_k by it."""
    return (1 - amount / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)


def _held(pair: Coupling, held: set[int]) -> bool:
    return all(id(bound.tensor) in held for bound in (*pair.inputs, *pair.shifts, *pair.outputs))

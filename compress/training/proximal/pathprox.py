"""PathProx: proximal gradient on the path-norm objective of weight decay (Yang et al. 2022, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.training.proximal.couplings import Bound, Coupling, Couplings
from compress.training.proximal.descent import ProximalDescent, check_settings


class PathProx(ProximalDescent):
    """Minimise  loss + λ Σ_couplings Σ_k ‖w_k‖‖v_k‖ + λ/2 Σ_rest ‖W‖²,  whose minimisers are those of weight decay λ.

    One step: a (momentum) gradient step of every parameter on the loss; the proximal operator of ηλ‖w_k‖‖v_k‖ on every
    unit (`shrink_norms`), which silences units with ‖v_k‖ ≤ ηλ‖w_k‖; each w_k is put on the sphere, its magnitude moved
    into v_k and out of its bias, so that the network stays the same; weights outside the couplings decay as usual;
    last, layers are balanced: path norms of linked couplings are made equal, again without changing the network.
    A rescaling takes momentum, a velocity, along with its parameter (scaling it inversely, as gradients scale, would
    amplify it with every w_k that outgrew the sphere, and diverge). A running direction adds up to g/(1 − m) with
    momentum m, and so does the threshold: stationary points are those of the objective whatever m is.

    As the magnitude that w_k gains or loses counts, w_k has its share of the shrinkage: thresholding v_k alone would
    stop where |∂loss/∂m_k| is λ/(1 + m_k²) for m_k = ‖w_k‖‖v_k‖, not λ. Of all ways to part m_k between w_k and v_k the
    sphere is what silences units: a step shrinks m_k by ηλ(‖w_k‖² + ‖v_k‖²), and with ‖w_k‖ = ‖v_k‖ that is weight
    decay, 2ηλm_k, under which small units fade but never go.

    A unit whose v_k reaches zero stays there as long as its gradient is below λ‖w_k‖. Units with w_k = 0 get v_k = 0.

    Args:
        params: parameters or groups, as for every torch optimizer. A group's `lr` and `penalty` act on the weights in
            it; a coupling takes both from the group that holds its v. A coupling with a parameter that is in no group
            (frozen, say) is left out, and its weights decay.
        couplings: from `find_couplings(module, example_inputs)`; of the module whose parameters these are.
        lr: η. penalty: λ. momentum, nesterov: as for SGD.
        weight_decay: for weights outside couplings; None: `penalty` for tensors of two or more dimensions, else 0.
        published: the paper's own step: w_k is projected to the unit sphere without moving its magnitude into v_k, and
            v_k alone is thresholded by ηλ.
        layer_balance: make the path norms of linked couplings equal.
        radius: ‖w_k‖ to hold; the objective is the same for every radius. A larger one silences units sooner and moves
            v_k faster against w_k. None: √(rms of a coupling's active ‖w_k‖‖v_k‖), so that Σ‖w_k‖² = Σ‖v_k‖² over
            them: fewer units go, and those that stay reach a lower objective.
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
        radius: float | None = 1.0,
    ) -> None:
        check_settings(lr=lr, penalty=penalty, momentum=momentum, nesterov=nesterov)
        if weight_decay is not None and weight_decay < 0:
            raise ValueError(f"`weight_decay` must be at least 0, got {weight_decay}.")
        if radius is not None and not radius > 0:
            raise ValueError(f"`radius` must be positive, got {radius}.")
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
        self.radius = radius
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

    def _proximal(self) -> None:
        owner = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        for pair in self.couplings:
            group = owner[id(pair.outputs[0].tensor)]
            amount = float(group["lr"]) * float(group["penalty"]) / (1 - group["momentum"])
            if self.published:
                self._step_as_published(pair, amount)
            else:
                self._shrink(pair, amount)
        if self.layer_balance and not self.published:
            for one, other, units in self._links:
                self._equalise(one, other, units)

    @torch.no_grad()
    def project(self) -> None:
        """Put the w_k of every coupling on one sphere without changing the network, as at the end of a step."""
        for pair in self.couplings:
            if self.published:
                self._step_as_published(pair, 0.0)
            else:
                self._shrink(pair, 0.0)

    def _gradient(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """With weight decay outside the couplings."""
        if id(parameter) in self._coupled:
            return gradient
        decay = group["weight_decay"]
        if decay is None:
            decay = group["penalty"] if parameter.ndim >= 2 else 0.0
        return gradient.add(parameter, alpha=decay) if decay else gradient

    def _shrink(self, pair: Coupling, amount: float) -> None:
        """The proximal operator of amount·Σ‖w_k‖‖v_k‖; then w_k put on the sphere, bias along, the inverse in v_k."""
        before, after = pair.input_norms(), pair.output_norms()
        inputs, outputs = shrink_norms(before, after, amount)
        alive = inputs > 0
        radius = self._radius_for(inputs * outputs)
        moved = torch.where(alive, radius / torch.where(alive, inputs, 1.0), 1.0)  # what w and its bias grow by
        for bound in pair.inputs:
            bound.scale_(_ratio(inputs, before) * moved)
            self._follow(bound, moved)
        for bound in pair.shifts:
            self._rescale(bound, moved)
        for bound in pair.outputs:
            bound.scale_(torch.where(alive, _ratio(outputs, after), 0.0) / moved)
            self._follow(bound, moved.reciprocal())

    def _radius_for(self, products: Tensor) -> Tensor:
        if self.radius is not None:
            return products.new_tensor(self.radius)
        active = products > 1e-6 * products.max()
        if not bool(active.any()):
            return products.new_tensor(1.0)
        return products[active].square().mean().sqrt().sqrt()

    def _step_as_published(self, pair: Coupling, amount: float) -> None:
        norms = pair.input_norms()
        for bound in pair.inputs:
            bound.scale_(torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0))
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
        self._shrink(other, 0.0)

    def _rescale(self, bound: Bound, factors: Tensor) -> None:
        """Scale a parameter and with it its momentum, which is a velocity."""
        bound.scale_(factors)
        self._follow(bound, factors)

    def _follow(self, bound: Bound, factors: Tensor) -> None:
        """Scale a parameter's momentum."""
        buffer = self.state[bound.tensor].get("momentum_buffer") if bound.tensor in self.state else None
        if buffer is not None:
            bound.part.scale_(buffer, factors)


def shrink_norms(inputs: Tensor, outputs: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """Norms (K,), (K,) of the proximal operator of amount·Σ_k‖w_k‖‖v_k‖ at units with norms a_k, b_k.

    Directions stay, so each unit is  min over a, b ≥ 0 of  ½(a − a_k)² + ½(b − b_k)² + amount·a·b:  for amount < 1
    convex, with a = (a_k − amount·b_k)/(1 − amount²) and b alike where both are positive. Elsewhere the product is 0,
    which is given as b = 0 with a = a_k, whichever of the two is the smaller: the network is the same and w_k keeps
    its direction.
    """
    if amount >= 1:
        return inputs, torch.zeros_like(outputs)
    first = (inputs - amount * outputs) / (1 - amount**2)
    second = (outputs - amount * inputs) / (1 - amount**2)
    positive = (first > 0) & (second > 0)
    return torch.where(positive, first, inputs), torch.where(positive, second, 0.0)


def shrink_factors(norms: Tensor, amount: float) -> Tensor:
    """max(0, 1 − amount/‖v_k‖) (K,): the proximal operator of amount·Σ_k‖v_k‖₂ multiplies v_k by it."""
    return (1 - amount / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)


def _ratio(new: Tensor, old: Tensor) -> Tensor:
    """new/old, 1 where old is 0."""
    return torch.where(old > 0, new / torch.where(old > 0, old, 1.0), 1.0)


def _held(pair: Coupling, held: set[int]) -> bool:
    return all(id(bound.tensor) in held for bound in (*pair.inputs, *pair.shifts, *pair.outputs))

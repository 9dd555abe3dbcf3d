"""Gradient steps on all weights of a cut network, relative to the size of each output's weights, towards the original.

Matrices take orthogonal steps, all else those of Adam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.copying import deep_copy
from compress.progress import Progress
from compress.training.drawing import Drawn
from compress.training.mimic import Mimic
from compress.training.orthogonal import MOMENTUM, is_matrix, orthogonal_step

WARM_UP = 0.1  # share of the steps in which the rate rises
CLIP = 1.0  # largest gradient norm
ALIGNED = 16  # numbers, so that every parameter begins where fast kernels may
MOMENTA, EPSILON = (0.9, 0.98), 1e-8  # of Adam; squares are forgotten soon, as descents are of hundreds of steps
NO_UNITS: Mapping[str, Tensor] = MappingProxyType({})
AVERAGED = 0.02  # weight of the newest in the running mean of the weights


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters of one dtype, end to end: one operation moves them all, by Adam.

    Attributes:
        weights: W (n,), each parameter's at a multiple of `ALIGNED`.
        scale: s (n,), the unit of each weight's steps.
        gradient: of W (n,), which a backward pass adds to.
        first, second: running means (n,) of the gradient of θ = (W − W₀)/s and of its square.
        mean: running mean (n,) of W.
        leaves: the parameters by name, views of `weights` whose gradients are views of `gradient`.
    """

    weights: Tensor
    scale: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    mean: Tensor
    leaves: Mapping[str, Tensor]
    squares: ClassVar[bool] = True  # whether the second mean is taken

    @classmethod
    def of(cls, named: Mapping[str, Tensor], units: Mapping[str, Tensor]) -> Block:
        """Of parameters of one dtype on one device."""
        weights = torch.cat([padded(tensor.detach()) for tensor in named.values()])
        sizes = {name: units[name] if name in units else row_sizes(tensor.detach()) for name, tensor in named.items()}
        scale = torch.cat([padded(sizes[name].to(tensor).expand_as(tensor)) for name, tensor in named.items()])
        gradient = torch.zeros_like(weights)
        shapes = {name: tensor.shape for name, tensor in named.items()}
        leaves = pieces(weights, shapes)
        for name, part in pieces(gradient, shapes).items():
            leaves[name].requires_grad_().grad = part
        first, second = torch.zeros_like(weights), torch.zeros_like(weights if cls.squares else weights[:0])
        return cls(weights, scale, gradient, first, second, weights.clone(), leaves)

    def averaged(self) -> dict[str, Tensor]:
        """The parameters at the running mean, as views."""
        return pieces(self.mean, {name: leaf.shape for name, leaf in self.leaves.items()})

    def move(self, rate: float, step: int) -> None:
        """One step of Adam on θ, the `step`-th from 1 on, from the gradient of θ; that is written over."""
        gradient = self.gradient
        self.first.lerp_(gradient, 1 - MOMENTA[0])
        self.second.mul_(MOMENTA[1]).addcmul_(gradient, gradient, value=1 - MOMENTA[1])
        torch.sqrt(self.second, out=gradient)
        gradient.div_(math.sqrt(1 - MOMENTA[1] ** step)).add_(EPSILON)
        torch.div(self.first, gradient, out=gradient).mul_(self.scale)
        self.weights.add_(gradient, alpha=-rate / (1 - MOMENTA[0] ** step))
        self.mean.lerp_(self.weights, max(AVERAGED, 1 / step))


class Matrices(Block):
    """Weight matrices, which take orthogonal steps."""

    squares: ClassVar[bool] = False

    def move(self, rate: float, step: int) -> None:
        """One step along the momentum of θ's gradient, made orthogonal; the gradient is written over."""
        self.first.lerp_(self.gradient, 1 - MOMENTUM)
        self.gradient.lerp_(self.first, MOMENTUM)
        for leaf in self.leaves.values():
            assert leaf.grad is not None, "a view of the gradient"
            leaf.grad.copy_(orthogonal_step(leaf.grad))
        self.weights.addcmul_(self.gradient, self.scale, value=-rate)
        self.mean.lerp_(self.weights, max(AVERAGED, 1 / step))


def pieces(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Views of the parameters that lie end to end."""
    parts = torch.split(flat, [aligned(shape.numel()) for shape in shapes.values()])
    return {name: part[: shape.numel()].view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}


def blocks_of(module: nn.Module, units: Mapping[str, Tensor] = NO_UNITS) -> list[Block]:
    """Copies of the floating-point parameters of a module, blocks for each dtype and device: matrices, all else.

    Args:
        units: of their steps, by name; where one is missing, root mean squares of the rows.
    """
    kinds: dict[tuple[torch.dtype, torch.device, bool], dict[str, Tensor]] = {}
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point():
            kinds.setdefault((tensor.dtype, tensor.device, is_matrix(tensor.shape)), {})[name] = tensor
    return [(Matrices if matrices else Block).of(named, units) for (*_, matrices), named in kinds.items()]


def aligned(count: int) -> int:
    """So many numbers, rounded up to a multiple of `ALIGNED`."""
    return -(-count // ALIGNED) * ALIGNED


def padded(tensor: Tensor) -> Tensor:
    """The numbers in a row, with zeros up to a multiple of `ALIGNED`."""
    return nn.functional.pad(tensor.reshape(-1), (0, aligned(tensor.numel()) - tensor.numel()))


def row_sizes(weights: Tensor) -> Tensor:
    """Root mean square of each output's weights, shaped to multiply them; at least a thousandth of all of them's."""
    squares = weights.double().square()
    whole = squares.mean()
    row_means = squares.flatten(1).mean(1).reshape(-1, *[1] * (weights.ndim - 1)) if weights.ndim > 1 else whole
    return row_means.clamp_min(max(1e-6 * float(whole), 1e-12)).sqrt().to(weights)


@dataclass(eq=False)
class Descent:
    """Steps on the relative weights θ of one cut network, over the fitting samples in random order.

    W = W₀ + s·θ, s of `compress.training.scales`, else the root mean square of W₀'s row (of all of it, without rows).
    All is moved in place: besides the weights there are their units, gradient, its means and the running mean of the
    weights, and no more.

    Attributes:
        blocks: the weights; `buffers`: of the cut network, and its complex parameters, which stay.
    """

    mimic: Mimic
    blocks: list[Block]
    buffers: dict[str, Tensor]
    drawn: Drawn
    _steps: int = 0

    def run(self, rates: Sequence[float], progress: Progress) -> bool:
        """One step for each rate; whether every loss was finite. The device is waited for at the end alone."""
        sound: Tensor | None = None
        for rate in rates:
            finite = torch.isfinite(self.step(rate))
            sound = finite if sound is None else sound & finite
            progress.advance()
        return sound is None or bool(sound)

    def step(self, rate: float) -> Tensor:
        """One step; its loss, detached."""
        inputs = self.drawn.next()
        for block in self.blocks:
            block.gradient.zero_()
        leaves = {name: leaf for block in self.blocks for name, leaf in block.leaves.items()}
        wanted = self.mimic.wanted(inputs)
        with torch.enable_grad():
            loss = self.mimic.loss(self.mimic.answer({**self.buffers, **leaves}, inputs), wanted, len(inputs[0]))
            loss.backward()  # type: ignore[no-untyped-call]
        self._steps += 1
        with torch.no_grad():
            lengths = [torch.linalg.vector_norm(block.gradient.mul_(block.scale)) for block in self.blocks]
            length = torch.stack([each.to(loss) for each in lengths]).norm()
            share = (CLIP / (length + 1e-6)).clamp_max(1.0)
            for block in self.blocks:
                block.gradient.mul_(share.to(block.gradient))
                block.move(rate, self._steps)
        return loss.detach()

    def averaged(self) -> dict[str, Tensor]:
        """The running mean of the weights, as views: where they are, less the noise of single steps."""
        return {name: tensor for block in self.blocks for name, tensor in block.averaged().items()}


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module that shares these weights, and those of its own that are not among them."""
    shared: dict[int, object] = {
        id(parameter): nn.Parameter(weights.get(name, parameter).detach(), parameter.requires_grad)
        for name, parameter in module.named_parameters()
    }
    return deep_copy(module, shared)


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate at a step counted from 0: it rises linearly, then falls as a half cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

"""Adam on all weights of a cut network, each relative to the size of its output's weights, towards the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.progress import Progress
from compress.training.drawing import Drawn
from compress.training.mimic import Mimic

WARM_UP = 0.1  # share of the steps in which the rate rises
CLIP = 1.0  # largest gradient norm
ALIGNED = 16  # numbers, so that every parameter begins where fast kernels may
AVERAGED = 0.02  # weight of the newest in the running mean of the weights


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters of one dtype, end to end: one operation moves them all.

    Attributes:
        base, scale, offsets: W₀, s and θ (n,), each parameter's at a multiple of `ALIGNED`.
        parts: (name, shape) of the parameters in their order.
    """

    base: Tensor
    scale: Tensor
    offsets: Tensor
    parts: tuple[tuple[str, torch.Size], ...]

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Block:
        """Of parameters of one dtype on one device."""
        base = torch.cat([padded(tensor.detach()) for tensor in named.values()])
        scale = torch.cat([padded(row_sizes(tensor.detach()).expand_as(tensor)) for tensor in named.values()])
        parts = tuple((name, tensor.shape) for name, tensor in named.items())
        return cls(base, scale, torch.zeros_like(base, requires_grad=True), parts)

    def at(self, offsets: Tensor) -> dict[str, Tensor]:
        """The parameters at these θ (n,), as views."""
        flat = torch.addcmul(self.base, self.scale, offsets)
        pieces = torch.split(flat, [aligned(shape.numel()) for _, shape in self.parts])
        return {
            name: piece[: shape.numel()].view(shape) for piece, (name, shape) in zip(pieces, self.parts, strict=True)
        }


class RelativeWeights:
    """Parameters W = W₀ + s·θ: θ starts at zero, s is the root mean square of W₀'s row (of all of it, without rows)."""

    def __init__(self, module: nn.Module) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        for name, tensor in module.named_parameters():
            if tensor.is_floating_point():
                kinds.setdefault((tensor.dtype, tensor.device), {})[name] = tensor
        self.blocks = [Block.of(named) for named in kinds.values()]
        self.offsets = [block.offsets for block in self.blocks]

    def applied(self) -> dict[str, Tensor]:
        """The parameters as they are now."""
        return self.at(self.offsets)

    def at(self, offsets: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parameters at these θ, one for each block."""
        pairs = zip(self.blocks, offsets, strict=True)
        return {name: tensor for block, each in pairs for name, tensor in block.at(each).items()}


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
    """Adam on the relative weights of one cut network, over the fitting samples in random order.

    Attributes:
        buffers: of the cut network, which stay.
    """

    mimic: Mimic
    weights: RelativeWeights
    buffers: dict[str, Tensor]
    drawn: Drawn

    def __post_init__(self) -> None:
        self._offsets = self.weights.offsets
        self._means = [tensor.detach().clone() for tensor in self._offsets]
        self._adam = torch.optim.Adam(self._offsets, lr=0.0, foreach=True)
        self._steps = 0

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
        for group in self._adam.param_groups:
            group["lr"] = rate
        with torch.enable_grad():
            loss = self.mimic.loss({**self.buffers, **self.weights.applied()}, inputs)
            self._adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        for tensor in self._offsets:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.nn.utils.clip_grad_norm_(self._offsets, CLIP)
        self._adam.step()
        self._steps += 1
        with torch.no_grad():
            newest = max(AVERAGED, 1 / self._steps)
            torch._foreach_lerp_(self._means, [tensor.detach() for tensor in self._offsets], newest)
        return loss.detach()

    def averaged(self) -> dict[str, Tensor]:
        """The running mean of the weights: where they are, less the noise of single steps."""
        return self.weights.at(self._means)


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The same module with the weights put in."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    return module


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate at a step counted from 0: it rises linearly, then falls as a half cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

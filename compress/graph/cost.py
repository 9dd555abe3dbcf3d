"""What a network costs: parameters, multiply-accumulates, bytes, measured latency."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

LARGE_BATCH = 64
LARGEST_INPUT = 1 << 22  # numbers of a batch whose latency is told


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass.

    Attributes:
        milliseconds: median over `repeats` passes; `least`: of the fastest, what nothing else on the machine disturbed.
        batch_size, threads, device: where it was measured.
    """

    milliseconds: float
    batch_size: int
    threads: int
    device: str
    repeats: int
    least: float = 0.0


def recurrent_flops(inputs: Sequence[int], weights: Iterable[Sequence[int]]) -> int:
    """Of a fused recurrent layer, from shapes (steps, B, features) and (rows, columns): each matrix at every step."""
    return 2 * inputs[0] * inputs[1] * sum(math.prod(shape) for shape in weights if len(shape) == 2)


FUSED = {
    torch.ops.aten.mkldnn_rnn_layer: lambda inputs, *others, **_: recurrent_flops(inputs, others[:2]),
    torch.ops.aten._cudnn_rnn: lambda inputs, weights, *_, **__: recurrent_flops(inputs, weights),
}
"""Operations that torch's counter does not know -> floating-point operations from their arguments' shapes."""
NO_OTHERS: Mapping[Any, Callable[..., int]] = MappingProxyType({})


def count_parameters(module: nn.Module) -> int:
    """Scalars in distinct parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply-accumulates of convolutions, matrix products and attention per sample of a batch, by torch's counter."""
    counter = counted_pass(module, inputs)
    return int(counter.get_total_flops()) // 2 // inputs[0].shape[0]


def count_products(module: nn.Module, inputs: Sequence[Tensor]) -> list[float]:
    """Multiply-accumulates per sample of each product of two computed values (attention, adjacency), as they come.

    Those with a tensor that the module holds are left out.
    """
    held = {memory_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
    counts: list[float] = []

    def watched(formula: Callable[..., int]) -> Callable[..., int]:
        def count(*arguments: Any, out_val: Any = None, **named: Any) -> int:
            operations = formula(*arguments, out_val=out_val, **named)
            if not any(isinstance(each, Tensor) and memory_of(each) in held for each in arguments):
                counts.append(operations / 2 / inputs[0].shape[0])
            return operations

        count._get_raw = True  # type: ignore[attr-defined]  # the counter then hands tensors on, not shapes
        return count

    counted_pass(module, inputs, {operation: watched(formula) for operation, formula in flop_registry.items()})
    return counts


def memory_of(tensor: Tensor) -> int | None:
    """Of the storage that it is a view of; None for a tensor that does not lie in one piece, such as a sparse one."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None


def counted_pass(
    module: nn.Module, inputs: Sequence[Tensor], formulas: Mapping[Any, Callable[..., int]] = NO_OTHERS
) -> FlopCounterMode:
    """What torch's counter saw of a pass; attention in plain operations, as it does not know all the fused ones.

    It follows gradients, and fails where a module is called with a view of a parameter: here no parameter asks for one.

    Args:
        formulas: operation -> what counts it, in place of the counter's own.
    """
    counter = FlopCounterMode(display=False, custom_mapping={**FUSED, **formulas})
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learnt:
            parameter.requires_grad_(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            module(*(part.detach() for part in inputs))
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter


def latency_batches(inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Batch sizes at which latency is told: one sample, and 64 or as many as memory holds with ease.

    Activations are many times the inputs: of 64 pictures of 224 × 224 they take more than a whole compression does.
    """
    numbers = sum(part[:1].numel() for part in inputs)
    batch = LARGE_BATCH
    while batch > 2 and batch * numbers > LARGEST_INPUT:
        batch //= 2
    return 1, batch


def batch_of(examples: Sequence[Tensor], size: int | None) -> tuple[Tensor, ...]:
    """The first sample of every example `size` times; the examples as they are where there is no size."""
    if size is None:
        return tuple(examples)
    return tuple(part[:1].expand(size, *part.shape[1:]) for part in examples)


def count_by_module(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, tuple[int, int]]:
    """Name of each module with parameters of its own -> (those parameters, multiply-accumulates a sample).

    What parts with parameters compute counts for them, not for the module around them. A parameter that several modules
    share counts for the first.
    """
    counter = counted_pass(module, inputs)
    flops = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    seen: set[int] = set()
    parameters: dict[str, int] = {}
    for name, part in module.named_modules():
        unseen = [parameter for parameter in part.parameters(recurse=False) if id(parameter) not in seen]
        seen.update(map(id, unseen))
        if unseen:
            parameters[name] = sum(parameter.numel() for parameter in unseen)
    macs = {name: int(flops.get(name, 0)) // 2 // inputs[0].shape[0] for name in parameters}
    alone = dict(macs)
    for name in parameters:
        around = next((outer for outer in outer_names(name) if outer in macs), None)
        if around is not None:
            alone[around] -= macs[name]
    return {name: (count, max(0, alone[name])) for name, count in parameters.items()}


def outer_names(name: str) -> list[str]:
    """Names of the modules around one, the nearest first: "a.b.c" -> "a.b", "a", ""."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]


def measure_latency(
    modules: Sequence[nn.Module], inputs: Sequence[Tensor], *, seconds: float = 3.0, most: int = 15
) -> list[Latency]:
    """Median latencies of several networks on the same inputs, their passes interleaved so that drift hits all alike.

    Args:
        seconds: about how long to measure, at least 3 and at most `most` passes of each network after one warm-up.
    """
    device = inputs[0].device
    times: list[list[float]] = [[] for _ in modules]
    repeats = most
    with torch.inference_mode():
        for round_number in range(1 + most):
            if round_number > repeats:
                break
            spent = 0.0
            for module, passes in zip(modules, times, strict=True):
                _synchronise(device)
                start = time.perf_counter()
                module(*inputs)
                _synchronise(device)
                spent += time.perf_counter() - start
                if round_number:
                    passes.append(1e3 * (time.perf_counter() - start))
            if round_number == 0:
                repeats = max(3, min(most, round(seconds / max(spent, 1e-6))))
    return [
        Latency(statistics.median(passes), len(inputs[0]), torch.get_num_threads(), str(device), repeats, min(passes))
        for passes in times
    ]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

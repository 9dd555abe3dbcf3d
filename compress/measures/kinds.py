"""What each output of a network is: what the data's labels and targets say, what is evident, else plain numbers.

1. Labels belong to the first output that they fit: (N,) class numbers fit (N, C) scores; (N, H, W) masks and (N, T)
   tokens fit scores with one further dimension of classes; (N, …) zeros and ones fit as many numbers, which are then
   scores of yes or no. Targets (N, D) belong to the first output of D numbers a sample, which is never a softmax's.
2. Any other output is class scores only where that is evident: its rows are probabilities (or their logarithms), it is
   called `logits`, the network's own `num_classes` or `num_labels` is its width, or it is the only output of a
   recognised classifier.
3. Whole numbers and truth values are compared for equality, everything else by squares relative to its own spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.source import DataSource
from compress.errors import DataError, RecipeError
from compress.measures.outputs import Output

CLASSIFIERS = ("torchvision", "timm", "compress")  # schemes of architectures whose lone (N, C) output is class scores
IGNORED = 255  # in masks, beside negative numbers, where there are fewer classes
SUM_TOLERANCE = 1e-3  # of probabilities


@dataclass(frozen=True)
class Hints:
    """What is known of a network beside its data.

    Attributes:
        architecture: its spec, such as `torchvision:vgg19`.
        class_counts: what its own attributes say.
        last: output name -> the last operation, `sigmoid` for one.
        known: output name -> how a manifest describes it.
        sample_dims: output name -> the dimension of its samples, as the graph has it.
    """

    architecture: str = ""
    class_counts: tuple[int, ...] = ()
    last: Mapping[str, str] | None = None
    known: Mapping[str, Mapping[str, Any]] | None = None
    sample_dims: Mapping[str, int] | None = None


def read_class_counts(module: nn.Module) -> tuple[int, ...]:
    """Numbers of classes that a network's own attributes name."""
    holders = (module, getattr(module, "config", None))
    counts = (getattr(holder, name, None) for holder in holders for name in ("num_classes", "num_labels"))
    return tuple(dict.fromkeys(value for value in counts if type(value) is int and value > 1))


def describe_outputs(
    tensors: Mapping[str, Tensor],
    samples: int,
    sources: Sequence[DataSource | None],
    hints: Hints,
    weights: Mapping[str, float] | None = None,
) -> tuple[Output, ...]:
    """Every output with its kind and weight; those of weight 0 are left out.

    Args:
        tensors: what the network returns for a batch of so many `samples`.
        sources: data, whose labels and targets count in this order.

    Raises:
        RecipeError: a weight names no output, or no output has one.
        DataError: labels or targets of the first source fit no output.
    """
    weights = dict(weights or {})
    places = {name: _sample_dim(name, tensor, samples, hints) for name, tensor in tensors.items()}
    tensors = {name: tensor.movedim(places[name], 0) if places[name] else tensor for name, tensor in tensors.items()}
    unknown = [name for name in weights if name not in tensors]
    if unknown:
        raise RecipeError(f"output_weight: {unknown[0]!r} is no output; there are {', '.join(tensors)}.")
    described = {
        name: replace(_evident(name, tensor, samples, hints, lone=len(tensors) == 1), sample_dim=places[name])
        for name, tensor in tensors.items()
        if weights.get(name, 1.0) > 0
    }
    if not described:
        raise RecipeError("output_weight: every output has weight 0; give one a positive weight.")
    for source in reversed(sources):
        if source is not None and (source.labels is not None or source.targets is not None):
            place = find_place(list(described.values()), source)
            if place is not None:
                described[place.name] = replace(place, probabilities=_probabilities(place, tensors[place.name], hints))
    return tuple(replace(output, weight=weights.get(name, 1.0)) for name, output in described.items())


def _sample_dim(name: str, tensor: Tensor, samples: int, hints: Hints) -> int:
    """What the graph says or was recorded; else the only dimension of so many samples, the first by default."""
    recorded = (hints.known or {}).get(name, {}).get("sample_dim", 0)
    if hints.sample_dims is not None or recorded:
        place = (hints.sample_dims or {}).get(name, recorded)
        return int(place) if place < tensor.ndim else 0
    fitting = [dim for dim, size in enumerate(tensor.shape) if size == samples]
    return fitting[0] if len(fitting) == 1 else 0


def find_place(outputs: Sequence[Output], source: DataSource) -> Output | None:
    """The first output that a source's labels or targets fit, as they make it; None where they fit none."""
    for output in outputs:
        fitted = fit_labels(output, source) if source.labels is not None else fit_targets(output, source)
        if fitted is not None:
            return fitted
    return None


def need_place(outputs: Sequence[Output], source: DataSource) -> Output:
    """The output that a source's labels or targets belong to. Raises DataError where they fit none."""
    place = find_place(outputs, source)
    if place is not None:
        return next(
            replace(place, probabilities=output.probabilities) for output in outputs if output.name == place.name
        )
    shapes = ", ".join(f"`{output.name}` {('N', *output.shape)}".replace("'N'", "N") for output in outputs)
    if source.labels is None:
        assert source.targets is not None, "only for data with either"
        numbers = source.targets.shape[1]
        raise DataError(f"{source.name} has {numbers} targets a sample, and no output is as wide: {shapes}.")
    wide = [output for output in outputs if source.labels.ndim == 1 and len(output.shape) == 1 and output.shape[0] > 1]
    if wide:
        source.check_labels(wide[0].shape[0])
    shape = f"({', '.join(['N', *map(str, source.labels.shape[1:])])}{',' if source.labels.ndim == 1 else ''})"
    raise DataError(
        f"{source.name} has labels {shape} up to {int(source.labels.max())}, which fit no output of the network: "
        f"{shapes}. Leave the labels out, or give others."
    )


def fit_labels(output: Output, source: DataSource) -> Output | None:
    """The output as scores that the labels are answers to; None where they do not fit."""
    assert source.labels is not None, "only for labelled data"
    places, shape = source.labels.shape[1:], output.shape
    if output.kind == "whole":
        return None
    if len(shape) == len(places) + 1:
        last = len(shape) - 1
        for dim in (last, 0) if len(places) == 1 else (0, last):
            if shape[dim] > 1 and (*shape[:dim], *shape[dim + 1 :]) == places and labels_within(source, shape[dim]):
                return replace(output, kind="classes", class_dim=dim + 1, reason="the labels say so")
    single = tuple(size for size in shape if size != 1) == tuple(size for size in places if size != 1)
    if single and labels_within(source, 2):
        return replace(output, kind="binary", class_dim=None, reason="labels of 0 and 1 say so")
    return None


def labels_within(source: DataSource, classes: int) -> bool:
    """Whether every label that counts lies in 0 … classes − 1, and some count."""
    assert source.labels is not None, "only for labelled data"
    values = source.label_values
    if source.labels.ndim > 1:
        values = values[(values >= 0) & ((values != IGNORED) | (classes > IGNORED))]
    return bool(len(values)) and values[0] >= 0 and values[-1] < classes


def fit_targets(output: Output, source: DataSource) -> Output | None:
    """The output as numbers that the targets are wanted of; None where they are not as many."""
    assert source.targets is not None, "only for data with targets"
    width = int(np.prod(output.shape, dtype=np.int64))
    if output.kind == "whole" or width != source.targets.shape[1]:
        return None
    return replace(output, kind="real", class_dim=None, reason="the targets say so")


def _evident(name: str, tensor: Tensor, samples: int, hints: Hints, *, lone: bool) -> Output:
    """What an output is where no data say so."""
    per_sample = bool(tensor.ndim) and len(tensor) == samples
    shape = tuple(tensor.shape[1:]) if per_sample else tuple(tensor.shape)
    if not tensor.is_floating_point():
        return Output(name, shape, "whole", reason="whole numbers")
    plain = Output(name, shape, "real", reason="nothing says that they are class scores")
    known = (hints.known or {}).get(name)
    if known is not None and tuple(known["shape"]) == shape:
        return replace(
            plain,
            kind=known["kind"],
            class_dim=known["class_dim"],
            probabilities=bool(known.get("probabilities")),
            reason="recorded",
        )
    reason = None
    if per_sample and len(shape) == 1 and shape[0] > 1:
        if _rows_sum_to_one(tensor, 1):
            reason = "the rows are probabilities"
        elif _rows_sum_to_one(tensor.exp(), 1):
            reason = "the rows are logarithms of probabilities"
        elif lone and hints.architecture.partition(":")[0] in CLASSIFIERS:
            reason = "a recognised classifier"
        elif lone and shape[0] in hints.class_counts:
            reason = "the network names as many classes"
    if per_sample and name.rpartition(".")[2] == "logits" and len(shape) in (1, 2) and shape[-1] > 1:
        reason = "it is called logits"
    if reason is None:
        return plain
    classes = replace(plain, kind="classes", class_dim=len(shape), reason=reason)
    return replace(classes, probabilities=_probabilities(classes, tensor, hints))


def _probabilities(output: Output, tensor: Tensor, hints: Hints) -> bool:
    """Whether an output's scores are probabilities, not logits."""
    if output.kind == "classes":
        assert output.class_dim is not None, "class scores"
        return _rows_sum_to_one(tensor, output.class_dim)
    if output.kind == "binary":
        known = (hints.known or {}).get(output.name) or {}
        return (hints.last or {}).get(output.name) == "sigmoid" or bool(known.get("probabilities"))
    return False


def _rows_sum_to_one(tensor: Tensor, dim: int) -> bool:
    if not bool((tensor >= 0).all()):
        return False
    return bool(((tensor.double().sum(dim) - 1).abs() < SUM_TOLERANCE).all())


def valid_labels(labels: Tensor, classes: int) -> Tensor:
    """Which labels count (same shape, bool): at positions, negative ones and 255 mean that nothing is said there."""
    if labels.ndim == 1:
        return torch.ones_like(labels, dtype=torch.bool)
    return (labels >= 0) & ((labels != IGNORED) | (classes > IGNORED))

"""The compressed network against the original on calibration samples, from stored activations where there are some."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.graph.program import Program, run
from compress.recording.store import ActivationStore


@dataclass(frozen=True)
class CalibrationScore:
    """Both networks on the same calibration samples.

    Attributes:
        drop: points of top-1 accuracy lost; points of disagreement where the samples have no labels.
        error: standard error of `drop`, from the paired samples.
        top1, loss: (original, compressed) accuracy and mean cross-entropy in nats; None without labels.
    """

    samples: int
    drop: float
    error: float
    agreement: float
    top1: tuple[float, float] | None
    loss: tuple[float, float] | None

    def passes(self, max_drop: float) -> bool:
        """Whether the drop, and one standard error on top, stays within the bound."""
        return self.drop + self.error <= max_drop

    def as_report(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def score_samples(
    program: Program,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    batch: Callable[[int], Any],
    sizes: list[int],
    *,
    store: ActivationStore | None = None,
    advance: Callable[[int], None] | None = None,
) -> CalibrationScore | None:
    """Run the original and the masked compressed network over batches; None where the output is not class scores.

    Args:
        batch: batch number -> object with inputs and labels (or None).
        store: values from which a batch can start; used up.
    """
    device = next(iter(original.values())).device
    output = program.output
    lost: list[Tensor] = []
    agreeing, hits, losses, labelled = 0, [0, 0], [0.0, 0.0], True
    with torch.inference_mode():
        for number, size in enumerate(sizes):
            start = store.get(number, device) if store is not None else None
            found = batch(number)
            inputs = (found.inputs.to(device),)
            pair = run(program, (original, current), inputs, [output], start=start)[output]
            if store is not None:
                store.drop(number)
            if pair[0].ndim != 2 or pair[0].shape[1] < 2:
                return None
            first, second = (value.argmax(1).cpu() for value in pair)
            agreeing += int((first == second).sum())
            if found.labels is None:
                labelled = False
                lost.append((first != second).double())
            else:
                labels = found.labels.cpu()
                right = [(guess == labels).double() for guess in (first, second)]
                lost.append(right[0] - right[1])
                for index in range(2):
                    hits[index] += int(right[index].sum())
                    scores = pair[index].double().cpu()
                    losses[index] += float(functional.cross_entropy(scores, labels, reduction="sum"))
            if advance is not None:
                advance(size)
    differences = torch.cat(lost)
    count = len(differences)
    # one more differing sample than was seen, so that a few samples without any do not count as certainty
    deviation = math.sqrt(float(differences.square().sum()) + 1) / count
    return CalibrationScore(
        samples=count,
        drop=100 * float(differences.mean()),
        error=100 * deviation,
        agreement=agreeing / count,
        top1=(hits[0] / count, hits[1] / count) if labelled else None,
        loss=(losses[0] / count, losses[1] / count) if labelled else None,
    )

"""Every tensor that a network returns, by its path, and how far a changed network's lies from the original's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import NonFiniteError, TraceError

Kind = Literal["classes", "binary", "real", "whole"]
LONE = "output"  # name of an output that is in no container
MASKED = -1e30  # a score in the place of -inf
CONSTANT = 1e-10  # spread over energy, below which an output does not vary from sample to sample


def named_outputs(returned: object) -> dict[str, Tensor]:
    """Path -> tensor of everything that a network returned: `boxes`, `1`, `scores.0`; `output` for a lone tensor.

    Mappings, lists, tuples, named tuples and dataclasses are followed; key-value caches are no output.

    Raises:
        TraceError: there is no tensor in it.
    """
    tensors: dict[str, Tensor] = {}
    for path, tensor in _walk(returned, ()):
        name = ".".join(path) or LONE
        while name in tensors:  # {"a.b": …, "a": {"b": …}}
            name += "'"
        tensors[name] = tensor
    if not tensors:
        raise TraceError(
            f"The network returns {type(returned).__name__}; a tensor, or a container with tensors, was expected."
        )
    return tensors


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif type(value).__name__.endswith("Cache"):
        return
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, (*path, str(key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, part in zip(value._fields, value, strict=True):
            yield from _walk(part, (*path, str(key)))
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from _walk(part, (*path, str(number)))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _walk(getattr(value, field.name), (*path, field.name))


@dataclass(frozen=True)
class Output:
    """One tensor that a network returns, and what a distance between two of them is.

    Attributes:
        name: its path, as `named_outputs` gives it.
        shape: of one sample's part.
        kind: `classes`: scores, one a class along `class_dim`, at each of the other positions; `binary`: scores of
            yes or no; `real`: numbers; `whole`: whole numbers or truth values.
        weight: its share among the outputs.
        sample_dim: the dimension of the samples in the tensor that the network returns: 1 for (time, batch, classes).
        class_dim: for `classes`, the dimension of the classes, the batch being dimension 0.
        probabilities: whether scores are probabilities already, not logits.
        reason: what said so, in words.
        node: name of the graph's node that computes it; None without a graph, and where weights cannot change it.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    weight: float = 1.0
    sample_dim: int = 0
    class_dim: int | None = None
    probabilities: bool = False
    reason: str = ""
    node: str | None = None

    @property
    def classes(self) -> int:
        """Number of classes; 0 where the output is no class scores."""
        return 0 if self.class_dim is None else self.shape[self.class_dim - 1]

    @property
    def positions(self) -> int:
        """Dimensions of positions beside the classes: 0 for one answer a sample, 1 for tokens, 2 for pixels."""
        return len(self.shape) - 1 if self.class_dim is not None else len(self.shape)

    @property
    def measure(self) -> str:
        """The distance in words."""
        if self.kind == "classes":
            return ("KL", "KL a token", "KL a pixel")[min(self.positions, 2)]
        return {"binary": "KL of yes or no", "real": "relative squares", "whole": "share that differs"}[self.kind]

    def by_sample(self, tensor: Tensor) -> Tensor:
        """The returned tensor with the samples along dimension 0."""
        return tensor.movedim(self.sample_dim, 0) if self.sample_dim else tensor

    def logs(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """Logarithms of class probabilities, float64, along `class_dim`; samples along dimension 0.

        Those of classes that forward() masked out with -inf are finite, and their probabilities 0.
        """
        assert self.class_dim is not None, "only for class scores"
        values = scores.double()
        if self.probabilities:
            values = values.clamp_min(1e-30).log()
        values = values.masked_fill(values.isneginf(), MASKED)
        return (values / temperature).log_softmax(self.class_dim)

    def logits(self, scores: Tensor) -> Tensor:
        """Logits of yes, float64, of binary scores."""
        values = scores.double()
        if self.probabilities:
            return values.clamp(1e-12, 1 - 1e-12).logit()
        return values.masked_fill(values.isneginf(), MASKED)

    def distances(self, before: Tensor, after: Tensor, samples: int, *, temperature: float = 1.0) -> Tensor:
        """How far each sample's part (samples,) moved: KL in nats, sum of squares, or share of differing elements.

        Squares are absolute; `Spread` says what they are to be held against. A tensor without one part a sample counts
        for every sample.

        Args:
            before, after: as the networks return them.
            temperature: of class distributions; the divergence is scaled back by its square.
        """
        before, after = self.by_sample(before), self.by_sample(after)
        if self.kind == "classes":
            first, second = self.logs(before, temperature), self.logs(after, temperature)
            moved = (first.exp() * (first - second)).sum(self.class_dim).clamp_min(0) * temperature**2
        elif self.kind == "binary":
            first, second = self.logits(before), self.logits(after)
            sure = first.sigmoid()
            moved = sure * (functional.logsigmoid(first) - functional.logsigmoid(second))
            moved = (moved + (1 - sure) * (functional.logsigmoid(-first) - functional.logsigmoid(-second))).clamp_min(0)
        elif self.kind == "real":
            before, after = without_masked(before.double(), after.double())
            return sample_rows((after - before).square(), samples).sum(1)
        else:
            moved = (before != after).double()
        return sample_rows(moved, samples).mean(1)

    def as_report(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "kind": self.kind,
            "weight": self.weight,
            "class_dim": self.class_dim,
            **({"sample_dim": self.sample_dim} if self.sample_dim else {}),
            "probabilities": self.probabilities,
        }


def read_described(rows: object) -> dict[str, dict[str, Any]]:
    """Outputs as `Output.as_report` wrote them, by name. Raises ValueError where they are not like that."""
    described: dict[str, dict[str, Any]] = {}
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or row.get("kind") not in get_args(Kind):
            raise ValueError("`outputs` does not describe outputs")
        shape, dim, weight = row.get("shape"), row.get("class_dim"), row.get("weight", 1.0)
        place = row.get("sample_dim", 0)
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise ValueError(f"`outputs` does not say what shape `{row['name']}` has")
        if type(place) is not int or not 0 <= place <= len(shape):
            raise ValueError(f"`outputs` does not say where `{row['name']}` has its samples")
        classes = dim is None or (type(dim) is int and 1 <= dim <= len(shape))
        if not classes or (row["kind"] == "classes") != (dim is not None):
            raise ValueError(f"`outputs` does not say what `{row['name']}` is")
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"`outputs` gives `{row['name']}` the weight {weight!r}")
        described[row["name"]] = row
    return described


def sample_rows(values: Tensor, samples: int) -> Tensor:
    """One row a sample (samples, n) of a tensor with the samples along dimension 0; else the whole, each time."""
    if values.ndim and samples and len(values) % samples == 0 and values.numel():
        return values.reshape(samples, -1)
    return values.reshape(1, -1).expand(samples, -1)


@dataclass
class Spread:
    """How much an output varies from sample to sample: mean over samples of ‖output − mean output‖², as they come.

    Where the numbers of a sample are as many as the batch has samples (similarities of each with each), the means are
    of batches of one size.
    """

    count: int = 0
    totals: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # numbers of a sample -> samples, their sum
    energy: float = 0.0

    def add(self, values: Tensor, samples: int) -> None:
        """A batch of outputs; scores that forward() masked out with -inf count as 0."""
        rows = sample_rows(without_masked(values.double())[0], samples)
        self.count += samples
        known = self.totals.get(rows.shape[1])
        total = rows.sum(0)
        self.totals[rows.shape[1]] = (samples, total) if known is None else (known[0] + samples, known[1] + total)
        self.energy += float(rows.square().sum())

    @property
    def scale(self) -> float:
        """The spread; the mean energy of an output that does not vary; 1 where that is 0 too."""
        if not self.energy:
            return 1.0
        energy = self.energy / self.count
        means = sum(float(total.square().sum()) / count for count, total in self.totals.values())
        spread = energy - means / self.count
        return spread if spread > CONSTANT * energy else energy


@dataclass
class Distances:
    """Distances of several networks' outputs from the original's, summed batch by batch."""

    outputs: Sequence[Output]
    networks: int = 1
    samples: int = 0
    spreads: dict[str, Spread] = field(default_factory=dict)
    totals: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spreads = {output.name: Spread() for output in self.outputs}
        self.totals = [{output.name: 0.0 for output in self.outputs} for _ in range(self.networks)]

    def start(self, before: Mapping[str, Tensor], samples: int) -> None:
        """A batch of the original's outputs."""
        self.samples += samples
        for output in self.outputs:
            if output.kind == "real":
                self.spreads[output.name].add(output.by_sample(before[output.name]), samples)

    def add(self, network: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor], samples: int) -> None:
        """One network's outputs on that batch."""
        for output in self.outputs:
            first, second = before[output.name], after[output.name]
            if first is not second:
                self.totals[network][output.name] += float(output.distances(first, second, samples).sum())

    def means(self) -> list[dict[str, float]]:
        """Per network, output name -> mean distance a sample, squares relative to the output's spread."""
        scales = {name: spread.scale * max(self.samples, 1) for name, spread in self.spreads.items()}
        return [{name: value / scales[name] for name, value in total.items()} for total in self.totals]

    def weighted(self) -> list[float]:
        """Per network, the mean over the outputs by their weights."""
        return [weighted_mean(self.outputs, means) for means in self.means()]


def weighted_mean(outputs: Iterable[Output], values: Mapping[str, float]) -> float:
    """Mean of one value an output, by their weights."""
    pairs = [(output.weight, values[output.name]) for output in outputs]
    return sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)


def without_masked(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors with 0 where all of them are -inf: scores that forward() masks out, whatever the weights."""
    if not tensors[0].is_floating_point() or any(tensor.shape != tensors[0].shape for tensor in tensors):
        return tensors
    masked = torch.stack([tensor.isneginf() for tensor in tensors]).all(0)
    return tuple(tensor.masked_fill(masked, 0) for tensor in tensors) if bool(masked.any()) else tensors


def are_numbers(tensor: Tensor) -> bool:
    """Whether an output holds neither NaN nor Inf, but for scores of -inf beside finite ones: those are masked out."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return True
    return tensor.is_floating_point() and bool(finite.any()) and bool((finite | tensor.isneginf()).all())


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse outputs that are no numbers. Raises NonFiniteError."""
    for name, tensor in tensors.items():
        if not are_numbers(tensor):
            said = "output" if name == LONE else f"output `{name}`"
            raise NonFiniteError(f"The {said} of {what} is NaN or Inf; check weights and preprocessing.")


def largest_deviation(expected: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[float, str]:
    """The worst output's deviation and its name: largest difference over its largest magnitude.

    Of whole numbers and truth values, the share that differs beyond one in a hundred: rounding may turn a near tie.
    Infinite where names, shapes or kinds of number differ.
    """
    if set(expected) != set(outputs):
        return float("inf"), ", ".join(expected)
    worst, where = 0.0, next(iter(expected))
    for name, wanted in expected.items():
        deviation = _deviation(wanted.detach().cpu(), outputs[name].detach().cpu())
        if not deviation <= worst:
            worst, where = deviation, name
    return worst, where


def _deviation(wanted: Tensor, got: Tensor) -> float:
    if wanted.shape != got.shape or wanted.is_floating_point() != got.is_floating_point():
        return float("inf")
    if not wanted.numel():
        return 0.0
    if not wanted.is_floating_point():
        share = float((wanted != got).double().mean())
        return share if share > 0.01 else 0.0
    wanted, got = without_masked(wanted, got)
    scale = max(float(wanted.double().abs().max()), torch.finfo(torch.float32).tiny)
    deviation = float((got.double() - wanted.double()).abs().max()) / scale
    return deviation if deviation == deviation else float("inf")

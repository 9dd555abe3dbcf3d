"""What a cut network is to imitate: the original's outputs, and its features in front of the last pooling.

A network that mimics these features recovers best from few samples (Wang, Guo and Wu, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.graph.meaning import meaning_of_step
from compress.graph.ops import LinearMap, Pooling
from compress.graph.program import Program, run
from compress.graph.steps import Read, Step
from compress.graph.trace import trace_network
from compress.measures.outputs import Output
from compress.training.nearness import Batches, soft_divergence

SMALLEST_LOSS = 1e-12  # what a part of the loss is divided by, at least


@dataclass(frozen=True, eq=False)
class Feature:
    """A value inside that both networks have.

    Attributes:
        names: in the original's program and in the cut network's.
        kept: channels (C',) of the original's that the cut network still has, on its device; None: all.
    """

    names: tuple[str, str]
    kept: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a network gives for one batch: outputs by name, and the features that are compared."""

    outputs: Mapping[str, Tensor]
    features: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.outputs.values(), *self.features))


@dataclass(frozen=True, eq=False)
class Mimic:
    """Both networks as programs, with what is compared.

    Attributes:
        programs: of the original and of the cut network.
        state: of the original.
        outputs: those that count and have a gradient; `spreads`: what their distances are held against.
        last: the features in front of the last pooling, where they can be compared.
        inner: what is compared on the way there.
        energies: mean square of each feature in the original, the last one's first, on their device; None: 1 for all.
        scales: what each part of the loss is divided by: outputs, last features, inner ones.
    """

    programs: tuple[Program, Program]
    state: Mapping[str, Tensor]
    outputs: tuple[Output, ...]
    spreads: Mapping[str, float]
    last: tuple[Feature, ...] = ()
    inner: tuple[Feature, ...] = ()
    energies: Tensor | None = None
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def wanted(self, inputs: Sequence[Tensor]) -> Answer:
        """What the original gives, without gradients."""
        with torch.no_grad():
            answer = self._answer(0, self.state, inputs)
            features = [
                value if feature.kept is None else value.index_select(1, feature.kept)
                for value, feature in zip(answer.features, (*self.last, *self.inner), strict=True)
            ]
            return replace(answer, features=tuple(features))

    def _answer(self, which: int, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Answer:
        places = [self.programs[0].outputs.index(str(output.node)) for output in self.outputs]
        nodes = [self.programs[which].outputs[place] for place in places]
        features = [feature.names[which] for feature in (*self.last, *self.inner)]
        values = run(self.programs[which], (state,), inputs, [*nodes, *features], fast=True)
        named = {output.name: values[node][0] for output, node in zip(self.outputs, nodes, strict=True)}
        return Answer(named, tuple(values[name][0] for name in features))

    def answer(self, student: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Answer:
        """What the cut network gives with these weights."""
        return self._answer(1, student, inputs)

    def parts(self, answer: Answer, wanted: Answer, samples: int) -> Tensor:
        """How far outputs, last and inner features of the cut network lie from the original's (3,), unscaled.

        Means over the batch, float64; features relative to the squares of the original's.
        """
        outputs = soft_divergence(self.outputs, wanted.outputs, answer.outputs, self.spreads, samples).mean()
        if not answer.features:
            return torch.stack([outputs, outputs.new_zeros(()), outputs.new_zeros(())])
        pairs = zip(answer.features, wanted.features, strict=True)
        missed = torch.stack([mean_square(now, aim) for now, aim in pairs]).double()
        missed = missed if self.energies is None else missed / self.energies
        kinds = torch.split(missed, [len(self.last), len(self.inner)])
        means = [kind.mean() if len(kind) else outputs.new_zeros(()) for kind in kinds]
        return torch.stack([outputs, *means])

    def distances(
        self, student: Mapping[str, Tensor], inputs: Sequence[Tensor], wanted: Answer | None = None
    ) -> Tensor:
        """How far each sample's outputs (B,) lie from the original's; `wanted`: what that gives, where it is known."""
        wanted, answer = self.wanted(inputs) if wanted is None else wanted, self.answer(student, inputs)
        return soft_divergence(self.outputs, wanted.outputs, answer.outputs, self.spreads, len(inputs[0]))

    def loss(self, answer: Answer, wanted: Answer, samples: int) -> Tensor:
        """The scaled parts' sum; arguments as of `parts`."""
        parts = self.parts(answer, wanted, samples).unbind()
        return sum((part / scale for part, scale in zip(parts, self.scales, strict=True)), parts[0].new_zeros(()))

    def balanced(self, student: Mapping[str, Tensor], held_back: Batches) -> Mimic:
        """The comparison relative to each feature's energy, with each part counting 1 for the cut network as it is."""

        def energies(inputs: Sequence[Tensor]) -> Tensor:
            features = map(as_real, self.wanted(inputs).features)
            return torch.stack([feature.double().square().mean() for feature in features])

        compares = bool(self.last or self.inner)
        known = replace(self, energies=held_back_means(energies, held_back)) if compares else self

        def parts(inputs: Sequence[Tensor]) -> Tensor:
            return known.parts(known.answer(student, inputs), known.wanted(inputs), len(inputs[0]))

        scales = held_back_means(parts, held_back)
        first, second, third = scales.tolist()
        return replace(known, scales=(first, second, third))


def mean_square(now: Tensor, aim: Tensor) -> Tensor:
    """Mean of (now − aim)². Its gradient lies in memory as images do: steps behind it are several times as fast so."""
    if all(each.ndim == 4 and each.is_contiguous(memory_format=torch.channels_last) for each in (now, aim)):
        now, aim = now.permute(0, 2, 3, 1), aim.permute(0, 2, 3, 1)
    return nn.functional.mse_loss(as_real(now), as_real(aim))


def as_real(values: Tensor) -> Tensor:
    """The values, complex ones as pairs of real ones."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def held_back_means(measure: Callable[[Sequence[Tensor]], Tensor], held_back: Batches) -> Tensor:
    """Means over the samples of what is measured of each batch, at least `SMALLEST_LOSS`."""
    total: Tensor | None = None
    with torch.no_grad():
        for number, size in enumerate(held_back.sizes()):
            batch_sum = size * measure(held_back.read(number))
            total = batch_sum if total is None else total + batch_sum
    assert total is not None, "some samples are held back"
    return (total / sum(held_back.sizes())).nan_to_num().clamp_min(SMALLEST_LOSS)


def compare(mimic: Mimic, module: nn.Module, examples: tuple[Tensor, ...], kept: Sequence[Tensor]) -> Mimic:
    """The comparison of the original with `module`, which is traced; with the features that correspond.

    Args:
        kept: the units that stay, of each group that was cut: among them those of the features, where these were cut.
    """
    programs = (mimic.programs[0], Program.of(trace_network(module, examples)))
    plain = replace(mimic, programs=programs)
    if not mimic.outputs:
        return plain
    place = programs[0].outputs.index(str(mimic.outputs[0].node))
    names = [last_features(program, program.outputs[place]) for program in programs]
    last = None if names[0] is None or names[1] is None else correspond(programs, (names[0], names[1]), kept)
    covered = set() if last is None else behind(programs[1], last.names[1])
    inner = [each for each in inner_features(programs) if each.names[1] not in covered]
    return replace(plain, last=() if last is None else (last,), inner=tuple(inner))


def correspond(programs: tuple[Program, Program], names: tuple[str, str], kept: Sequence[Tensor]) -> Feature | None:
    """The two values as one feature: of the same shape, or less the units that went; None where neither is so."""
    first, second = (program.shape(name) for program, name in zip(programs, names, strict=True))
    if first == second:
        return Feature(names)
    if len(first) < 2 or len(first) != len(second) or (first[0], *first[2:]) != (second[0], *second[2:]):
        return None
    same = [units for units in kept if len(units) == second[1] and int(units.max()) < first[1]]
    return Feature(names, same[0]) if len(same) == 1 else None


def inner_features(programs: tuple[Program, Program]) -> list[Feature]:
    """What the linear maps of the same weights read in both networks, where nothing was cut from it.

    That is what residual blocks hand on; inputs of the network are left out.
    """
    read = [inputs_of_maps(program) for program in programs]
    features: dict[str, Feature] = {}
    for weight, source in read[1].items():
        first = read[0].get(weight)
        if first is not None and programs[0].shape(first) == programs[1].shape(source):
            features.setdefault(source, Feature((first, source)))
    return list(features.values())


def behind(program: Program, name: str) -> set[str]:
    """The value and all that depend on it."""
    names = {name}
    for step in program.steps:
        if any(each in names for each in step.inputs):
            names.add(step.name)
    return names


def inputs_of_maps(program: Program) -> dict[str, str]:
    """Weight -> the computed value that the linear map with it reads, of weights with one map."""
    reads: dict[str, list[str]] = {}
    for step in program.steps:
        meaning = meaning_of_step(program, step.name)
        if isinstance(meaning, LinearMap) and not meaning.indexed and meaning.weight is not None:
            reads.setdefault(meaning.weight, []).append(input_of(step, meaning))
    return {weight: places[0] for weight, places in reads.items() if len(places) == 1 and places[0] in program.by_name}


def input_of(step: Step, meaning: LinearMap) -> str:
    """The value that a linear map is applied to."""
    place = next((place for place, each in enumerate(meaning.node.args) if each is meaning.input), None)
    read = None if place is None else step.args[place]
    return read.name if isinstance(read, Read) else step.inputs[0]


def last_features(program: Program, output: str) -> str | None:
    """What the last pooling in front of an output reads, or the last linear map without one; None for neither."""
    behind = program.upstream([output])
    for step in reversed(program.steps):
        if step.name not in behind or not step.inputs:
            continue
        meaning = meaning_of_step(program, step.name)
        if isinstance(meaning, LinearMap) and not meaning.indexed:
            head = input_of(step, meaning)
            break
    else:
        return None
    name = head
    while name in program.by_name:  # over what only reshapes or scales, back to a pooling
        step = program.by_name[name]
        meaning = meaning_of_step(program, name)
        if isinstance(meaning, Pooling):
            return step.inputs[0]
        if isinstance(meaning, LinearMap) or len([each for each in step.inputs if each in program.by_name]) != 1:
            break
        name = next(each for each in step.inputs if each in program.by_name)
    return head


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()}

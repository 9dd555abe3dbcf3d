"""What a cut network is to imitate: the original's outputs, and its features in front of the last pooling.

A network that mimics these features recovers best from few samples (Wang, Guo and Wu, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.graph.meaning import meaning_of_step
from compress.graph.ops import LinearMap, Pooling
from compress.graph.program import Program, run
from compress.graph.trace import trace_network
from compress.measures.outputs import Output
from compress.training.nearness import Batches, soft_divergence

SMALLEST_LOSS = 1e-12  # what a part of the loss is divided by, at least


@dataclass(frozen=True, eq=False)
class Answer:
    """What a network gives for one batch: outputs by name, and the features that are compared (None: none are)."""

    outputs: Mapping[str, Tensor]
    features: Tensor | None

    @property
    def numbers(self) -> int:
        """Bytes that it takes."""
        tensors = [*self.outputs.values(), *([] if self.features is None else [self.features])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Mimic:
    """Both networks as programs, with what is compared.

    Attributes:
        programs: of the original and of the cut network.
        state: of the original.
        outputs: those that count and have a gradient; `spreads`: what their distances are held against.
        features: names of the values in front of the last pooling in each; None where they cannot be compared.
        kept: channels (C',) of the original's features that the cut network still has, on its device; None: all.
        scales: what each part of the loss is divided by.
    """

    programs: tuple[Program, Program]
    state: Mapping[str, Tensor]
    outputs: tuple[Output, ...]
    spreads: Mapping[str, float]
    features: tuple[str, str] | None = None
    kept: Tensor | None = None
    scales: tuple[float, float] = (1.0, 1.0)

    def wanted(self, inputs: Sequence[Tensor]) -> Answer:
        """What the original gives, without gradients."""
        with torch.no_grad():
            answer = self._answer(0, self.state, inputs)
            if answer.features is None or self.kept is None:
                return answer
            return replace(answer, features=answer.features.index_select(1, self.kept))

    def _answer(self, which: int, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Answer:
        places = [self.programs[0].outputs.index(str(output.node)) for output in self.outputs]
        nodes = [self.programs[which].outputs[place] for place in places]
        features = [] if self.features is None else [self.features[which]]
        values = run(self.programs[which], (state,), inputs, [*nodes, *features])
        named = {output.name: values[node][0] for output, node in zip(self.outputs, nodes, strict=True)}
        return Answer(named, values[features[0]][0] if features else None)

    def parts(
        self, student: Mapping[str, Tensor], inputs: Sequence[Tensor], wanted: Answer | None = None
    ) -> tuple[Tensor, Tensor]:
        """How far outputs and features of the cut network lie from the original's, means over the batch, unscaled.

        Args:
            wanted: what the original gives, where that is known.
        """
        wanted = self.wanted(inputs) if wanted is None else wanted
        made = self._answer(1, student, inputs)
        outputs = soft_divergence(self.outputs, wanted.outputs, made.outputs, self.spreads, len(inputs[0])).mean()
        if wanted.features is None or made.features is None:
            return outputs, outputs.new_zeros(())
        missed = (made.features - wanted.features).square().mean()
        return outputs, missed / wanted.features.square().mean().clamp_min(1e-30)

    def loss(self, student: Mapping[str, Tensor], inputs: Sequence[Tensor], wanted: Answer | None = None) -> Tensor:
        """The scaled parts' sum; arguments as of `parts`."""
        outputs, features = self.parts(student, inputs, wanted)
        return outputs / self.scales[0] + features / self.scales[1]

    def balanced(self, student: Mapping[str, Tensor], held_back: Batches) -> Mimic:
        """The comparison with each part counting 1 for the cut network as it is."""
        total, count = torch.zeros(2, dtype=torch.float64), 0
        with torch.no_grad():
            for number, size in enumerate(held_back.sizes()):
                parts = torch.stack([part.double() for part in self.parts(student, held_back.read(number))])
                total, count = total.to(parts) + size * parts, count + size
        outputs, features = ((total / max(count, 1)).nan_to_num().clamp_min(SMALLEST_LOSS)).tolist()
        return replace(self, scales=(outputs, features))


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
    if names[0] is None or names[1] is None:
        return plain
    first, second = programs[0].shape(names[0]), programs[1].shape(names[1])
    features = (names[0], names[1])
    if first == second:
        return replace(plain, features=features)
    if len(first) < 2 or (first[0], *first[2:]) != (second[0], *second[2:]):
        return plain
    same = [units for units in kept if len(units) == second[1] and int(units.max()) < first[1]]
    return replace(plain, features=features, kept=same[0].to(examples[0].device)) if len(same) == 1 else plain


def last_features(program: Program, output: str) -> str | None:
    """What the last pooling in front of an output reads, or the last linear map without one; None for neither."""
    behind = program.upstream([output])
    for step in reversed(program.steps):
        if step.name not in behind or not step.inputs:
            continue
        meaning = meaning_of_step(program, step.name)
        if isinstance(meaning, LinearMap) and not meaning.indexed:
            head = step.inputs[0]
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

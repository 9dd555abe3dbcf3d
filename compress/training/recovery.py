"""recover(): all weights of a cut network moved towards what the original gives, without labels, where that helps.

The original is asked on the calibration samples themselves (images also flipped and shifted a little): its outputs, and
its features in front of the last pooling (Wang, Guo and Wu, CVPR 2022: a network that mimics these recovers best from
few samples). Steps are relative to the size of each output's own weights, so one rate suits every layer, with a
normalisation or with it folded away. Several rates are tried briefly, statistics of batch norms taken again where that
helps; what held-back samples like best is kept, and where they like nothing better the network stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import NonFiniteError
from compress.graph.meaning import meaning_of_step
from compress.graph.ops import LinearMap, Pooling
from compress.graph.program import Program, run
from compress.graph.trace import trace_network
from compress.measures.figures import MEANINGS
from compress.measures.outputs import Output
from compress.progress import Progress
from compress.report.model import EvaluationReport, HeldBackCheck, Step, TuningReport
from compress.training.nearness import (
    Batches,
    Check,
    check_held_back,
    measure_scales,
    outputs_of,
    soft_divergence,
)

AUTO_EPOCHS = 6  # epochs over the fitting samples unless told otherwise: about 24 forward passes of the original
ROUNDS = (1.0, 0.5)  # unless told otherwise: shares of these steps and of the rate, the next where the last step helped
RATES = (3e-4, 1e-3, 3e-3)  # of Adam, relative to the weights
TRIAL = 0.1  # share of the steps that each rate is tried for
WARM_UP = 0.1  # share of the steps in which the rate rises
CHECKS = 8  # times that held-back samples are looked at
PATIENCE = 3  # checks without a gain that end it
CLIP = 1.0  # largest gradient norm
SHIFT = 16  # an image is shifted by up to this part of its side
SMALLEST_IMAGE = 16  # pixels a side
STEP_NUMBERS = 2**21  # input numbers in a batch, at most: what gradients need follows them
SMALLEST_LOSS = 1e-12  # what a part of the loss is divided by, at least
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Recovery:
    """What was tried and what came of it.

    Attributes:
        steps: taken after the trials.
        rates: (rate, held-back loss after its trial).
        divergences: (step, held-back loss), from step 0 on; the cut network's own outputs and features count 1 each.
        kept_step: the step whose weights were kept; 0 where none were better.
        checks: held-back figures at the same steps.
        refreshed: whether statistics of batch norms were taken again.
        augmented: whether images were flipped and shifted.
    """

    steps: int
    rates: tuple[tuple[float, float], ...]
    divergences: tuple[tuple[int, float], ...]
    kept_step: int
    checks: tuple[Check, ...]
    refreshed: bool = False
    augmented: bool = False

    @property
    def helped(self) -> bool:
        """Whether the network changed."""
        return self.kept_step > 0 or self.refreshed

    def describe(self) -> str:
        """What came of it, in words."""
        if not self.helped:
            return "recovery did not help on held-back samples: the network is kept as it was cut"
        place = max(number for number, check in enumerate(self.checks) if check.step == self.kept_step)
        first, kept = self.checks[0].figures, self.checks[place].figures
        pairs = ", ".join(f"{MEANINGS[key].name} {value:.4g} → {kept[key]:.4g}" for key, value in first.items())
        return f"recovery on held-back samples: {pairs} (step {self.kept_step} of {self.steps} kept)"

    def report(self, before: EvaluationReport | None) -> TuningReport:
        """What a report holds of it; `before`: the evaluation of the cut network."""
        return TuningReport(
            method="distillation",
            length=self.steps,
            kept=self.kept_step,
            evaluation_before=before,
            divergences=tuple(Step(*point) for point in self.divergences),
            held_back=tuple(HeldBackCheck(check.step, dict(check.figures)) for check in self.checks),
        )


@dataclass(frozen=True, eq=False)
class Mimic:
    """Both networks as programs, with what is compared.

    Attributes:
        programs: of the original and of the cut network.
        state: of the original.
        outputs: those that count and have a gradient; `spreads`: what their distances are held against.
        features: names of the values in front of the last pooling in each; None where they cannot be compared.
        kept: channels (C',) of the original's features that the cut network still has; None: all.
        scales: what each part of the loss is divided by.
    """

    programs: tuple[Program, Program]
    state: Mapping[str, Tensor]
    outputs: tuple[Output, ...]
    spreads: Mapping[str, float]
    features: tuple[str, str] | None = None
    kept: Tensor | None = None
    scales: tuple[float, float] = (1.0, 1.0)

    def parts(self, student: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """How far outputs and features of the cut network lie from the original's, means over the batch, unscaled."""
        nodes = [output.node for output in self.outputs if output.node is not None]
        places = [self.programs[0].outputs.index(node) for node in nodes]
        found: list[dict[str, Tensor]] = []
        named: list[dict[str, Tensor]] = []
        for which, (program, state) in enumerate(zip(self.programs, (self.state, student), strict=True)):
            own = [program.outputs[place] for place in places]
            names = [*own, *([] if self.features is None else [self.features[which]])]
            with torch.set_grad_enabled(which == 1 and torch.is_grad_enabled()):
                values = {name: each[0] for name, each in run(program, (state,), inputs, names).items()}
            found.append(values)
            named.append({output.name: values[name] for output, name in zip(self.outputs, own, strict=True)})
        outputs = soft_divergence(self.outputs, named[0], named[1], self.spreads, len(inputs[0])).mean()
        if self.features is None:
            return outputs, outputs.new_zeros(())
        wanted, made = found[0][self.features[0]], found[1][self.features[1]]
        if self.kept is not None:
            wanted = wanted.index_select(1, self.kept.to(wanted.device))
        return outputs, (made - wanted).square().mean() / wanted.square().mean().clamp_min(1e-30)

    def loss(self, student: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """The scaled parts' sum."""
        outputs, features = self.parts(student, inputs)
        return outputs / self.scales[0] + features / self.scales[1]


class RelativeWeights:
    """Parameters W = W₀ + s·θ: θ starts at zero, s is the root mean square of W₀'s row (of all of it, without rows)."""

    def __init__(self, module: nn.Module) -> None:
        self.base = {name: tensor.detach() for name, tensor in module.named_parameters() if tensor.is_floating_point()}
        self.scale = {name: row_sizes(tensor) for name, tensor in self.base.items()}
        self.offsets = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in self.base.items()}

    def applied(self) -> dict[str, Tensor]:
        """The parameters as they are now."""
        return {name: torch.addcmul(tensor, self.scale[name], self.offsets[name]) for name, tensor in self.base.items()}


def row_sizes(weights: Tensor) -> Tensor:
    """Root mean square of each output's weights, shaped to multiply them; at least a thousandth of all of them's."""
    squares = weights.double().square()
    whole = squares.mean()
    own = squares.flatten(1).mean(1).reshape(-1, *[1] * (weights.ndim - 1)) if weights.ndim > 1 else whole
    return own.clamp_min(max(1e-6 * float(whole), 1e-12)).sqrt().to(weights)


@dataclass(eq=False)
class Descent:
    """Adam on the relative weights of one cut network, over the fitting samples in random order.

    Attributes:
        buffers: of the cut network, which stay.
        images: flip and shift the samples.
    """

    mimic: Mimic
    weights: RelativeWeights
    buffers: dict[str, Tensor]
    fitting: Batches
    images: bool
    seed: int

    def __post_init__(self) -> None:
        self._offsets = list(self.weights.offsets.values())
        self._adam = torch.optim.Adam(self._offsets, lr=0.0)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._order: list[int] = []

    def run(self, rates: Sequence[float], progress: Progress) -> bool:
        """One step for each rate; False, and no step more, once the loss is not finite."""
        device = self._offsets[0].device
        for rate in rates:
            if not self._order:
                self._order = torch.randperm(len(self.fitting.sizes()), generator=self._generator).tolist()
            inputs = [tensor.to(device) for tensor in self.fitting.read(self._order.pop())]
            if self.images:
                inputs[0] = moved(inputs[0], self._generator)
            for group in self._adam.param_groups:
                group["lr"] = rate
            with torch.enable_grad():
                loss = self.mimic.loss({**self.buffers, **self.weights.applied()}, inputs)
                if not bool(torch.isfinite(loss)):
                    return False
                self._adam.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
            for tensor in self._offsets:
                tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            torch.nn.utils.clip_grad_norm_(self._offsets, CLIP)
            self._adam.step()
            progress.advance()
        return True


@dataclass(frozen=True, eq=False)
class HeldBack:
    """What held-back samples say of a network: the loss of `mimic`, and the figures that a report leads with.

    Attributes:
        wanted: the original's outputs, batch by batch.
        answered: the output that labels or targets are answers to.
    """

    mimic: Mimic
    stream: Batches
    outputs: Sequence[Output]
    wanted: Sequence[Mapping[str, Tensor]]
    answered: Output | None

    def loss(self, module: nn.Module) -> float:
        """The loss per sample; infinite where it is no number."""
        with torch.no_grad():
            total = sum(
                size * float(self.mimic.loss(tensors_of(module), read_batch(module, self.stream, number)))
                for number, size in enumerate(self.stream.sizes())
            )
        return total / max(sum(self.stream.sizes()), 1) if math.isfinite(total) else math.inf

    def check(self, module: nn.Module, step: int) -> Check:
        """The figures."""
        device = next(module.parameters()).device
        return check_held_back(
            module, self.stream, self.wanted, self.outputs, self.mimic.spreads, self.answered, device, step
        )


def recover(
    original: nn.Module,
    program: Program,
    compressed: nn.Module,
    examples: tuple[Tensor, ...],
    fitting: Batches,
    held_back: Batches,
    outputs: Sequence[Output],
    progress: Progress,
    *,
    answered: Output | None = None,
    steps: int | None = None,
    rates: Sequence[float] = RATES,
    kept: Sequence[Tensor] = (),
    seed: int = 0,
) -> tuple[nn.Module, Recovery]:
    """A copy of `compressed` that held-back samples like better, and no figure of a report less; or an equal one.

    Args:
        program: the original, traced.
        examples: inputs on which the cut network can be traced.
        fitting, held_back: batches of disjoint samples; one batch of the first makes one step.
        outputs: those that count; whole numbers have no gradient and are only looked at.
        answered: the one that labels or targets are answers to.
        steps: after the trials; None: `AUTO_EPOCHS` epochs with the trials, then `ROUNDS` as long as the loss falls.
        kept: the units that stay, of each group that was cut: among them those of the features, where these were cut.

    Raises:
        NonFiniteError: the cut network's outputs are NaN or Inf.
    """
    module = copy.deepcopy(compressed).eval()
    smooth = tuple(output for output in outputs if output.kind != "whole" and output.node is not None)
    rounds = ROUNDS if steps is None else ROUNDS[:1]
    if steps is None:
        steps = max(1, round(AUTO_EPOCHS * len(fitting.sizes()) / (1 + TRIAL * len(rates))))
    steps = steps if smooth else 0
    trial = max(1, round(TRIAL * steps)) if len(rates) > 1 and steps else 0
    progress.stage("recovering", steps + trial * len(rates))
    wanted = outputs_of(original, held_back, outputs, examples[0].device, progress)
    spreads = measure_scales(outputs, wanted, held_back.sizes())
    compared = compare(Mimic((program, program), tensors_of(original), smooth, spreads), module, examples, kept)
    mimic = balanced(compared, module, held_back) if smooth else compared
    judge = HeldBack(mimic, held_back, outputs, wanted, answered)
    first, lowest = judge.check(module, 0), judge.loss(module) if smooth else 0.0
    if not math.isfinite(lowest):
        raise NonFiniteError("The cut network's outputs on held-back samples are NaN or Inf.")
    divergences, checks = [(0, lowest)], [first]

    def better(candidate: nn.Module, step: int) -> bool:
        found, check = judge.loss(candidate), judge.check(candidate, step)
        divergences.append((step, found))
        checks.append(check)
        return found < lowest and check.no_worse_than(first)

    refreshed = with_statistics(module, fitting) if smooth else None
    if refreshed is not None and better(refreshed, 0):
        module, lowest = refreshed, divergences[-1][1]
    else:
        refreshed, divergences, checks = None, divergences[:1], checks[:1]
    student = copy.deepcopy(module)  # the one that is stepped; `module` holds the best so far

    def start() -> Descent:
        return Descent(
            mimic, RelativeWeights(module), dict(module.named_buffers()), fitting, takes_images(examples), seed
        )

    tried = []
    for rate in rates if trial else ():
        descent = start()
        sound = descent.run([rate] * trial, progress)
        tried.append((rate, judge.loss(with_weights(student, descent.weights)) if sound else math.inf))
    largest = min(tried, key=lambda each: each[1])[0] if tried else rates[0]
    descent = start()
    taken = kept_step = 0
    every = max(1, math.ceil(steps / CHECKS))
    for share in rounds:
        begun, length = taken, max(1, round(share * steps)) if steps else 0
        if kept_step < begun:
            break  # the last step of the round before did not help
        while taken < min(begun + length, kept_step + PATIENCE * every):
            ahead = range(taken, min(begun + length, taken + every))
            block = [share * largest * rate_share(step - begun, length) for step in ahead]
            if not descent.run(block, progress):
                break
            taken += len(block)
            if better(with_weights(student, descent.weights), taken):
                module, lowest, kept_step = copy.deepcopy(student), divergences[-1][1], taken
    return module, Recovery(
        taken,
        tuple(tried),
        tuple(divergences),
        kept_step,
        tuple(checks),
        refreshed is not None,
        takes_images(examples),
    )


def with_weights(module: nn.Module, weights: RelativeWeights) -> nn.Module:
    """The same module with the weights put in."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.applied().items():
            parameters[name].copy_(tensor)
    return module


def compare(mimic: Mimic, module: nn.Module, examples: tuple[Tensor, ...], kept: Sequence[Tensor]) -> Mimic:
    """The comparison of the original with `module`, which is traced; with the features that correspond."""
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
    return replace(plain, features=features, kept=same[0]) if len(same) == 1 else plain


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


def rate_share(step: int, steps: int) -> float:
    """Share of the learning rate at a step counted from 0: it rises linearly, then falls as a half cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def balanced(mimic: Mimic, module: nn.Module, held_back: Batches) -> Mimic:
    """The comparison with each part counting 1 for the cut network as it is."""
    totals, count = [0.0, 0.0], 0
    with torch.no_grad():
        for number, size in enumerate(held_back.sizes()):
            parts = mimic.parts(tensors_of(module), read_batch(module, held_back, number))
            totals = [total + size * float(part) for total, part in zip(totals, parts, strict=True)]
            count += size
    outputs, features = (max(total / max(count, 1), SMALLEST_LOSS) for total in totals)
    return replace(mimic, scales=(outputs, features))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()}


def with_statistics(module: nn.Module, fitting: Batches) -> nn.Module | None:
    """A copy whose batch norms have the statistics of the fitting samples; None without batch norms.

    Batches of one sample are left out: they have no variance.
    """
    found = copy.deepcopy(module)
    norms = [each for each in found.modules() if isinstance(each, BATCH_NORMS) and each.running_mean is not None]
    numbers = [number for number, size in enumerate(fitting.sizes()) if size > 1]
    if not norms or not numbers:
        return None
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for number in numbers:
            found(*read_batch(module, fitting, number))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return found.eval()


def takes_images(examples: Sequence[Tensor]) -> bool:
    """Whether samples are images alone: one or three channels of at least `SMALLEST_IMAGE` pixels a side."""
    probe = examples[0]
    return (
        len(examples) == 1
        and probe.is_floating_point()
        and probe.ndim == 4
        and probe.shape[1] in (1, 3)
        and min(probe.shape[2:]) >= SMALLEST_IMAGE
    )


def step_batch(probe: Tensor) -> int:
    """Samples in a batch that gradients are taken of: few of large ones."""
    return max(8, min(64, STEP_NUMBERS // max(1, probe[0].numel())))


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each flipped or not, all shifted by a few pixels; the border is mirrored in."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    flipped = torch.where(flip.to(images.device)[:, None, None, None], images.flip(3), images)
    reach = [max(1, side // SHIFT) for side in images.shape[2:]]
    down, right = (int(torch.randint(0, 2 * each + 1, (), generator=generator)) for each in reach)
    padded = nn.functional.pad(flipped, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


def read_batch(module: nn.Module, stream: Batches, number: int) -> list[Tensor]:
    """Inputs of one batch on the module's device."""
    device = next(module.parameters()).device
    return [tensor.to(device) for tensor in stream.read(number)]

"""recover(): all weights of a cut network moved towards what the original gives, without labels, where that helps.

The original is asked on the calibration samples (images also flipped and shifted a little): its outputs, and
its features in front of the last pooling. Steps are relative to the size of each output's own weights: one rate suits
every layer, with a normalisation or with it folded away. Several rates are tried briefly, statistics of batch norms
taken again where that helps; what held-back samples like best is kept, and where they like nothing better the network
stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.compression.problem import SampleStream
from compress.errors import NonFiniteError
from compress.graph.program import Program
from compress.measures.figures import MEANINGS
from compress.measures.outputs import Output
from compress.progress import Progress
from compress.report.model import EvaluationReport, HeldBackCheck, Step, TuningReport
from compress.training.descent import Descent, RelativeWeights, rate_share, with_weights
from compress.training.drawing import Placed, placed, takes_images
from compress.training.mimic import Answer, Mimic, compare, tensors_of
from compress.training.nearness import Check, check_held_back, measure_scales, outputs_of

AUTO_EPOCHS = 6  # epochs over the fitting samples unless told otherwise: about 24 forward passes of the original
ROUNDS = (1.0, 0.5)  # unless told otherwise: shares of these steps and of the rate, the next where the last step helped
RATES = (3e-4, 1e-3, 3e-3)  # of Adam, relative to the weights
TRIAL = 0.1  # share of the steps that each rate is tried for
CHECKS = 8  # times that held-back samples are looked at
PATIENCE = 3  # checks without a gain that end it
REMEMBERED = 2**28  # bytes of the original's outputs and features on held-back samples that are kept
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
class HeldBack:
    """What held-back samples say of a network: the loss of `mimic`, and the figures that a report leads with.

    Attributes:
        wanted: the original's outputs, batch by batch.
        answered: the output that labels or targets are answers to.
        known: batch -> what the original gives for it, of the first that `REMEMBERED` has room for.
    """

    mimic: Mimic
    stream: Placed
    outputs: Sequence[Output]
    wanted: Sequence[Mapping[str, Tensor]]
    answered: Output | None
    known: Mapping[int, Answer]

    @classmethod
    def of(
        cls,
        mimic: Mimic,
        stream: Placed,
        outputs: Sequence[Output],
        wanted: Sequence[Mapping[str, Tensor]],
        answered: Output | None,
    ) -> HeldBack:
        """With what the original gives, computed once."""
        known: dict[int, Answer] = {}
        room = REMEMBERED
        for number in range(len(stream.sizes()) if mimic.outputs else 0):
            answer = mimic.wanted(stream.read(number))
            room -= answer.numbers
            if room < 0:
                break
            known[number] = answer
        return cls(mimic, stream, outputs, wanted, answered, known)

    def loss(self, module: nn.Module) -> float:
        """The loss per sample; infinite where it is no number."""
        total, student = None, tensors_of(module)
        with torch.no_grad():
            for number, size in enumerate(self.stream.sizes()):
                loss = size * self.mimic.loss(student, self.stream.read(number), self.known.get(number)).double()
                total = loss if total is None else total + loss
        mean = 0.0 if total is None else float(total) / sum(self.stream.sizes())
        return mean if math.isfinite(mean) else math.inf

    def check(self, module: nn.Module, step: int) -> Check:
        """The figures."""
        return check_held_back(
            module,
            self.stream,
            self.wanted,
            self.outputs,
            self.mimic.spreads,
            self.answered,
            self.stream.device,
            step,
        )


def recover(
    original: nn.Module,
    program: Program,
    compressed: nn.Module,
    examples: tuple[Tensor, ...],
    fitting: SampleStream,
    held_back: SampleStream,
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
    module, device = copy.deepcopy(compressed).eval(), examples[0].device
    seen, checked = placed(fitting, device), placed(held_back, device)
    smooth = tuple(output for output in outputs if output.kind != "whole" and output.node is not None)
    rounds = ROUNDS if steps is None else ROUNDS[:1]
    if steps is None:
        steps = max(1, round(AUTO_EPOCHS * len(fitting.sizes()) / (1 + TRIAL * len(rates))))
    steps = steps if smooth else 0
    trial = max(1, round(TRIAL * steps)) if len(rates) > 1 and steps else 0
    progress.stage("recovering", steps + trial * len(rates))
    wanted = outputs_of(original, checked, outputs, device, progress)
    spreads = measure_scales(outputs, wanted, held_back.sizes())
    compared = compare(Mimic((program, program), tensors_of(original), smooth, spreads), module, examples, kept)
    mimic = compared.balanced(tensors_of(module), checked) if smooth else compared
    judge = HeldBack.of(mimic, checked, outputs, wanted, answered)
    first, lowest = judge.check(module, 0), judge.loss(module) if smooth else 0.0
    if not math.isfinite(lowest):
        raise NonFiniteError("The cut network's outputs on held-back samples are NaN or Inf.")
    divergences, checks = [(0, lowest)], [first]

    def better(candidate: nn.Module, step: int) -> bool:
        found, check = judge.loss(candidate), judge.check(candidate, step)
        divergences.append((step, found))
        checks.append(check)
        return found < lowest and check.no_worse_than(first)

    refreshed = with_statistics(module, seen) if smooth else None
    if refreshed is not None and better(refreshed, 0):
        module, lowest = refreshed, divergences[-1][1]
    else:
        refreshed, divergences, checks = None, divergences[:1], checks[:1]
    student = copy.deepcopy(module)  # the one that is stepped; `module` holds the best so far

    def start() -> Descent:
        drawn = seen.drawn(images=takes_images(examples), seed=seed)
        return Descent(mimic, RelativeWeights(module), dict(module.named_buffers()), drawn)

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


def with_statistics(module: nn.Module, fitting: Placed) -> nn.Module | None:
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
            found(*fitting.read(number))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return found.eval()

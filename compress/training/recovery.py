"""recover(): all weights of a cut network moved towards what the original gives, without labels, where that helps.

The original is asked on the calibration samples (images also flipped and shifted a little): its outputs, and its
features in front of the last pooling. Steps are relative to the size of each output's own weights or to the spread of
what is shifted, and orthogonal for matrices: one rate suits every layer, with a normalisation or with it folded away.
The largest rate that does no harm in a brief trial is taken, else the smallest: in the whole run large ones get
farther, and a few steps do not tell by how much. Where the loss is not at its lowest by half of the run, the next
smaller one begins anew. Statistics of batch norms are taken again where that helps. What held-back samples like best is
kept, and where they like nothing better the network stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from compress.compression.problem import SampleStream
from compress.copying import deep_copy
from compress.errors import NonFiniteError
from compress.graph.program import Program
from compress.measures.figures import MEANINGS, FigureSums
from compress.measures.outputs import Output, named_outputs
from compress.progress import Progress
from compress.report.model import EvaluationReport, ForecastReport, HeldBackCheck, Step, TuningReport
from compress.training.descent import Descent, blocks_of, rate_share, with_weights
from compress.training.drawing import Placed, placed, takes_images
from compress.training.forecast import FURTHER, Point, forecast
from compress.training.mimic import Answer, Mimic, compare, tensors_of
from compress.training.nearness import Check, Checking, measure_scales, outputs_of
from compress.training.scales import measure_units

AUTO_EPOCHS = 7  # epochs over the fitting samples unless told otherwise
AUTO_EPOCHS_ON_DEVICE = 12  # the same on an accelerator, which makes fewer and larger steps of one
PARTS = (0.05, 0.15)  # of the fitting samples, that a recovery is repeated on for a forecast
RATES = (2e-3, 7e-4, 2e-4)  # relative to weights and values; tried in this order
TRIAL = 0.06  # share of the steps that a rate is tried for
HARM = 1.02  # held-back loss after a trial, relative to that before, above which a rate is too large
CHECKS = 4  # times that held-back samples are looked at
STATISTICS_SAMPLES = 512  # that statistics of batch norms are taken on, at most
REMEMBERED = 2**28  # bytes of the original's outputs and features on held-back samples that are kept
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Recovery:
    """What was tried and what came of it.

    Attributes:
        steps: taken after the trials, those of a descent that was given up among them.
        rates: (rate, held-back loss after its trial), of those that were tried.
        divergences: (step, held-back loss), from step 0 on; the cut network's own outputs and features count 1 each.
        kept_step: the step whose weights were kept; 0 where none were better.
        checks: held-back figures at the same steps.
        refreshed: whether statistics of batch norms were taken again.
        augmented: whether images were flipped and shifted.
        forecast: what more samples would bring, where that can be told.
    """

    steps: int
    rates: tuple[tuple[float, float], ...]
    divergences: tuple[tuple[int, float], ...]
    kept_step: int
    checks: tuple[Check, ...]
    refreshed: bool = False
    augmented: bool = False
    forecast: ForecastReport | None = None

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
            forecast=self.forecast,
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
            room -= answer.size
            if room < 0:
                break
            known[number] = answer
        return cls(mimic, stream, outputs, wanted, answered, known)

    def look(self, module: nn.Module, step: int) -> tuple[float, Check]:
        """The loss per sample, infinite where it is no number and 0 where no output has a gradient; the figures."""
        total, student = None, tensors_of(module)
        checking = Checking(self.outputs, self.mimic.spreads, self.answered)
        with torch.no_grad():
            for number, size in enumerate(self.stream.sizes()):
                inputs = self.stream.read(number)
                after: Mapping[str, Tensor] = {}
                if self.mimic.outputs:
                    answer = self.mimic.answer(student, inputs)
                    loss = size * self.mimic.loss(answer, self._given(number, inputs), size)
                    total, after = loss if total is None else total + loss, answer.outputs
                if any(output.name not in after for output in self.outputs):
                    after = named_outputs(module(*inputs))
                before = {name: tensor.to(self.stream.device) for name, tensor in self.wanted[number].items()}
                answers = None if self.answered is None else self.stream.batch(number)  # samples may be read anew
                checking.add(before, after, answers, size)
        mean = 0.0 if total is None else float(total) / sum(self.stream.sizes())
        return mean if math.isfinite(mean) else math.inf, checking.finish(step)

    def _given(self, number: int, inputs: Sequence[Tensor]) -> Answer:
        """What the original gives."""
        return self.known[number] if number in self.known else self.mimic.wanted(inputs)

    def distances(self, module: nn.Module) -> np.ndarray:
        """How far each sample's (N,) outputs lie from the original's."""
        student, distances = tensors_of(module), []
        with torch.no_grad():
            for number in range(len(self.stream.sizes())):
                distances.append(self.mimic.distances(student, self.stream.read(number), self.known.get(number)).cpu())
        return torch.cat(distances).numpy()

    def agreement(self, module: nn.Module) -> float | None:
        """Share of answers that are the original's, of the first output of class or binary scores; None without one."""
        shown = next((output for output in self.outputs if output.kind in ("classes", "binary")), None)
        if shown is None:
            return None
        sums = FigureSums(shown)
        with torch.inference_mode():
            for number, size in enumerate(self.stream.sizes()):
                given = named_outputs(module(*self.stream.read(number)))[shown.name]
                sums.add_agreement(self.wanted[number][shown.name].to(given.device), given, size)
        return next(figure.values[1] for figure in sums.figures() if figure.key == "agreement")


@dataclass(eq=False)
class Best:
    """The best network so far by what held-back samples say, and all that they said.

    Attributes:
        loss: of `module`; `first`: the figures of the cut network, of which none may get worse.
    """

    judge: HeldBack
    module: nn.Module
    loss: float
    first: Check
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def offer(self, candidate: nn.Module, step: int) -> bool:
        """Keep a copy of the candidate if it is better."""
        loss, check = self.judge.look(candidate, step)
        self.losses.append((step, loss))
        self.checks.append(check)
        better = loss < self.loss and check.no_worse_than(self.first)
        if better:
            self.module = candidate  # lets go of the last one before there is another copy
            self.module, self.loss, self.step = deep_copy(candidate), loss, step
        return better


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

    A figure that is worse by less than the noise of the held-back samples is not.

    Args:
        program: the original, traced.
        examples: inputs on which the cut network can be traced.
        fitting, held_back: disjoint samples; one batch of the first makes one step.
        outputs: those that count; whole numbers have no gradient and are only looked at.
        answered: the one that labels or targets are answers to.
        steps: after the trials; None: `auto_epochs` epochs, and a forecast of what more samples would bring.
        rates: from the largest to the smallest; one alone is not tried before.
        kept: the units that stay, of each group that was cut: among them those of the features, where these were cut.

    Raises:
        NonFiniteError: the cut network's outputs are NaN or Inf.
    """
    module, device = with_weights(compressed, {}).eval(), examples[0].device
    seen, checked = placed(fitting, device), placed(held_back, device)
    smooth = tuple(output for output in outputs if output.kind != "whole" and output.node is not None)
    planned = round(auto_epochs(device) * len(fitting.sizes())) if steps is None else steps
    planned = max(1, planned) if smooth and steps != 0 else 0
    trial = max(1, round(TRIAL * planned)) if len(rates) > 1 and planned else 0
    progress.stage("recovering", planned + trial * len(rates))
    wanted = outputs_of(original, checked, outputs, device, progress)
    spreads = measure_scales(outputs, wanted, held_back.sizes())
    plain = Mimic((program, program), tensors_of(original), smooth, spreads)
    mimic = compare(plain, module, examples, [units.to(device) for units in kept])
    mimic = mimic.balanced(tensors_of(module), checked) if smooth else mimic
    judge = HeldBack.of(mimic, checked, outputs, wanted, answered)
    loss, first = judge.look(module, 0)
    if not math.isfinite(loss):
        raise NonFiniteError("The cut network's outputs on held-back samples are NaN or Inf.")
    best = Best(judge, module, loss, first, losses=[(0, loss)], checks=[first])
    refreshed = with_statistics(module, seen) if smooth else None
    helped = refreshed is not None and best.offer(refreshed, 0)
    if refreshed is not None and not helped:
        best.losses.pop(), best.checks.pop()
    units = measure_units(mimic.programs[1], tensors_of(best.module), seen.read(0)) if planned else {}
    runs = Runs(judge, seen, takes_images(examples), seed, best.module, units, progress)
    tried = runs.harmless(rates, trial, HARM * best.loss) if trial else []
    rate, steps_taken = rates[max(0, len(tried) - 1)], 0
    smaller = rates[len(tried) :] if tried else ()
    if planned:
        steps_taken = runs.descend(best, rate, planned, falling=bool(smaller))
        if steps_taken < planned and smaller:
            rate = smaller[0]
            steps_taken += runs.descend(best, rate, planned, begun=steps_taken)
    outlook = runs.forecast(best, rate, planned) if steps is None and best.step else None
    recovered = best.module if best.step or helped else deep_copy(compressed).eval()
    return recovered, Recovery(
        steps_taken,
        tuple(tried),
        tuple(best.losses),
        best.step,
        tuple(best.checks),
        helped,
        takes_images(examples),
        outlook,
    )


def auto_epochs(device: torch.device) -> int:
    """Epochs of a recovery that nobody gave a number of steps for."""
    return AUTO_EPOCHS if device.type == "cpu" else AUTO_EPOCHS_ON_DEVICE


@dataclass(frozen=True, eq=False)
class Runs:
    """Descents from one network, each from its weights anew.

    Attributes:
        start: the network, whose weights no descent writes over.
        units: of its steps, by parameter.
    """

    judge: HeldBack
    seen: Placed
    images: bool
    seed: int
    start: nn.Module
    units: Mapping[str, Tensor]
    progress: Progress

    def begin(self, samples: int | None = None) -> Descent:
        """A descent over the first samples; None: all."""
        seen = self.seen if samples is None else self.seen.first(samples)
        drawn = seen.drawn(images=self.images, seed=self.seed)
        held = dict(self.start.named_buffers())
        held |= {name: each.detach() for name, each in self.start.named_parameters() if not each.is_floating_point()}
        return Descent(self.judge.mimic, blocks_of(self.start, self.units), held, drawn)

    def after(self, rate: float, steps: int, samples: int | None = None) -> nn.Module | None:
        """The network after a whole descent; None where the loss was not finite."""
        descent = self.begin(samples)
        if not descent.run([rate * rate_share(step, steps) for step in range(steps)], self.progress):
            return None
        return with_weights(self.start, descent.averaged())

    def loss_after(self, rate: float, steps: int) -> float:
        """Held-back loss after so many steps; infinite where one was not finite."""
        module = self.after(rate, steps)
        return math.inf if module is None else self.judge.look(module, steps)[0]

    def harmless(self, rates: Sequence[float], steps: int, most: float) -> list[tuple[float, float]]:
        """Rates in their order, each with the held-back loss after so many steps, up to the first of at most `most`."""
        tried: list[tuple[float, float]] = []
        for rate in rates:
            tried.append((rate, self.loss_after(rate, steps)))
            if tried[-1][1] <= most:
                break
        return tried

    def descend(self, best: Best, rate: float, steps: int, *, begun: int = 0, falling: bool = False) -> int:
        """So many steps, held-back samples asked `CHECKS` times; how many were taken. Half without a gain end it.

        Args:
            begun: steps taken before, in a descent given up: the count goes on from there.
            falling: half end it too where the loss is not the lowest then.
        """
        descent = self.begin()
        student = with_weights(self.start, descent.averaged())
        every, taken = max(1, math.ceil(steps / CHECKS)), 0
        half = every * math.ceil(steps / (2 * every))
        while taken < steps and (taken < half or best.step > begun):
            ahead = range(taken, min(steps, taken + every))
            if not descent.run([rate * rate_share(step, steps) for step in ahead], self.progress):
                break
            taken += len(ahead)
            best.offer(student, begun + taken)
            if falling and taken == half and best.losses[-1][1] > min(loss for _, loss in best.losses):
                break
        return taken

    def forecast(self, best: Best, rate: float, steps: int) -> ForecastReport | None:
        """What more samples would bring: from whole descents on parts of them, and the one on all."""
        points = []
        self.progress.stage("recovering on parts of the samples", sum(max(1, round(share * steps)) for share in PARTS))
        for share in PARTS:
            samples = round(share * len(self.seen.sizes())) * self.seen.stream.batch_size
            part = self.after(rate, max(1, round(share * steps)), samples) if samples else None
            if part is None:
                return None
            points.append(Point(samples, self.judge.distances(part)))
        points.append(Point(self.seen.count, self.judge.distances(best.module)))
        outlook = forecast(points, seed=self.seed)
        if outlook is None:
            return None
        samples = self.seen.count + self.judge.stream.count
        agreement = [self.judge.agreement(module) for module in (self.start, best.module)]
        return ForecastReport(
            samples,
            FURTHER * samples,
            tuple(Step(*point) for point in outlook.points),
            outlook.left,
            outlook.low,
            outlook.high,
            *agreement,
        )


def with_statistics(module: nn.Module, fitting: Placed) -> nn.Module | None:
    """A copy whose batch norms have the statistics of the first fitting samples; None without batch norms.

    Batches of one sample are left out: they have no variance.
    """
    sizes = fitting.first(STATISTICS_SAMPLES).sizes()
    numbers = [number for number, size in enumerate(sizes) if size > 1]
    refreshed = with_weights(module, {})
    norms = [each for each in refreshed.modules() if isinstance(each, BATCH_NORMS) and each.running_mean is not None]
    if not norms or not numbers:
        return None
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for number in numbers:
            refreshed(*fitting.read(number))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return refreshed.eval()

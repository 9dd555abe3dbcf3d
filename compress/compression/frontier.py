"""Recording turn after turn: what lies between settled and unsettled layers is kept, so that no pass starts anew.

The values at the frontier between what is settled and what will still change are kept on disk for both networks, so a
pass continues where the last one ended and a whole sweep costs about one pass through each of the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.compression.known import KnownOriginal
from compress.compression.problem import KeptPair, Problem, gather_moments
from compress.compression.scoring import CalibrationScore, score_samples
from compress.compression.turns import Choose, Filter, Refit, Turn, changed_tensors, counting_steps
from compress.graph.program import run
from compress.graph.steps import Override
from compress.measures.outputs import Distances
from compress.progress import Progress
from compress.recording.filters import FilterMoments, FilterRecorder
from compress.recording.layer_moments import LayerMoments
from compress.recording.record import GroupRecorder, record_moments
from compress.recording.store import ActivationStore
from compress.units.groups import ReadUnits

CACHE_BYTES = 8 * 2**30  # on disk, for activations between two layers
WIDER = 4  # times the values of the frontier, above which the next one is not written down
MOST_WAITS = 2  # turns on end


@dataclass(eq=False)
class Frontier:
    """Where a sweep stands on the fitting and on the held-back samples.

    Attributes:
        rectified: whether targets count errors behind the next ReLU alone.
        stores: of the fitting and of the held-back samples, the values that the next turn starts from.
        known: what the original network gives, so that the other runs alone; None: both run.
        following: where the turn that is recorded leaves those of the one behind it.
        waited: turns that the frontier has stayed for.
    """

    problem: Problem
    progress: Progress
    rectified: bool
    stores: Sequence[ActivationStore]
    known: KnownOriginal | None = None
    following: Sequence[ActivationStore] = ()
    waited: int = 0

    @classmethod
    @contextmanager
    def open(
        cls, problem: Problem, progress: Progress, *, rectified: bool, known: KnownOriginal | None = None
    ) -> Iterator[Frontier]:
        """At the networks' inputs; what it kept on disk goes at the end."""
        stores: list[ActivationStore] = []
        frontier = cls(problem, progress, rectified, stores, known)
        try:
            stores.extend(ActivationStore.open(CACHE_BYTES // 2) for _ in range(2))
            yield frontier
        finally:
            for store in frontier.stores:
                store.close()

    @contextmanager
    def turn(self, turns: Sequence[Turn], settled: Collection[str] = ()) -> Iterator[None]:
        """Around the first of `turns`, which is recorded within; the others are still to come.

        Normalisations over units are made anew once some of these went: behind the groups that are not `settled`.

        Where the next frontier is far wider than this one (inside an inverted bottleneck), it is cheaper made again for
        the next turns than written down: the frontier stays, for a few turns.
        """
        nodes = next_frontier(self.problem, turns, settled, rectified=self.rectified)
        if self.waited < MOST_WAITS and self._size(nodes) > WIDER * self._size(self.stores[0].nodes) > 0:
            self.following, self.waited = self.stores, self.waited + 1
        else:
            self.following, self.waited = [store.advance(nodes) for store in self.stores], 0
        yield
        self.stores, self.following = self.following, ()

    def _size(self, nodes: Sequence[str]) -> int:
        """Elements of the tensors among these nodes' values, as traced."""
        program = self.problem.program
        tensors = [name for name in nodes if isinstance(program.nodes[name.partition("@")[0]].meta.get("val"), Tensor)]
        return sum(math.prod(program.shape(name)) for name in tensors)

    def record(
        self,
        turn: Choose | Refit,
        current: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        units: Tensor | None,
        *,
        single: bool,
    ) -> tuple[LayerMoments, dict[str, float]]:
        """Moments of units in the network compressed so far, and the wall seconds that took by stage.

        Args:
            kept: group name -> units (m,) that stay, of the groups settled so far.
            units: unit numbers (m,), sorted, to record; None: all.
            single: they are for a refit alone.
        """
        problem, read = self.problem, turn.read
        override = problem.renormalised(kept)
        changed = bool(override) or any(current[name] is not tensor for name, tensor in problem.state.items())
        if units is not None and len(units) in (0, read.unit_count):
            units = None
        recorders = problem.recorders(
            read, targets=changed, units=units, rectified=self.rectified, kept=self._known(turn), single=single
        )
        seconds = self._record(read, recorders, current, override)
        return gather_moments(problem, read, recorders), seconds

    def record_filters(
        self, turn: Filter, current: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[FilterMoments, FilterMoments]:
        """Moments of a depthwise convolution on the fitting and on the held-back samples."""
        rows = self._known(turn)
        fitting, checking = self.problem.filter_recorders(turn.read, rectified=self.rectified, kept=rows)
        self._record(turn.read, (fitting, checking), current, self.problem.renormalised(kept))
        return fitting.moments(), checking.moments()

    def distance(self, state: Mapping[str, Tensor], kept: Mapping[str, Tensor], samples: int) -> float:
        """Mean distance of the held-back outputs from the original's, with new weights of the turn that was recorded.

        Run is what lies behind the values that were left for the next turn, of the original network too where its
        outputs are not kept. Of several processes the first one measures, for all.

        Args:
            kept: group name -> units (m,) that stay, those of the turn among them.
            samples: of the held-back ones, at least, where there are as many.
        """
        return self.problem.share.from_first(lambda: self._measure(state, kept, samples))

    def _measure(self, state: Mapping[str, Tensor], kept: Mapping[str, Tensor], samples: int) -> float:
        problem, known, store = self.problem, self.known, self.following[1]
        override = problem.renormalised(kept)
        sums, nodes = Distances(problem.outputs), list(problem.output_nodes)
        states = (problem.state, state) if known is None else (state,)

        def of_outputs(values: Sequence[Any]) -> dict[str, Any]:
            named = dict(zip(nodes, values, strict=True))
            return {output.name: named[str(output.node)] for output in problem.outputs}

        with torch.inference_mode():
            for number, size in enumerate(problem.held_back.sizes()):
                if sums.samples >= samples:
                    break
                stored = store.get(number, problem.device)
                start = None if stored is None else {name: pair[-len(states) :] for name, pair in stored.items()}
                inputs = (
                    [tensor.to(problem.device) for tensor in problem.held_back.read(number)] if start is None else []
                )
                values = run(problem.program, states, inputs, nodes, start=start, override=override, fast=True)
                first = [values[node][0] for node in nodes] if known is None else known.outputs(1, number)
                before, after = of_outputs(first), of_outputs([values[node][-1] for node in nodes])
                sums.start(before, size)
                sums.add(0, before, after, size)
        return sums.weighted()[0]

    def _known(self, turn: Turn) -> KeptPair | None:
        return None if self.known is None else self.known.rows(turn, rectified=self.rectified)

    def _record(
        self,
        read: ReadUnits,
        recorders: Sequence[GroupRecorder | FilterRecorder],
        current: Mapping[str, Tensor],
        override: Mapping[str, Override],
    ) -> dict[str, float]:
        problem, progress = self.problem, self.progress
        streams = (problem.fitting, problem.held_back)
        seconds: Counter[str] = Counter()
        for recorder, stream, store, keep in zip(recorders, streams, self.stores, self.following, strict=True):
            progress.stage(f"recording {read.name}", min(stream.count, recorder.plan.samples))
            spent = record_moments(
                problem.program,
                [recorder],
                stream.read,
                stream.sizes(),
                problem.state,
                current,
                store=store,
                keep=keep,
                advance=progress.advance,
                alone=self.known is not None,
                override=override,
            )
            seconds.update(spent)
        return dict(seconds)

    def score(
        self, current: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[CalibrationScore | None, CalibrationScore | None]:
        """Scores on the fitting samples, where all their last values are kept, and on the held-back ones.

        Normalisations over units take their statistics over the kept ones, as in the network that is written.

        Args:
            kept: group name -> units (m,) that stay.
        """
        problem, progress = self.problem, self.progress
        override = problem.renormalised(kept)
        scores: list[CalibrationScore | None] = []
        for which, (stream, store) in enumerate(zip((problem.fitting, problem.held_back), self.stores, strict=True)):
            sizes = stream.sizes()
            if which == 0 and not all(map(store.reaches, range(len(sizes)))):  # scoring them could cost two passes
                scores.append(None)
                continue
            progress.stage("scoring calibration samples" if which == 0 else "scoring held-back samples", stream.count)
            scores.append(
                score_samples(
                    problem.program,
                    problem.state,
                    current,
                    stream.batch,
                    sizes,
                    problem.outputs,
                    problem.calibration.answered,
                    judged=problem.calibration.judged,
                    store=store,
                    known=None if self.known is None else partial(self.known.outputs, which),
                    override=override,
                    advance=progress.advance,
                )
            )
        return scores[0], scores[1]


def next_frontier(
    problem: Problem, turns: Sequence[Turn], settled: Collection[str] = (), *, rectified: bool = False
) -> tuple[str, ...]:
    """Values after which nothing depends on weights that are still to change, once the first turn is done.

    Args:
        settled: names of the groups of which no further unit goes.
    """
    changing = {name for turn in turns for consumer in turn.read.consumers for name in changed_tensors(consumer)}
    later = [turn.read for turn in turns[1:]]
    wanted = {consumer.input for group in later for consumer in group.consumers}
    wanted |= {residual.other for group in later for residual in problem.residuals(group).values()}
    if rectified:
        wanted |= {rectifier.source for group in later for rectifier in problem.rectifiers(group).values()}
    groups = [turn.group for turn in turns if isinstance(turn, Choose) and turn.group.name not in settled]
    counted = counting_steps(groups)
    return problem.program.frontier(changing, [*sorted(wanted), *problem.output_nodes], counted)

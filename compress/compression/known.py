"""The original network's rows for every turn of a sweep, kept in one pass; sweeps then run the other network alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compress.compression.problem import KeptPair, Problem
from compress.compression.turns import Filter, Turn
from compress.progress import Progress
from compress.recording.filters import FilterRecorder
from compress.recording.originals import OriginalRecorder, Originals, WholeValues
from compress.recording.record import GroupRecorder, SamplePlan, record_moments

OUTPUTS = "outputs"


class KnownOriginal:
    """What the original network gives where a sweep's turns read it.

    Attributes:
        rectified: whether what further sweeps read is kept too.
        keepers: of the fitting and of the held-back samples, the recorders that keep it.
    """

    def __init__(self, problem: Problem, *, rectified: bool) -> None:
        self.rectified = rectified and problem.ingredients.rectified
        self.keepers: tuple[list[OriginalRecorder], list[OriginalRecorder]] = ([], [])
        self._originals = Originals()
        self._nodes = problem.output_nodes
        needed = 0.0
        readers: list[tuple[tuple[str, str, bool], Sequence[GroupRecorder | FilterRecorder]]] = []
        for turn in problem.turns():
            kinds = {False, self.rectified and bool(problem.rectifiers(turn.read))}
            readers += [(_key(turn, kind), _recorders(problem, turn, kind)) for kind in sorted(kinds)]
        outputs = [
            WholeValues(problem.output_nodes, SamplePlan(stream.count, ()))
            for stream in (problem.fitting, problem.held_back)
        ]
        for _, pair in readers:
            needed += sum(reader.bytes_of_rows(problem.program, problem.state) for reader in pair)
        needed += sum(reader.bytes_of(problem.program) for reader in outputs)
        self.possible = needed <= self._originals.room
        if not self.possible:
            return
        for which, own in enumerate(self.keepers):
            own.extend(self._originals.recorder((key, which), pair[which]) for key, pair in readers)
            own.append(self._originals.recorder((OUTPUTS, which), outputs[which]))

    def rows(self, turn: Turn, *, rectified: bool) -> KeptPair | None:
        """What is kept for a turn; None where nothing is."""
        for kind in (True, False) if rectified else (False,):
            pair = [self._originals.rows((_key(turn, kind), which)) for which in (0, 1)]
            if pair[0] is not None and pair[1] is not None:
                return pair[0], pair[1]
        return None

    def serves(self, turns: Sequence[Turn], *, rectified: bool) -> bool:
        """Whether all that a sweep of these turns reads is kept."""
        ready = self._originals.rows((OUTPUTS, 0)) is not None and (self.rectified or not rectified)
        return ready and all(self.rows(turn, rectified=rectified) is not None for turn in turns)

    def held_back_outputs(self, batch: int) -> dict[str, Tensor] | None:
        """Output node -> its value on a batch of the held-back samples; None where nothing is kept."""
        if self._originals.rows((OUTPUTS, 1)) is None:
            return None
        return dict(zip(self._nodes, self.outputs(1, batch), strict=True))

    def outputs(self, which: int, batch: int) -> list:  # type: ignore[type-arg]
        """Values of the output nodes, in their order, on a batch of the fitting (0) or the held-back samples (1)."""
        kept = self._originals.rows((OUTPUTS, which))
        assert kept is not None, "asked only where everything is kept"
        return kept.read(batch)[0]


def know_original(problem: Problem, *, rectified: bool) -> KnownOriginal | None:
    """What will keep the original's rows; None where they need too much room, or where running it again costs little.

    On an accelerator a pass costs less than the way to the disk and back.
    """
    if problem.device.type != "cpu" or problem.share.count > 1:
        return None
    known = KnownOriginal(problem, rectified=rectified)
    return known if known.possible else None


def keep_original(problem: Problem, progress: Progress, *, rectified: bool = False) -> KnownOriginal | None:
    """What one pass over the original network keeps for a sweep that nothing went before; see `know_original`."""
    known = know_original(problem, rectified=rectified)
    if known is None:
        return None
    for which, stream in enumerate((problem.fitting, problem.held_back)):
        progress.stage("running the original" if not which else "running held-back samples", stream.count)
        recorders = known.keepers[which]
        record_moments(problem.program, recorders, stream.read, stream.sizes(), problem.state, advance=progress.advance)
    return known


def _key(turn: Turn, rectified: bool) -> tuple[str, str, bool]:
    return type(turn).__name__, turn.read.name, rectified


def _recorders(problem: Problem, turn: Turn, rectified: bool) -> Sequence[GroupRecorder | FilterRecorder]:
    if isinstance(turn, Filter):
        return problem.filter_recorders(turn.read, rectified=rectified)
    return problem.recorders(turn.read, targets=True, rectified=rectified)

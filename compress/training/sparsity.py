"""λ for a wanted sparsity: the parameter choice of Shen, Wang, Xu, Yan (2024), algorithms 1 and 2.

At a local minimiser of loss(θ) + Σ_j λ_j‖W_j‖₁ with s nonzeros in layer j, |∂loss/∂w| is λ_j on the nonzeros and
at most λ_j elsewhere. So the sorted |∂loss/∂w| say which λ would let how many weights go: the median of those inside
the bracket is the next λ to try.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError, OutputError, SolverError

Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Minimiser:
    """What training at given λ's ended with: for each layer its nonzeros and all |∂loss/∂w| (flat)."""

    levels: tuple[int, ...]
    forces: tuple[Tensor, ...]
    solution: Any = None


@dataclass(frozen=True)
class Iteration:
    """One training: the brackets (low, high), the λ's tried inside them, the levels (nonzeros) that came."""

    number: int
    brackets: tuple[tuple[float, float], ...]
    penalties: tuple[float, ...]
    levels: tuple[int, ...]
    out_of_tolerance: int
    next_penalties: tuple[float, ...]
    next_brackets: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """The λ's found; `met` says whether the levels are within tolerance. `history` holds every iteration."""

    penalties: tuple[float, ...]
    levels: tuple[int, ...]
    met: bool
    history: tuple[Iteration, ...]
    solution: Any


def iterate(
    number: int,
    brackets: Sequence[tuple[float, float]],
    penalties: Sequence[float],
    minimiser: Minimiser,
    targets: Sequence[int],
    hit: Sequence[bool],
) -> Iteration:
    """One iteration's record: what a training with `penalties` gave, and the brackets and λ's of the next one.

    Args:
        hit: of each target, whether its level is within the tolerance; its λ stays then.
    """
    levels = minimiser.levels
    after = [
        bracket if reached else shrink_bracket(bracket, penalty, level, target)
        for bracket, penalty, level, target, reached in zip(brackets, penalties, levels, targets, hit, strict=True)
    ]
    following = tuple(
        penalty if reached else next_penalty(bracket, forces)
        for bracket, forces, penalty, reached in zip(after, minimiser.forces, penalties, hit, strict=True)
    )
    if len(targets) > 1:
        after = [
            reopened(bracket, penalty, level, target, reached)
            for bracket, penalty, level, target, reached in zip(after, penalties, levels, targets, hit, strict=True)
        ]
    missed = len(hit) - sum(hit)
    return Iteration(number, tuple(brackets), tuple(penalties), levels, missed, following, tuple(after))


def choose_penalties(
    train: Callable[[tuple[float, ...]], Minimiser],
    targets: Sequence[int],
    *,
    low: float,
    high: float,
    tolerance: float = 0.01,
    misses: int = 0,
    most: int = 40,
    journal: str | Path | None = None,
) -> Choice:
    """λ's with which training keeps `targets` nonzeros, to a relative `tolerance`.

    One target: algorithm 1, a single λ over all weights (`train` gets one λ and gives one level). Several: algorithm 2,
    a λ_j for each layer, done when at most `misses` layers are out of tolerance.

    Args:
        train: λ's to a minimiser; must be deterministic in them where a `journal` is to resume it.
        low, high: a λ too small (too many nonzeros) and one too large.
        most: trainings at most; the closest one is given, with `met` false, when they run out.
        journal: a JSON-lines file that every iteration is added to. An existing one of the same targets, bracket and
            tolerance is continued from its last iteration.

    Raises:
        OutputError: the journal belongs to another search or cannot be read or written.
    """
    if not 0 <= low < high:
        raise ValueError(f"`low` and `high` must be 0 ≤ low < high, got {low} and {high}.")
    if not targets or min(targets) < 1:
        raise ValueError(f"`targets` must be positive numbers of weights, got {list(targets)}.")
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must lie in (0, 1), got {tolerance}.")
    header = {"targets": list(targets), "low": low, "high": high, "tolerance": tolerance, "misses": misses}
    history = read_journal(journal, header) if journal is not None else []
    brackets = [(low, high)] * len(targets)
    penalties = tuple((low * high) ** 0.5 if low > 0 else high / 2 for _ in targets)
    if history:
        brackets, penalties = list(history[-1].next_brackets), history[-1].next_penalties
    best: tuple[float, Choice] | None = None
    if history and history[-1].out_of_tolerance <= misses:
        penalties = history[-1].penalties  # finished before: train once more for the solution
        brackets = list(history[-1].brackets)
        history = history[:-1]
    while len(history) < most:
        minimiser = train(penalties)
        if len(minimiser.levels) != len(targets):
            raise ValueError(f"`train` gave {len(minimiser.levels)} levels for {len(targets)} targets.")
        errors = [abs(level - target) / target for level, target in zip(minimiser.levels, targets, strict=True)]
        hit = [error <= tolerance for error in errors]
        record = iterate(len(history) + 1, brackets, penalties, minimiser, targets, hit)
        history.append(record)
        if journal is not None:
            append_line(journal, asdict(record))
        met = record.out_of_tolerance <= misses
        choice = Choice(penalties, minimiser.levels, met, tuple(history), minimiser.solution)
        if choice.met:
            return choice
        if best is None or max(errors) < best[0]:
            best = (max(errors), choice)
        brackets, penalties = list(record.next_brackets), record.next_penalties
    if best is None:
        raise SolverError(f"The search had used its {most} trainings before; give it more, or a wider bracket.")
    chosen = best[1]
    return Choice(chosen.penalties, chosen.levels, False, tuple(history), chosen.solution)


def shrink_bracket(bracket: tuple[float, float], penalty: float, level: int, target: int) -> tuple[float, float]:
    """The side of the bracket that the level reached leaves: too many nonzeros raise its low end."""
    return (penalty, bracket[1]) if level > target else (bracket[0], penalty)


def reopened(bracket: tuple[float, float], penalty: float, level: int, target: int, met: bool) -> tuple[float, float]:
    """A bracket of one layer among several, widened where it has closed: other layers' λ's move its level too."""
    if met or bracket[1] - bracket[0] > 1e-3 * bracket[1]:
        return bracket
    return (penalty, 4 * bracket[1]) if level > target else (bracket[0] / 4, penalty)


def next_penalty(bracket: tuple[float, float], forces: Tensor) -> float:
    """The median of the |∂loss/∂w| inside the bracket, its midpoint where there is none.

    Networks respond to λ's order of magnitude, so the midpoint is the geometric one while the bracket spans more than a
    factor of 4. It also stands in for a median near an end: a training that stopped before its minimum has |∂loss/∂w| a
    little above λ on its nonzeros, and the search would creep.
    """
    low, high = bracket
    wide = high > 4 * low > 0
    middle = (low * high) ** 0.5 if wide else (low + high) / 2
    nearest, farthest = (
        ((low**3 * high) ** 0.25, (low * high**3) ** 0.25) if wide else (0.9 * low + 0.1 * high, 0.1 * low + 0.9 * high)
    )
    inside = forces[(forces > low) & (forces < high)]
    if inside.numel() == 0:
        return middle
    median = float(inside.double().median())
    return median if nearest < median < farthest else middle


def l1_forces(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[int, Tensor]:
    """Nonzeros of the weights, and |∂loss/∂w| of all of them in one vector."""
    level = sum(int(weight.count_nonzero()) for weight in weights)
    return level, torch.cat([gradient.detach().abs().flatten() for gradient in gradients])


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line. Raises OutputError."""
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OutputError(f"Cannot write the journal {str(path)!r}: {error.strerror}.") from None


def read_journal(path: str | Path, header: Mapping[str, Any]) -> list[Iteration]:
    """The iterations of an unfinished search, [] where there is no file (it is begun). A torn last line is left.

    Raises:
        OutputError: it belongs to another search.
    """
    file = Path(path)
    if not file.exists():
        append_line(file, dict(header))
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        if not lines or json.loads(lines[0]) != dict(header):
            raise OutputError(f"The journal {str(path)!r} belongs to another search; remove it or name another one.")
        iterations: list[Iteration] = []
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                file.write_text("".join(good + "\n" for good in lines[: 1 + len(iterations)]), encoding="utf-8")
                break
            brackets, following = (
                tuple((float(low), float(high)) for low, high in entry[key]) for key in ("brackets", "next_brackets")
            )
            iterations.append(
                Iteration(
                    entry["number"], brackets, tuple(entry["penalties"]), tuple(entry["levels"]),
                    entry["out_of_tolerance"], tuple(entry["next_penalties"]), following,
                )
            )  # fmt: skip
    except CompressError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"The journal {str(path)!r} cannot be read: {error}.") from None
    return iterations

"""What went into a run or a training."""

from __future__ import annotations

from dataclasses import dataclass

from compress.report.model.numbers import Count, Plain


@dataclass(frozen=True)
class SourceFile:
    """A checkpoint; `state_key` and `prefix` say where in it the tensors were."""

    file: str
    sha256: str
    dtype: str = ""
    state_key: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class InputUsed:
    """One input of a network: shape of one sample, and dtype."""

    shape: tuple[Count, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class ArchitectureUsed:
    """An architecture and what goes into it.

    Attributes:
        recognised: how it was found.
        batch_size: the one batch size that it runs on; None where any will do.
        further_inputs: after the first.
        call: where they stand among the arguments, as `CallShape.as_plain`; None: one after another.
    """

    spec: str
    arguments: Plain
    input_shape: tuple[Count, ...]
    recognised: str = ""
    input_dtype: str = "float32"
    batch_size: int | None = None
    further_inputs: tuple[InputUsed, ...] = ()
    call: Plain | None = None


@dataclass(frozen=True)
class Samples:
    """Samples that were read. `held_back`: of them, only for checking; `overlap`: of them, also calibrated with."""

    source: str | None
    samples: Count
    fingerprint: str
    held_back: Count = 0
    overlap: Count = 0


@dataclass(frozen=True)
class DataUsed:
    """Samples that a network was calibrated or trained on, and evaluated on; how they were prepared.

    `guards`: of further domains that were calibrated on as well.
    """

    fitting: Samples
    evaluation: Samples | None = None
    preprocessing: Plain | None = None
    guards: tuple[Samples, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """What went in. `checkpoint` is None where a training started from random weights."""

    checkpoint: SourceFile | None
    architecture: ArchitectureUsed
    data: DataUsed
    seed: int
    versions: dict[str, str]

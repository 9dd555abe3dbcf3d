"""Which nn.Module a state dict belongs to: as named by the user, or recognised by parameter names and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import nn

from compress.checkpoint.building.builders import build_architecture, is_known
from compress.checkpoint.building.torchvision_index import classifier_names, names_digest, read_index
from compress.checkpoint.building.without_memory import Bounds
from compress.checkpoint.fitting import check_fit, compare
from compress.checkpoint.inputs import describe_inputs
from compress.checkpoint.parametrisations import in_common_form, plain_state
from compress.checkpoint.reading.read import Checkpoint
from compress.checkpoint.renaming import renamed_state
from compress.checkpoint.suggesting import offer_arguments, read_chain, unknown_message
from compress.data.preprocessing import Preprocessing
from compress.errors import CheckpointError, UnknownArchitectureError, UnsupportedError
from compress.models import REFERENCE_NETS

T = TypeVar("T")
MOST_PREFIX, MOST_PARTS = 3, 200  # pieces of a name that may be a prefix; prefixes that are tried
SHORTEST_NAME, MOST_NAMED = 6, 3  # of timm's models that a file's name may name


@dataclass(frozen=True, eq=False)
class Architecture:
    """A network without weights.

    Attributes:
        spec: "torchvision:vgg19", "compress:vgg19_cifar10", "timm:NAME" or "package.module:factory".
        arguments: its keyword arguments, plain data.
        input_shape: shape of one sample, without the batch; None where it is not known.
        preprocessing: as published with the architecture; None where it is not known.
        how: whether it was named or recognised, in words.
        trusted: whether the user named it, or gave the word for what a file names; only then may its code run.
    """

    spec: str
    arguments: dict[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    how: str = "named"
    trusted: bool = False


def open_architecture(
    checkpoint: Checkpoint, arch: str | None = None, arguments: Mapping[str, object] | None = None
) -> tuple[Checkpoint, Architecture]:
    """The architecture the user named, or the one whose names and shapes are those of the checkpoint, and its tensors.

    A named one is completed from the shapes: the number of classes, and the widths of the project's reference nets.
    Where all names, or those of one part, fit without a common prefix (`model.` of Lightning, `ema_model.`), that part
    is the network.

    Raises:
        UnknownArchitectureError: not named and not recognised, or a name that does not exist.
        CheckpointError: the named architecture does not fit the checkpoint, or two of its parts fit.
    """
    given = dict(arguments or {})
    if arch is None:
        fitting = first_fitting(checkpoint, lambda part: recognise(shapes_of(part), checkpoint.path.name))
        if fitting is None and (recognised := recognise_class(checkpoint, shapes_of(checkpoint))) is not None:
            fitting = checkpoint, recognised
        if fitting is None:
            raise UnknownArchitectureError(unknown_message(checkpoint, shapes_of(checkpoint)))
        checkpoint, (arch, completed, how) = fitting
        if given:
            raise UnknownArchitectureError(
                f"--arch-arg was given without --arch; this file was recognised as --arch {arch}, name it too."
            )
    else:
        checkpoint, completed = fit_named(checkpoint, arch, given)
        how = "named"
    shape, preprocessing = describe_inputs(arch, completed)
    return checkpoint, Architecture(arch, completed, shape, preprocessing, how, trusted=True)


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes by name, computed weights under their plain names."""
    return {name: tuple(tensor.shape) for name, tensor in plain_state(checkpoint.state).items()}


def fit_named(checkpoint: Checkpoint, arch: str, given: dict[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint, or the part of it that fits, and the completed arguments of the architecture the user named."""
    built: dict[str, nn.Module] = {}

    def fit(part: Checkpoint) -> tuple[dict[str, Any], nn.Module] | None:
        completed = complete_arguments(arch, given, shapes_of(part), in_order=part.format != "safetensors")
        key = repr(completed)
        if key not in built:
            numbers = sum(tensor.numel() for tensor in part.state.values())
            built[key] = build_architecture(
                arch,
                completed,
                memory=not is_known(arch),
                trusted=True,
                bounds=Bounds.of_file(numbers, len(part.state)),
            )
        state = in_common_form(built[key], part.state)
        return None if compare(built[key], {name: tuple(tensor.shape) for name, tensor in state.items()}) else (
            completed, built[key]
        )  # fmt: skip

    try:
        fitting = first_fitting(checkpoint, fit)
    except UnsupportedError as error:
        if checkpoint.hyper_parameters and not given:
            raise type(error)(f"{error}{offer_arguments(checkpoint.hyper_parameters)}") from error
        raise
    if fitting is None:
        module = next(iter(built.values()))
        renamed = renamed_state(module, checkpoint.state) if arch.startswith("transformers:") else None
        if renamed is not None:
            fitting = first_fitting(replace(checkpoint, state=renamed), fit)
    if fitting is None:
        check_fit(module, in_common_form(module, checkpoint.state), arch)
        raise CheckpointError(f"The checkpoint does not fit {arch}.")
    return fitting[0], fitting[1][0]


def first_fitting(checkpoint: Checkpoint, fit: Callable[[Checkpoint], T | None]) -> tuple[Checkpoint, T] | None:
    """The checkpoint, or else the one part of it under a prefix of its names that fits; None where none does.

    Raises:
        CheckpointError: two parts fit, and neither says that it is an average (EMA).
    """
    whole = fit(checkpoint)
    if whole is not None:
        return checkpoint, whole
    parts = [(prefix, part) for prefix, part in parts_of(checkpoint)]
    fitting = [(prefix, part, fitted) for prefix, part in parts if (fitted := fit(part)) is not None]
    if len(fitting) > 1:
        fitting = [candidate for candidate in fitting if "ema" in candidate[0].lower()] or fitting
    if len(fitting) > 1:
        names = " and ".join(f"`{prefix}`" for prefix, _, _ in fitting[:4])
        first = fitting[0][0].rstrip(".")
        raise CheckpointError(
            f"{checkpoint.path.name!r} holds the network several times, under {names}; say which: --state-key {first}."
        )
    return (fitting[0][1], fitting[0][2]) if fitting else None


def parts_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """The tensors under each prefix of their names that at least half of the largest such part has, prefix removed."""
    counts: Counter[str] = Counter()
    for name in checkpoint.state:
        pieces = name.split(".")
        counts.update(".".join(pieces[:depth]) + "." for depth in range(1, min(len(pieces), MOST_PREFIX + 1)))
    most = max(counts.values(), default=0)
    for prefix, count in list(counts.items())[:MOST_PARTS]:
        if 2 * count >= most and count > 1:
            state = {
                name.removeprefix(prefix): value for name, value in checkpoint.state.items() if name.startswith(prefix)
            }
            rest = len(checkpoint.state) - count
            ignored = (f"{rest} tensors outside of `{prefix}`: not of the network",) if rest else ()
            yield (
                prefix,
                replace(
                    checkpoint,
                    state=state,
                    module=None,
                    prefix=checkpoint.prefix + prefix,
                    ignored=checkpoint.ignored + ignored,
                ),
            )


def complete_arguments(
    arch: str, given: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], *, in_order: bool = True
) -> dict[str, Any]:
    """The user's arguments, and those that follow from the shapes where the user gave none.

    `in_order`: whether the names stand in the order of the layers, as `torch.save` keeps them.
    """
    scheme, _, name = arch.partition(":")
    if scheme == "chain" and "layers" not in given:
        layers = read_chain(shapes, in_order=in_order)
        if layers is None:
            raise UnknownArchitectureError(
                f"--arch {arch}: the tensors are no plain chain of convolutions and linear layers; name the class that "
                "made them."
            )
        return {**given, "layers": layers}
    if scheme == "compress" and name in REFERENCE_NETS:
        return {**infer_reference(name, shapes), **given}
    if scheme == "torchvision" and name in classifier_names():
        for candidate, arguments, head in read_index().get(names_digest(shapes), []):
            if candidate == name and head in shapes and shapes[head]:
                return {**arguments, "num_classes": shapes[head][0], **given}
    if scheme == "timm" and "num_classes" not in given:
        heads = [key for key in shapes if key.endswith(("head.weight", "fc.weight", "classifier.weight"))]
        if heads and len(shapes[heads[-1]]) in (2, 4):
            return {**given, "num_classes": shapes[heads[-1]][0]}
    return given


def infer_reference(name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of a reference net read off the shapes; none where they cannot be."""
    try:
        return REFERENCE_NETS[name].infer(shapes) or {}
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return {}


def recognise(shapes: Mapping[str, tuple[int, ...]], file_name: str) -> tuple[str, dict[str, Any], str] | None:
    """Spec, arguments and words for the known network with exactly these names and shapes; None if there is none.

    Where several fit, the one whose name is in the file's name, else the first.
    """
    matches: list[tuple[str, dict[str, Any]]] = []
    for name in REFERENCE_NETS:
        arguments = infer_reference(name, shapes)
        if arguments and fits(f"compress:{name}", arguments, shapes):
            matches.append((f"compress:{name}", arguments))
    for name, fixed, head in read_index().get(names_digest(shapes), []):
        if shapes.get(head):
            arguments = {**fixed, "num_classes": shapes[head][0]}
            if fits(f"torchvision:{name}", arguments, shapes):
                matches.append((f"torchvision:{name}", arguments))
    if not matches:
        return recognise_timm(shapes, file_name)
    plain = re.sub(r"[^a-z0-9]", "", file_name.lower())
    hints = [match for match in matches if re.sub(r"[^a-z0-9]", "", match[0].partition(":")[2].lower()) in plain]
    chosen = (hints or matches)[0]
    others = ", ".join(spec for spec, _ in matches if spec != chosen[0])
    words = "recognised by names and shapes" + (f"; {others} would fit too" if others else "")
    return *chosen, words


def recognise_timm(shapes: Mapping[str, tuple[int, ...]], file_name: str) -> tuple[str, dict[str, Any], str] | None:
    """The timm model that the file's name names and whose names and shapes these are; None where there is none.

    Raises:
        UnknownArchitectureError: several fit; models whose names differ in a prefix (`tf_`) compute differently.
    """
    plain = re.sub(r"[^a-z0-9]", "", file_name.lower())
    if len(plain) < SHORTEST_NAME or find_spec("timm") is None:
        return None
    import timm

    known = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in timm.list_models()}
    named = sorted((short for short in known if len(short) >= SHORTEST_NAME and short in plain), key=len)[-MOST_NAMED:]
    ends = {short.removeprefix("tf") for short in named}
    fitting = []
    for name in (name for short, name in known.items() if short.removeprefix("tf") in ends):
        arguments = complete_arguments(f"timm:{name}", {}, shapes)
        if fits(f"timm:{name}", arguments, shapes):
            fitting.append((f"timm:{name}", arguments, "recognised by the file's name, names and shapes"))
    if len(fitting) > 1:
        specs = ", ".join(spec for spec, _, _ in fitting)
        raise UnknownArchitectureError(
            f"{file_name!r} has the names and shapes of {specs}, which compute differently; say which: "
            f"--arch {fitting[0][0]}."
        )
    return fitting[0] if fitting else None


def fits(spec: str, arguments: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the network, built without memory, has exactly these names and shapes."""
    try:
        return not compare(build_architecture(spec, arguments, memory=False), shapes)
    except (UnsupportedError, OverflowError, MemoryError):
        return False


def recognise_class(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, dict[str, Any], str] | None:
    """The class of a trusted pickled module, where it can be built without arguments and fits."""
    if checkpoint.module is None or checkpoint.class_name is None or "<locals>" in checkpoint.class_name:
        return None
    kind = type(checkpoint.module)
    if kind.__module__ == "__main__":
        return None
    spec = f"{kind.__module__}:{kind.__qualname__}"
    try:
        if compare(build_architecture(spec, {}, trusted=True), shapes):
            return None
    except UnsupportedError:
        return None
    return spec, {}, "the class the trusted file names"

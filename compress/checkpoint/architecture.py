"""Which nn.Module a state dict belongs to: as named by the user, or recognised by parameter names and shapes."""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compress.checkpoint.builders import build_architecture, is_known
from compress.checkpoint.parametrisations import in_common_form, plain_state
from compress.checkpoint.read import Checkpoint
from compress.checkpoint.torchvision_index import classifier_names, names_digest, read_index
from compress.data.preprocessing import Preprocessing
from compress.errors import CheckpointError, UnknownArchitectureError, UnsupportedError
from compress.models import REFERENCE_NETS

COUNTER = "num_batches_tracked"
SHOWN_FAULTS = 3


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


def find_architecture(
    checkpoint: Checkpoint, arch: str | None = None, arguments: Mapping[str, object] | None = None
) -> Architecture:
    """The architecture the user named, or the one whose names and shapes are those of the checkpoint.

    A named one is completed from the shapes: the number of classes, and the widths of the project's reference nets.

    Raises:
        UnknownArchitectureError: not named and not recognised, or a name that does not exist.
        CheckpointError: the named architecture does not fit the checkpoint.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in plain_state(checkpoint.state).items()}
    given = dict(arguments or {})
    if arch is not None:
        completed = complete_arguments(arch, given, shapes)
        module = build_architecture(arch, completed, memory=not is_known(arch), trusted=True)
        check_fit(module, in_common_form(module, checkpoint.state), arch)
        how = "named"
    else:
        found = recognise(shapes, checkpoint.path.name) or recognise_class(checkpoint, shapes)
        if found is None:
            raise UnknownArchitectureError(unknown_message(checkpoint, shapes))
        arch, completed, how = found
        if given:
            raise UnknownArchitectureError(
                f"--arch-arg was given without --arch; this file was recognised as --arch {arch}, name it too."
            )
    shape, preprocessing = describe_inputs(arch, completed)
    return Architecture(arch, completed, shape, preprocessing, how, trusted=True)


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state into a module of exactly these names and shapes; BatchNorm's batch counters may be missing.

    Raises:
        CheckpointError: names or shapes differ; the first differences are listed.
    """
    state = in_common_form(module, state)
    check_fit(module, state, type(module).__name__)
    module.load_state_dict(with_versions(module, state), strict=False)


def with_versions(module: nn.Module, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The state with the format versions of the module's own state dict, which some modules refuse to load without."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(module.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    return versioned


def compare(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How a module's tensors differ from the shapes of a state dict, one entry a difference.

    A tensor with several names may stand in the file under any one of them.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if hasattr(tensor, "shape")}
    elsewhere = {name for names in shared_names(module) if any(name in shapes for name in names) for name in names}
    faults = [
        f"`{name}` is {shapes[name]} in the file and {shape} in the network"
        for name, shape in own.items()
        if name in shapes and shapes[name] != shape
    ]
    faults += [
        f"the file lacks `{name}`"
        for name in own
        if name not in shapes and name not in elsewhere and not name.endswith(COUNTER)
    ]
    faults += [f"the network has no `{name}`" for name in shapes if name not in own]
    return faults


def shared_names(module: nn.Module) -> list[list[str]]:
    """The names of every tensor that has several (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        names.setdefault(id(tensor), []).append(name)
    return [known for known in names.values() if len(known) > 1]


def check_fit(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Refuse a state that is not the module's. Raises CheckpointError."""
    faults = compare(module, {key: tuple(tensor.shape) for key, tensor in state.items()})
    if faults:
        more = f"; {len(faults) - SHOWN_FAULTS} more differences" if len(faults) > SHOWN_FAULTS else ""
        raise CheckpointError(f"The checkpoint does not fit {name}: {'; '.join(faults[:SHOWN_FAULTS])}{more}.")


def complete_arguments(arch: str, given: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The user's arguments, and those that follow from the shapes where the user gave none."""
    scheme, _, name = arch.partition(":")
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
        return None
    plain = re.sub(r"[^a-z0-9]", "", file_name.lower())
    hints = [match for match in matches if re.sub(r"[^a-z0-9]", "", match[0].partition(":")[2].lower()) in plain]
    chosen = (hints or matches)[0]
    others = ", ".join(spec for spec, _ in matches if spec != chosen[0])
    words = "recognised by names and shapes" + (f"; {others} would fit too" if others else "")
    return *chosen, words


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


def describe_inputs(spec: str, arguments: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Shape of one sample and the published preprocessing, where known."""
    scheme, _, name = spec.partition(":")
    if scheme == "compress":
        net = REFERENCE_NETS[name]
        shape = net.input_shape(arguments)
        mean, std = net.normalisation.mean, net.normalisation.std
        fitting = len(shape) == 3 and len(mean) in (1, shape[0])
        return shape, Preprocessing(mean=mean, std=std) if fitting else None
    if scheme == "torchvision":
        return describe_torchvision(name)
    if scheme == "timm":
        return describe_timm(name)
    return None, None


def describe_torchvision(name: str) -> tuple[tuple[int, ...], Preprocessing | None]:
    """Input shape and transforms of a torchvision model's default weights (only their description is read)."""
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    side = transforms.crop_size[0]
    preprocessing = Preprocessing(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        resize=transforms.resize_size[0] if len(transforms.resize_size) == 1 else tuple(transforms.resize_size),
        crop=side if len(transforms.crop_size) == 1 else tuple(transforms.crop_size),
        interpolation=transforms.interpolation.value,
    )
    return (3, side, side), preprocessing


def describe_timm(name: str) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Input shape and transforms of a timm model's default weights (only their description is read)."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return None, None
    shape = tuple(config.input_size)
    side = int(shape[-1])
    preprocessing = Preprocessing(
        mean=tuple(config.mean),
        std=tuple(config.std),
        resize=int(side / (config.crop_pct or 1.0)),
        crop=side,
        interpolation="bicubic" if config.interpolation == "bicubic" else "bilinear",
    )
    return shape, preprocessing


def unknown_message(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why no architecture was found, and a complete command that names one."""
    file = shlex.quote(str(checkpoint.path))
    first = [f"{name} {shape}" for name, shape in list(shapes.items())[:2]]
    last = [f"{name} {shape}" for name, shape in list(shapes.items())[-1:]]
    name = (checkpoint.class_name or "Net").rpartition(".")[2]
    trust = " --trust-pickle" if checkpoint.trusted else ""
    key = f" --state-key {checkpoint.state_key}" if checkpoint.state_key else ""
    return (
        f"The architecture of {checkpoint.path.name!r} is not known: its {len(shapes)} tensors ({', '.join(first)}, …, "
        f"{', '.join(last)}) belong to no network of torchvision or compress.models. Put the class that made it into a "
        f"file here, say mynet.py, and name it: compress {file}{trust}{key} --arch mynet:{name} --data folder:train "
        f"(constructor arguments: --arch-arg num_classes=10)."
    )

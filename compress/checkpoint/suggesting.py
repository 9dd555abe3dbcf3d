"""What to say of a state dict whose network is not known: what it is near to, and a complete command to go on with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from compress.checkpoint.building.builders import build_architecture
from compress.checkpoint.building.torchvision_index import names_digest, read_index
from compress.checkpoint.fitting import compare
from compress.checkpoint.reading.read import Checkpoint
from compress.errors import UnsupportedError
from compress.models import REFERENCE_NETS
from compress.models.plain import describe_layers, only_order, read_layers

Shapes = Mapping[str, tuple[int, ...]]
SHOWN = 3
MOST_VARIANTS = 4000
SMALL = 120  # tensors of a file that is compared with the reference nets
SIBLINGS = ("weight", "bias", "running_mean", "running_var")
HEADS = ("fc", "classifier", "head", "classifier.1", "classifier.6", "heads.head", "classifier.3", "head.fc")


def unknown_message(checkpoint: Checkpoint, shapes: Shapes) -> str:
    """Why no architecture was found, and a complete command that names one."""
    file = checkpoint.path.name
    first = [f"{name} {shape}" for name, shape in list(shapes.items())[:2]]
    last = [f"{name} {shape}" for name, shape in list(shapes.items())[-1:]]
    name = (checkpoint.class_name or "Net").rpartition(".")[2]
    trust = " --trust-pickle" if checkpoint.trusted else ""
    key = f" --state-key {checkpoint.state_key}" if checkpoint.state_key else ""
    start = f"compress {shlex.quote(str(checkpoint.path))}{trust}{key}"
    near = nearest(shapes)
    if near is not None:
        spec, faults = near
        more = f"; {len(faults) - SHOWN} more differences" if len(faults) > SHOWN else ""
        return (
            f"The architecture of {file!r} is not known. It looks like {spec}, but {'; '.join(faults[:SHOWN])}{more}. "
            f"Give the file as it was saved, or the class that made it: {start} --arch mynet:{name}."
        )
    layers = read_chain(shapes, in_order=checkpoint.format != "safetensors")
    if layers is not None and checkpoint.class_name is None:
        return f"The architecture of {file!r} is not named in it. {offer_chain(start, layers)}"
    hint = offer_arguments(checkpoint.hyper_parameters)
    return (
        f"The architecture of {file!r} is not known: its {len(shapes)} tensors ({', '.join(first)}, …, "
        f"{', '.join(last)}) belong to no network of torchvision or compress.models. Put the class that made it into a "
        f"file here, say mynet.py, and name it: {start} --arch mynet:{name} and your other options{hint}."
    )


def read_chain(shapes: Shapes, *, in_order: bool = True) -> list[list[Any]] | None:
    """The layers of a plain chain: in the file's order, which a safetensors file has not; else in that of the names.

    Else in the only order that their widths allow.
    """
    sorted_shapes = dict(sorted(shapes.items(), key=lambda pair: natural(pair[0])))
    by_widths = only_order(shapes)
    orders = [shapes if in_order else None, sorted_shapes, by_widths]
    return next((layers for order in orders if order is not None and (layers := read_layers(order))), None)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which `layer10` comes behind `layer9`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def offer_chain(start: str, layers: list[list[Any]]) -> str:
    """What was read off the shapes, and what only the user knows."""
    kinds = {layer[1] for layer in layers}
    said = f"It is a plain chain: {describe_layers(layers)}."
    if "conv" not in kinds:
        return f"{said} If a ReLU stands between them: {start} --arch chain:relu (or gelu, tanh, …)."
    return (
        f"{said} The file does not say where it pools and how it pads; if a ReLU stands between them: {start} --arch "
        "chain:relu --arch-arg padding=1 --arch-arg pool=[1,2], with the numbers of the convolutions that a 2×2 max "
        "pooling follows, or pool=global."
    )


def offer_arguments(hyper_parameters: Mapping[str, Any]) -> str:
    """The file's own constructor arguments, as the command line takes them."""
    plain = [f"{key}={value}" for key, value in hyper_parameters.items() if is_plain(value)]
    if not plain:
        return " (constructor arguments: --arch-arg num_classes=10)"
    shown = " ".join(f"--arch-arg {shlex.quote(argument)}" for argument in plain[:8])
    return f" (the file's hyper_parameters, where its constructor takes them: {shown})"


def is_plain(value: Any) -> bool:
    """Whether a value can be typed."""
    return isinstance(value, (bool, int, float)) or (
        isinstance(value, str) and len(value) <= 40 and value.isprintable()
    )


def nearest(shapes: Shapes) -> tuple[str, list[str]] | None:
    """The known network that the shapes differ from in a few tensors, and the differences; None where none is near."""
    most = max(1, min(8, len(shapes) // 4))
    networks: list[tuple[int, str, list[str]]] = []
    tried: set[str] = set()
    for spec, arguments in candidates(shapes):
        key = f"{spec} {arguments}"
        if key in tried:
            continue
        tried.add(key)
        try:
            faults = compare(build_architecture(spec, arguments, memory=False), shapes)
        except (UnsupportedError, OverflowError, MemoryError):
            continue
        if 0 < len(faults) <= most:
            networks.append((len(faults), spec, faults))
    return min(networks)[1:] if networks else None


def candidates(shapes: Shapes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Known networks with the names of a variant of the shapes: as they are, one tensor less, one tensor more."""
    index = read_index()
    for number, variant in enumerate(variants(shapes)):
        if number > MOST_VARIANTS:
            return
        for name, fixed, head in index.get(names_digest(variant), []):
            classes = {"num_classes": shapes[head][0]} if shapes.get(head) else {}
            yield f"torchvision:{name}", {**fixed, **classes}
        if len(shapes) < SMALL:
            for name, net in REFERENCE_NETS.items():
                try:
                    arguments = net.infer(variant)
                except (KeyError, IndexError, ValueError, ZeroDivisionError):
                    continue
                if arguments:
                    yield f"compress:{name}", arguments


def variants(shapes: Shapes) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes; without each tensor or owner; with each tensor that a module's others suggest, or a head."""
    yield dict(shapes)
    owners: dict[str, set[str]] = {}
    for name in shapes:
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(owner, set()).add(leaf)
        yield {other: shape for other, shape in shapes.items() if other != name}
    for owner, leaves in owners.items():
        yield {other: shape for other, shape in shapes.items() if other.rpartition(".")[0] != owner}
        for leaf in SIBLINGS:
            if leaf not in leaves:
                size = next(shapes[f"{owner}.{sibling}".lstrip(".")] for sibling in leaves)
                yield {**shapes, f"{owner}.{leaf}".lstrip("."): size[:1]}
    for head in HEADS:
        yield {**shapes, f"{head}.weight": (1000, 1), f"{head}.bias": (1000,)}

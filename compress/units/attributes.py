"""Numbers that forward() reads from its modules and that must follow when units are removed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import fx, nn

from compress.graph.atoms import Dimension, dimension_size
from compress.graph.flow import ChannelFlow, Contraction, Touch
from compress.graph.ops import LinearMap
from compress.graph.trace import module_path
from compress.units.groups import AttributeRule

PositionsIn = Callable[[ChannelFlow, Dimension], "np.ndarray | None"]

_OUTPUT_NAMES = (
    "out_channels",
    "out_features",
    "num_features",
    "num_channels",
    "num_parameters",
    "embedding_dim",
    "nf",
)
_INPUT_NAMES = ("in_channels", "in_features", "nx")


def find_attributes(
    flow: ChannelFlow,
    modules: Mapping[str, nn.Module],
    readers: Iterable[Contraction],
    counts: Iterable[Touch],
    places: Mapping[tuple[str, int], np.ndarray],
    positions_in: PositionsIn,
) -> tuple[AttributeRule, ...]:
    """Sizes that the modules which own the shrinking tensors keep as numbers, and counts of groups."""
    rules: dict[tuple[str, str], AttributeRule] = {}
    reads = {contraction.map.weight: contraction.map for contraction in readers}
    for (name, dim), positions in places.items():
        path = name.rpartition(".")[0]
        owner = modules.get(path)
        if owner is None:
            continue
        size = dimension_size(flow.parameters[name][dim])
        per_unit = positions.shape[1]
        reader = reads.get(name)
        reads_it = reader is not None and reader.layout.input_dim == dim
        wanted = _INPUT_NAMES if reads_it else _OUTPUT_NAMES
        if reader is not None and reads_it:
            size, per_unit = size * reader.groups, per_unit * reader.groups
        for attribute in wanted:
            if _integer(owner, attribute) == size:
                rules[path, attribute] = AttributeRule(path, attribute, per_unit)
        shape = getattr(owner, "normalized_shape", None)
        if isinstance(shape, tuple) and dim < len(shape) and shape[dim] == size:
            rules[path, "normalized_shape"] = AttributeRule(path, "normalized_shape", per_unit, dim)
    for touch in counts:
        node, count = touch.node, touch.count
        counted = positions_in(flow, touch.dimension)
        if counted is None:
            continue
        path = module_path(node)
        owner = modules.get(path)
        for attribute in ("groups", "num_groups"):
            if owner is not None and _integer(owner, attribute) == count:
                rules[path, attribute] = AttributeRule(path, attribute, counted.shape[1])
        if owner is not None and isinstance(flow.meaning(node), LinearMap):
            channels = _integer(owner, "in_channels")
            if channels is not None and channels % count == 0:
                rules[path, "in_channels"] = AttributeRule(path, "in_channels", counted.shape[1] * (channels // count))
    return tuple(rules.values())


def counts_its_groups(owner: nn.Module | None, count: int) -> bool:
    """Whether the module is one of torch's own, whose forward() reads its number of groups from an attribute."""
    return (
        owner is not None
        and type(owner).__module__.startswith("torch.nn.modules.")
        and count in (_integer(owner, "groups"), _integer(owner, "num_groups"))
    )


_SIZE_NAME = re.compile(r"head|dim|chan|width|feat|hidden|inner|embed|size|planes|group|split|mid|inter|shape")
_NOT_A_SIZE = re.compile(
    r"window|kernel|patch|stride|pad|layer|depth|index(?!es)|seq|token|position|vocab|max_|grid|img|image|shift|pool|dilat"
)

_NO_NAME = re.compile(r"(?!)")
_PADDING_NAMES = {
    Touch.Padding.INSIDE: _NO_NAME,
    Touch.Padding.BEFORE: re.compile(r"before|left|front|first|low"),
    Touch.Padding.AFTER: re.compile(r"after|right|back|last|high"),
}


def find_shape_attributes(
    modules: Mapping[str, nn.Module],
    shapes: Sequence[Touch],
    positions_in: PositionsIn,
    flow: ChannelFlow,
) -> tuple[tuple[AttributeRule, ...], tuple[AttributeRule, ...], tuple[str, ...]]:
    """Numbers in the modules around a view (or a padding) that equal its sizes: candidates, to be tried.

    Those whose name says so, those with any other name (`h`, `d_k`), and the classes of the modules.
    """
    rules: dict[tuple[str, str, int | None], AttributeRule] = {}
    unnamed: dict[tuple[str, str, int | None], AttributeRule] = {}
    for touch in shapes:
        node, dimension = touch.node, touch.dimension
        wanted = _SIZE_NAME if touch.padding is None else _PADDING_NAMES[touch.padding]
        unwanted = _NOT_A_SIZE if wanted is _SIZE_NAME else _NO_NAME
        sizes: dict[int, int] = {}
        for part in (dimension, *((factor,) for factor in dimension)):
            size = dimension_size(part)
            positions = None if size in sizes else positions_in(flow, part)
            if positions is not None:
                sizes[size] = positions.shape[1]
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple)][-2:]
        for path in paths:
            owner = modules.get(path)
            for name, value in vars(owner).items() if owner is not None else ():
                if name.startswith("_") or unwanted.search(name):
                    continue
                named = bool(wanted.search(name))
                if not named and touch.padding is not None:
                    continue
                entries = enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]
                for index, entry in entries:
                    if isinstance(entry, int) and not isinstance(entry, bool) and entry in sizes:
                        rule = AttributeRule(path, name, sizes[entry], index)
                        (rules if named else unnamed).setdefault((path, name, index), rule)
    classes = {_class_name(touch.node) for touch in shapes}
    others = tuple(rule for key, rule in unnamed.items() if key not in rules)
    return tuple(rules.values()), others, tuple(sorted(classes))


def _class_name(node: fx.Node) -> str:
    entries = list((node.meta.get("nn_module_stack") or {}).values())
    return str(entries[-1][1]) if entries and isinstance(entries[-1], tuple) else ""


def _integer(owner: nn.Module, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

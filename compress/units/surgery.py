"""Cutting units out: a new, smaller network, rebuilt from plain numbers, equal to the masked original."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint.execution import Execution, laid_out_like
from compress.checkpoint.removed import Removed, Replacement, outside
from compress.checkpoint.restoring import named_tensors, restore_shapes, set_attributes, set_tensor
from compress.copying import deep_copy
from compress.errors import SurgeryError, first_line
from compress.graph.ops import Normalisation
from compress.graph.program import Program, run, run_outputs
from compress.graph.steps import Override, Step
from compress.graph.trace import NetworkGraph, output_tensors, trace_network
from compress.measures.outputs import without_masked
from compress.units.groups import UnitGroup

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A smaller network and the plain data that turns a freshly built original into its shape.

    Attributes:
        module: the smaller network; shares no tensor with the original.
        shapes: state-dict name -> new shape, for every tensor that shrank.
        attributes: "path.to.module.attribute" -> new value, a number or a list of numbers.
        removed: path of each module that was taken out -> what stands in its place, as a manifest holds it.
        execution: what is set in its modules besides.
    """

    module: nn.Module
    shapes: dict[str, list[int]]
    attributes: dict[str, Any]
    removed: dict[str, Any] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)


def narrow(
    module: nn.Module,
    kept: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    weights: Mapping[str, Tensor] | None = None,
    replaced: Mapping[str, Replacement] | None = None,
) -> Narrowed:
    """A copy of `module` without the units that are not in `kept` (group name -> indices of kept units).

    `weights` replaces tensors by name, in their original shape; removed positions of them are ignored. `replaced` says
    what stands in the place of modules, by path, that go as a whole, with groups of which no unit is kept. Raises
    ValueError for an unknown or unprunable group, or indices that are not a subset of its units, nonempty but for
    groups in such modules.
    """
    gone = replaced or {}
    chosen = _check_kept(kept, groups, gone)
    masks = kept_positions(module, chosen)
    replacements = dict(weights or {})
    named = named_tensors(module)
    unknown = [name for name in replacements if name not in named]
    if unknown:
        raise ValueError(f"`weights` names tensors that the network does not have: {', '.join(unknown)}.")
    fresh_tensors: dict[int, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, old in outside(named, gone).items():
        if id(old) not in fresh_tensors:
            value = replacements.get(name, old).detach()
            if value.shape != old.shape:
                raise ValueError(
                    f"`weights[{name!r}]` must have the original shape {tuple(old.shape)}, got {tuple(value.shape)}."
                )
            value = value.to(old.device, old.dtype)
            fresh = value
            for dim in range(old.dim()):
                mask = masks.get((name, dim))
                if mask is not None:
                    fresh = fresh.index_select(dim, mask.nonzero()[:, 0].to(value.device))
            fresh = fresh.clone() if fresh is value else fresh
            fresh = laid_out_like(fresh, old)
            fresh_tensors[id(old)] = (
                nn.Parameter(fresh, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else fresh
            )
        if fresh_tensors[id(old)].shape != old.shape:
            shapes[name] = list(fresh_tensors[id(old)].shape)
    left = {id(module.get_submodule(path)): Removed(replacement).eval() for path, replacement in gone.items()}
    result = copy_with(module, {**fresh_tensors, **left})
    attributes = outside(_new_attributes(module, chosen), gone)
    set_attributes(result, attributes)
    return Narrowed(result, shapes, attributes, {path: replacement.as_dict() for path, replacement in gone.items()})


@contextmanager
def new_shapes(module: nn.Module, kept: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> Iterator[None]:
    """Within it the module itself has the narrowed shapes and attributes, its shrunk tensors uninitialised."""
    chosen = _check_kept(kept, groups)
    named = named_tensors(module)
    shapes = {name: list(tensor.shape) for name, tensor in named.items()}
    for (name, dim), mask in kept_positions(module, chosen).items():
        shapes[name][dim] = int(mask.sum())
    shapes = {name: shape for name, shape in shapes.items() if shape != list(named[name].shape)}
    attributes = _new_attributes(module, chosen)
    before = {path: operator.attrgetter(path)(module) for path in attributes}
    try:
        restore_shapes(module, shapes, attributes)
        yield
    finally:
        for name in shapes:
            set_tensor(module, name, named[name])
        set_attributes(module, before)


def verify_narrowed(
    graph: NetworkGraph,
    module: nn.Module,
    kept: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    narrowed: Narrowed,
    inputs: tuple[Tensor, ...],
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
) -> float:
    """Largest relative deviation of the narrowed network from the masked original, on `inputs` and on one sample more.

    The masked original runs the traced graph with the columns of removed units zeroed in every consumer (and with
    `weights`); normalisations over the units take their statistics over the kept ones. Raises SurgeryError above the
    tolerance: 1e-4 in float32, 1e-9 in float64, that of the coarsest where a network mixes them. `dtype` computes in
    another precision; a forward() that itself names a precision is then compared through a graph of the narrowed
    network.
    """
    chosen = _check_kept(kept, groups, narrowed.removed)
    state = {name: tensor.detach() for name, tensor in named_tensors(module).items()}
    state.update({name: tensor.detach() for name, tensor in (weights or {}).items()})
    smaller = narrowed.module
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)
        smaller = deep_copy(smaller).to(dtype)
    kinds = {dtype} if dtype is not None else {value.dtype for value in state.values() if value.is_floating_point()}
    limit = tolerance if tolerance is not None else max((TOLERANCES.get(kind, 1e-2) for kind in kinds), default=1e-4)
    batches = [inputs]
    if graph.batch_size is None:
        batches.append(tuple(_with_another(value) if value.dim() else value for value in inputs))
    else:
        batches = [tuple(_to_batch(value, graph.batch_size) for value in inputs)]
    worst = 0.0
    program, traced = Program.of(graph), None
    for batch in batches:
        wanted = masked_outputs(program, state, kept, chosen.groups, batch)
        try:
            deviation = relative_deviation(wanted, module_outputs(smaller, batch))
        except RuntimeError as fault:
            if dtype is None:
                raise SurgeryError(f"The narrowed network does not run: {first_line(fault)}") from fault
            deviation = float("inf")
        if deviation > limit and dtype is not None:  # its forward() may name a precision: compare its graph instead
            traced = traced or Program.of(trace_network(narrowed.module, graph.examples))
            tensors = {name: tensor.detach() for name, tensor in named_tensors(smaller).items()}
            deviation = relative_deviation(wanted, run_outputs(traced, tensors, batch))
        worst = max(worst, deviation)
    if not worst <= limit:
        raise SurgeryError(
            f"The narrowed network deviates from the masked original by {worst:.2e}, more than {limit:.0e} allowed."
        )
    return worst


def masked_outputs(
    program: Program,
    state: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    inputs: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    """Outputs of the original program with removed units masked: what a narrowed network must reproduce."""
    masked, override = mask_units(program, state, kept, groups)
    return run_outputs(program, masked, inputs, override=override)


def masked_values(
    program: Program,
    state: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    groups: Sequence[UnitGroup],
    inputs: tuple[Tensor, ...],
    wanted: Iterable[str],
) -> dict[str, Tensor]:
    """Values by name in the original program with removed units masked."""
    masked, override = mask_units(program, state, kept, groups)
    with torch.no_grad():
        return {name: values[0] for name, values in run(program, (masked,), inputs, wanted, override=override).items()}


def mask_units(
    program: Program, state: Mapping[str, Tensor], kept: Mapping[str, Tensor], groups: Sequence[UnitGroup]
) -> tuple[dict[str, Tensor], dict[str, Override]]:
    """The state with removed units' columns at zero in every consumer, and the steps that count kept units alone."""
    masked = dict(state)
    removed = {group.name: _removed(kept[group.name], group.unit_count) for group in groups if group.name in kept}
    cloned: set[str] = set()
    for group in groups:
        if group.name not in removed:
            continue
        gone = removed[group.name]
        dims = {(consumer.weight, consumer.layout.input_dim) for consumer in group.consumers}
        for part in group.slices:
            original = program.network.aliases.get(part.name, part.name)
            if (original, part.dim) in dims:
                if part.name not in cloned:
                    masked[part.name] = masked[part.name].clone()
                    cloned.add(part.name)
                masked[part.name].index_fill_(part.dim, part.positions[gone].flatten().to(masked[part.name].device), 0)
    return masked, statistics_over_kept(kept, groups)


def statistics_over_kept(kept: Mapping[str, Tensor], groups: Sequence[UnitGroup]) -> dict[str, Override]:
    """The normalisations over units of which some went, as steps that count the kept ones alone.

    Args:
        kept: group name -> units (m,) that stay; groups without an entry keep all.
    """
    statistics: dict[str, dict[int, Tensor]] = {}
    norms: dict[str, Normalisation | None] = {}
    for group in groups:
        gone = _removed(kept[group.name], group.unit_count) if group.name in kept else None
        if gone is None or not gone.any() or gone.all():  # over nothing there is none, and nobody reads it
            continue
        for statistic in group.statistics:
            keep = statistics.setdefault(statistic.node, {}).setdefault(
                statistic.dim, torch.ones(statistic.size, dtype=torch.bool)
            )
            keep[statistic.positions[gone].flatten()] = False
            norms[statistic.node] = statistic.normalisation
    return {name: _over_kept(masks, norms[name]) for name, masks in statistics.items()}


def _over_kept(masks: dict[int, Tensor], norm: Normalisation | None) -> Override:
    """The step's operation on the kept positions only; the removed ones of its result are zero."""

    def call(step: Step, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        source = arguments[0]
        device = source.device
        kept = {dim: mask.nonzero()[:, 0].to(device) for dim, mask in masks.items()}
        rank = source.dim()

        def select(value: Any, first: int) -> Any:
            if not isinstance(value, Tensor):
                return value
            for dim, index in kept.items():
                at = dim - first
                if 0 <= at < value.dim() and value.shape[at] == len(masks[dim]):
                    value = value.index_select(at, index)
            return value

        small = select(source, 0)
        rest = list(arguments[1:])
        if norm is None:
            return step.target(small, *rest, **keywords)
        first = rank - len(rest[0]) if norm.sizes else 1
        sizes = list(small.shape[first:]) if norm.sizes else rest[0]
        given = {name: select(value, first) for name, value in keywords.items()}
        output = step.target(small, sizes, *(select(value, first) for value in rest[1:]), **given)
        for dim, index in kept.items():
            shape = list(output.shape)
            shape[dim] = source.shape[dim]
            grown = torch.zeros(shape, dtype=output.dtype, device=device)
            output = grown.index_copy(dim, index, output)
        return output

    return call


def module_outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Flattened outputs of a module in evaluation mode, without gradients; the module is left in that mode."""
    module.eval()
    with torch.no_grad():
        return output_tensors(module(*(value.clone() for value in inputs)))


def relative_deviation(wanted: Sequence[Any], got: Sequence[Any]) -> float:
    """max |wanted − got| / max |wanted| over the outputs' tensors, the worst of them; infinite where shapes differ."""
    expected = [value for value in wanted if isinstance(value, Tensor) and value.is_floating_point()]
    outputs = [value for value in got if isinstance(value, Tensor) and value.is_floating_point()]
    if len(expected) != len(outputs) or any(a.shape != b.shape for a, b in zip(expected, outputs, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, outputs, strict=True):
        if a.numel() == 0:
            continue
        first, second = without_masked(a.double(), b.double())
        difference, scale = float((first - second).abs().max()), float(first.abs().max())
        ratio = difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
        worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst


def kept_positions(module: nn.Module, chosen: _Chosen) -> dict[tuple[str, int], Tensor]:
    """(state-dict name, dim) -> boolean mask of the positions that stay."""
    named = named_tensors(module)
    masks: dict[tuple[str, int], Tensor] = {}
    for group in chosen.groups:
        gone = _removed(chosen.kept[group.name], group.unit_count)
        for part in group.slices:
            mask = masks.setdefault(
                (part.name, part.dim), torch.ones(named[part.name].shape[part.dim], dtype=torch.bool)
            )
            mask[part.positions[gone].flatten()] = False
    return masks


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The groups that are cut, and the units (m,) of each that stay, by name."""

    groups: tuple[UnitGroup, ...]
    kept: dict[str, Tensor]


def _check_kept(
    kept: Mapping[str, Tensor], groups: Sequence[UnitGroup], removed: Mapping[str, object] | None = None
) -> _Chosen:
    by_name = {group.name: group for group in groups}
    chosen: list[UnitGroup] = []
    checked: dict[str, Tensor] = {}
    for name, indices in kept.items():
        group = by_name.get(name)
        if group is None:
            raise ValueError(
                f"`kept` names the group {name!r}; the network's groups are {', '.join(by_name) or 'none'}."
            )
        if not group.prunable:
            raise ValueError(f"The group {name!r} cannot be cut: {group.skip_reason}.")
        values = torch.as_tensor(indices, dtype=torch.int64).cpu()
        if values.dim() == 1 and not len(values) and _lies_in(group, removed or {}):
            chosen.append(group)
            checked[name] = values
            continue
        if values.dim() != 1 or not len(values) or len(set(values.tolist())) != len(values):
            raise ValueError(f"`kept[{name!r}]` must be a nonempty vector of distinct unit indices.")
        if int(values.min()) < 0 or int(values.max()) >= group.unit_count:
            raise ValueError(
                f"`kept[{name!r}]` must lie in 0…{group.unit_count - 1}, got {int(values.min())}…{int(values.max())}."
            )
        if group.blocks > 1:
            counts = torch.bincount(values * group.blocks // group.unit_count, minlength=group.blocks)
            if int(counts.min()) != int(counts.max()):
                raise ValueError(f"`kept[{name!r}]` must keep equally many units in each of {group.blocks} blocks.")
        chosen.append(group)
        checked[name] = values
    return _Chosen(tuple(chosen), checked)


def _lies_in(group: UnitGroup, removed: Mapping[str, object]) -> bool:
    """Whether all that reads the group's units lies in modules that are taken out."""
    return not outside({consumer.weight: None for consumer in group.consumers}, removed)


def _removed(kept: Tensor, count: int) -> Tensor:
    gone = torch.ones(count, dtype=torch.bool)
    gone[torch.as_tensor(kept).cpu()] = False
    return gone


def _new_attributes(module: nn.Module, chosen: _Chosen) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for group in chosen.groups:
        lost = group.unit_count - len(chosen.kept[group.name])
        if lost == group.unit_count:
            continue  # what reads its numbers is taken out with it
        for rule in group.attributes:
            if rule.path not in values:
                value = getattr(module.get_submodule(rule.module), rule.name)
                values[rule.path] = list(value) if isinstance(value, (tuple, list)) else value
            if rule.index is None:
                values[rule.path] -= rule.per_unit * lost
            else:
                values[rule.path][rule.index] -= rule.per_unit * lost
    return values


def copy_with(module: nn.Module, replaced: Mapping[int, Tensor | nn.Module]) -> nn.Module:
    """A deep copy in which tensors and modules (by id) are replaced.

    Dictionaries with `cache` in their name are emptied in the copy: what they hold was computed from old weights.
    """
    memo: dict[int, Any] = dict(replaced)
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, dict) and "cache" in name:
                memo[id(value)] = type(value)()
    return deep_copy(module, memo)


def _with_another(value: Tensor) -> Tensor:
    """A batch with one sample more: the first with its numbers in reverse.

    Of whole numbers the last once more: each column may have a table of its own.
    """
    return torch.cat([value, value[:1].flip(-1) if value.is_floating_point() else value[-1:]])


def _to_batch(value: Tensor, size: int) -> Tensor:
    if not value.dim() or len(value) == size:
        return value
    return torch.cat([value] * -(-size // len(value)))[:size]

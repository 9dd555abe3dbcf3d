"""Which blocks can go as a whole: what a sum behind them adds is a constant once an inner group has no unit left.

A linear map all of whose input channels are gone gives its bias, whatever the network is given. Where nothing but that
constant, scaled and shifted, reaches an addition, everything that was computed for it alone is superfluous: the
convolutions of a residual block, an MLP, an attention. Its modules are taken out of the network; the last of them gives
the constant, the others an empty tensor, so that the forward pass is the original's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.checkpoint.removed import Replacement
from compress.errors import CompressError, SurgeryError
from compress.graph.meaning import meaning_of_step
from compress.graph.ops import Identity, Rearrangement, Sum
from compress.graph.program import Program
from compress.graph.steps import InputLeaf, Read, Step
from compress.units.groups import Consumer, UnitGroup
from compress.units.network import Network
from compress.units.surgery import (
    TOLERANCES,
    masked_outputs,
    masked_values,
    module_outputs,
    narrow,
    relative_deviation,
)

SAME = 1e-5  # relative deviation along a dimension within which a value is taken for constant along it
_FAULTS = (CompressError, RuntimeError, ValueError, TypeError, IndexError, AttributeError, StopIteration)


@dataclass(frozen=True, eq=False)
class Branch:
    """A block that can go as a whole.

    Attributes:
        end: the group without whose units the block gives a constant.
        groups: names of all groups that go with it, front to back; `end` is one of them.
        nodes: what is computed for the block alone.
        modules: paths of the modules that are taken out, outermost ones, in order of execution.
        constants: of those the ones that give the constant -> the value that it takes.
        outputs: of those that give a tuple -> its length.
        spread: whether the modules give tensors of full extent: a sum is written into them, or a view asks for it.
    """

    end: str
    groups: tuple[str, ...]
    nodes: frozenset[str]
    modules: tuple[str, ...]
    constants: Mapping[str, str]
    outputs: Mapping[str, int]
    spread: bool = False

    @property
    def name(self) -> str:
        """The path that all its modules share, or their paths."""
        if len(self.modules) == 1:
            return self.modules[0]
        shared: list[str] = []
        for parts in zip(*(path.split(".") for path in self.modules), strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        ends = [".".join(path.split(".")[len(shared) :]) for path in self.modules]
        return f"{'.'.join(shared)} ({', '.join(ends)})".strip()

    def holds(self, tensor: str) -> bool:
        """Whether a state tensor goes with the block."""
        return any(tensor.startswith(f"{path}.") for path in self.modules)


def find_branches(network: Network, groups: Sequence[UnitGroup]) -> tuple[Branch, ...]:
    """The blocks that can go as a whole, front to back; no two share a group.

    Each was taken out of a copy, which gave what the original gives without the block's units.

    Args:
        groups: those that may lose units; a block with units of any other group stays.
    """
    allowed = {group.name for group in groups if group.prunable and not group.coupled}
    drafts: dict[frozenset[str], Branch] = {}
    for group in network.groups:
        if group.name in allowed:
            draft = draft_branch(network, group, allowed)
            if draft is not None:
                ends = frozenset(draft.constants.values())
                before = drafts.get(ends)
                if before is None or len(draft.nodes) >= len(before.nodes):
                    drafts[ends] = draft  # of several groups in a row the last one: its own constant is the branch's
    apart: list[Branch] = []
    for draft in sorted(drafts.values(), key=lambda draft: len(draft.nodes)):  # blocks rather than what holds several
        if not any(set(draft.groups) & set(other.groups) or draft.nodes & other.nodes for other in apart):
            apart.append(draft)
    order = {group.name: place for place, group in enumerate(network.groups)}
    return try_branches(network, sorted(apart, key=lambda draft: order[draft.end]))


def draft_branch(network: Network, group: UnitGroup, allowed: set[str]) -> Branch | None:
    """The block that gives a constant without a group's units, untried; None where there is none."""
    program = network.program
    ends = [consumer.node for consumer in group.consumers if reads_all(network, consumer)]
    ends = [node for node in ends if reached_sums(program, [node])]
    added = reached_sums(program, ends)
    if not added:
        return None
    known = {step.name for step in program.steps}
    left = program.upstream(program.outputs, added)
    nodes = frozenset((program.upstream(program.outputs) - left) & known)
    if not nodes.issuperset(consumer.node for consumer in group.consumers):
        return None
    inner = [
        member
        for member in network.groups
        if member.consumers and nodes.issuperset(consumer.node for consumer in member.consumers)
    ]
    going = [member for member in inner if member.prunable and not member.coupled]
    if any(member.name not in allowed for member in going):
        return None  # it holds a layer that is to stay
    modules = whole_modules(network, nodes)
    constants: dict[str, str] = {}
    for value in added:
        givers = giving_modules(program, value, ends, modules)
        if not givers:
            return None
        constants.update(givers)
    paths = tuple(dict.fromkeys(modules.values()))
    written = any(writes_into(program, value) for value in added)
    if written and not all(same_extents(program, nodes, value) for value in added):
        return None
    branch = Branch(group.name, tuple(member.name for member in going), nodes, paths, constants, {}, written)
    weights = {consumer.weight for member in going for consumer in member.consumers}
    return branch if all(branch.holds(weight) for weight in weights) else None


def reads_all(network: Network, consumer: Consumer) -> bool:
    """Whether the group's units are all that the consumer reads."""
    dim = consumer.layout.input_dim
    channels = network.state[consumer.weight].shape[dim] * (consumer.groups if dim else 1)
    return len(set(consumer.positions.flatten().tolist())) == channels


def reached_sums(program: Program, ends: Sequence[str]) -> list[str]:
    """Values that depend on the constants `ends` alone and are added to others; none where anything else reads one.

    Each is one side of an addition, whose other side has the sum's extents.
    """
    constant = set(ends)
    moving = {name for name, leaf in program.leaves.items() if isinstance(leaf, InputLeaf)}
    added: dict[str, None] = {}
    sizes: set[str] = set()  # they say nothing of what is in a tensor
    for step in program.steps:
        if step.name in ends:
            continue
        constants = [name for name in step.inputs if name in constant]
        if constants and sizes.intersection(step.inputs) and not only_reshapes(program, step):
            return []
        if any(name in moving for name in step.inputs):
            if constants and not is_sum(program, step, constants):
                return []
            added.update(dict.fromkeys(constants))
            (sizes if is_number(program, step.name) else moving).add(step.name)
        elif constants:
            constant.add(step.name)
    return [] if any(name in constant for name in program.outputs) else list(added)


def is_sum(program: Program, step: Step, constants: Sequence[str]) -> bool:
    """Whether a step adds one constant to one value of the result's extents."""
    meaning = meaning_of_step(program, step.name)
    if not isinstance(meaning, Sum) or meaning.factor <= 0 or len(step.inputs) != 2 or len(constants) != 1:
        return False
    (other,) = (name for name in step.inputs if name != constants[0])
    return program.shape(other) == program.shape(step.name) == program.shape(constants[0])


def writes_into(program: Program, value: str) -> bool:
    """Whether the sum that reads a value is written into it: it must then have the sum's extents."""
    for step in program.readers.get(value, ()):
        node = program.nodes[step.name]
        first = step.args[0] if step.args else None
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and isinstance(first, Read) and first.name == value:
            return True
    return False


def same_extents(program: Program, nodes: frozenset[str], value: str) -> bool:
    """Whether a block's value is as large as all that the block reads, along all dimensions but at most one."""
    entering = {
        name
        for step in program.steps
        if step.name in nodes
        for name in step.inputs
        if name not in nodes and program.tensor(name) is None
    }
    wanted = program.shape(value)
    shapes = [program.shape(name) for name in entering if isinstance(program.nodes[name].meta.get("val"), Tensor)]
    return all(
        len(shape) == len(wanted) and sum(size != other for size, other in zip(shape, wanted, strict=True)) <= 1
        for shape in shapes
    )


def whole_modules(network: Network, nodes: frozenset[str]) -> dict[str, str]:
    """Value -> the outermost module that computes it and nothing that is not in `nodes`; in order of execution."""
    program = network.program
    known = {path for path, _ in network.module.named_modules(remove_duplicate=False)}
    needed = program.upstream(program.outputs)
    inside: dict[str, bool] = {}
    paths: dict[str, list[str]] = {}
    for step in program.steps:
        if step.name not in needed:
            continue
        node = program.nodes.get(step.name.partition("@")[0])
        stack = {} if node is None else node.meta.get("nn_module_stack") or {}
        entries = [str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
        paths[step.name] = [path for path in entries if path in known]  # the exporter has names of its own, too
        for path in paths[step.name]:
            inside[path] = inside.get(path, True) and step.name in nodes
    whole_of: dict[str, str] = {}
    for name, around in paths.items():
        whole = next((path for path in around if path and inside[path]), None)
        if whole is not None:
            whole_of[name] = whole
    return whole_of


def only_reshapes(program: Program, step: Step) -> bool:
    """Whether a step takes numbers as extents alone."""
    return isinstance(meaning_of_step(program, step.name), Identity | Rearrangement)


def is_number(program: Program, name: str) -> bool:
    """Whether a value is a number and no tensor."""
    node = program.nodes.get(name)
    return node is not None and isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


def giving_modules(
    program: Program, value: str, ends: Sequence[str], modules: Mapping[str, str]
) -> dict[str, str] | None:
    """The modules that a constant comes from -> the values that they give; None where one comes from no module."""
    if value in modules:
        return {modules[value]: value}
    if value in ends:
        return None
    giving: dict[str, str] = {}
    step = program.by_name.get(value)
    for name in () if step is None else step.inputs:
        of_input = {} if is_number(program, name) else giving_modules(program, name, ends, modules)
        if of_input is None:
            return None
        giving.update(of_input)
    return giving


def replacements(
    network: Network, branches: Iterable[Branch], kept: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Replacement]:
    """Module path -> what stands in its place, for the blocks that go.

    Args:
        kept: group name -> units that stay; none of the blocks' groups.
        weights: new tensors by state name, in their original shape.

    Raises:
        SurgeryError: what a block gives is no constant.
    """
    going = tuple(branches)
    if not going:
        return {}
    state = {**network.state, **weights}
    wanted = {value for branch in going for value in branch.constants.values()}
    values = masked_values(network.program, state, kept, network.groups, network.examples, wanted)
    in_place_of: dict[str, Replacement] = {}
    for branch in going:
        stay = staying_outputs(network, branch, kept)
        constants = {path: left_of(constant_part(values[value]), stay) for path, value in branch.constants.items()}
        rank, given = next((tensor.dim(), tensor) for tensor in constants.values())
        along = (
            tuple(dim for dim in range(rank) if given.shape[dim] == 1 or given.numel() == 1) if branch.spread else ()
        )
        for path in branch.modules:
            in_place_of[path] = Replacement(constants.get(path), along, branch.outputs.get(path, 0))
    return in_place_of


def staying_outputs(network: Network, branch: Branch, kept: Mapping[str, Tensor]) -> list[Tensor]:
    """(C,) which channels that a block's maps make stay, for each that makes units of a stream which loses some."""
    made = {
        (consumer.weight, consumer.layout.output_dim)
        for group in network.groups
        if group.name in branch.groups
        for consumer in group.consumers
    }
    masks: dict[tuple[str, int], Tensor] = {}
    for group in network.groups:
        if group.name in branch.groups or group.name not in kept:
            continue
        gone = torch.ones(group.unit_count, dtype=torch.bool)
        gone[kept[group.name].cpu()] = False
        for part in group.slices:
            place = part.name, part.dim
            if place in made:
                stays = torch.ones(network.state[part.name].shape[part.dim], dtype=torch.bool)
                masks.setdefault(place, stays)[part.positions[gone].flatten()] = False
    return list(masks.values())


def left_of(value: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """A constant at the channels that stay, by the mask that is as long."""
    for dim, size in enumerate(value.shape):
        for mask in masks:
            if size == len(mask) > 1:
                return value.index_select(dim, mask.nonzero()[:, 0].to(value.device))
    return value


def constant_part(value: Tensor) -> Tensor:
    """A value with extent 1 along what it is constant along: all dimensions but at most one. Raises SurgeryError."""
    scale = value.abs().max()
    for dim in range(value.dim()):
        first = value.narrow(dim, 0, 1)
        if bool(((value - first).abs() <= SAME * scale).all()):
            value = first
    if sum(size > 1 for size in value.shape) > 1:
        raise SurgeryError(f"A block without units gives no constant, but values of shape {tuple(value.shape)}.")
    return value.clone()


def try_branches(network: Network, drafts: Sequence[Branch]) -> tuple[Branch, ...]:
    """Those of the drafts that can be taken out of the network, together."""
    shaped = with_outputs(network, drafts)

    def search(branches: Sequence[Branch]) -> tuple[Branch, ...]:
        if not branches or goes_well(network, branches):
            return tuple(branches)
        middle = len(branches) // 2
        if middle:
            return (*search(branches[:middle]), *search(branches[middle:]))
        full = [replace(branch, spread=True) for branch in branches if not branch.spread]
        return tuple(full) if full and goes_well(network, full) else ()

    return search(shaped)


def with_outputs(network: Network, drafts: Sequence[Branch]) -> list[Branch]:
    """The drafts with the lengths of the tuples that their modules give; without those that give anything else."""
    lengths_of: dict[str, int | None] = {}

    def note(path: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            lengths_of[path] = output_length(output)

        return hook

    hooks = [
        network.module.get_submodule(path).register_forward_hook(note(path))  # type: ignore[arg-type]
        for draft in drafts
        for path in draft.modules
    ]
    try:
        with torch.no_grad():
            network.module(*network.examples)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = {path: length for path, length in lengths_of.items() if length}
    return [
        replace(draft, outputs={path: lengths[path] for path in draft.modules if path in lengths})
        for draft in drafts
        if all(lengths_of.get(path) is not None for path in draft.modules)
    ]


def output_length(output: object) -> int | None:
    """0 for a tensor, the length of a tuple whose first entry is one; None for anything else."""
    if isinstance(output, Tensor):
        return 0
    return len(output) if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else None


def goes_well(network: Network, branches: Sequence[Branch]) -> bool:
    """Whether a copy without the blocks gives what the network gives without their units."""
    kept = {name: torch.empty(0, dtype=torch.int64) for branch in branches for name in branch.groups}
    try:
        replaced = replacements(network, branches, kept, {})
        narrowed = narrow(network.module, kept, network.groups, replaced=replaced)
        got = module_outputs(narrowed.module, network.examples)
        wanted = masked_outputs(network.program, network.state, kept, network.groups, network.examples)
    except _FAULTS:
        return False
    return relative_deviation(wanted, got) <= TOLERANCES.get(network.examples[0].dtype, TOLERANCES[torch.float32])


def removed_branches(branches: Iterable[Branch], widths: Mapping[str, int]) -> tuple[Branch, ...]:
    """The blocks of whose end no unit stays.

    Args:
        widths: group name -> units that stay.
    """
    return tuple(branch for branch in branches if widths.get(branch.end, 1) == 0)

"""A traced graph as a program of functional steps, and the one interpreter that runs it.

The same program runs in several networks at once that differ in some of their tensors (a network and its compressed
copy, or many cuts of one): whatever lies upstream of the first difference is computed once. A pass may start from
values that are known, and some steps may be computed in another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from compress.errors import TraceError
from compress.graph.fusing import STRICT, Joint, channels_together, compute_jointly, find_joints, takes_any_layout
from compress.graph.ops import traced_shape
from compress.graph.steps import ConstantLeaf, InputLeaf, Leaf, Override, Read, Step, TensorLeaf, Value
from compress.graph.trace import NetworkGraph
from compress.measures.outputs import named_outputs


@dataclass(frozen=True, eq=False)
class Program:
    """A graph as a list of functional steps: what operations changed in place are values of their own.

    Attributes:
        steps: in execution order.
        leaves: name -> what is given.
        outputs: names of the values that hold the tensors that the network returns, in flattened order.
    """

    network: NetworkGraph
    steps: tuple[Step, ...]
    leaves: dict[str, Leaf]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, network: NetworkGraph) -> Program:
        """Program of a traced network. Raises TraceError where an operation writes to what cannot be followed."""
        builder = _Builder(network)
        for node in network.graph.nodes:
            builder.add(node)
        outputs = tuple(
            builder.present(node)
            for node in network.outputs
            if node is not None and isinstance(node.meta.get("val"), Tensor)
        )
        return cls(network, tuple(builder.steps), builder.leaves, outputs)

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The graph's nodes by name."""
        return {node.name: node for node in self.network.graph.nodes}

    @cached_property
    def by_name(self) -> dict[str, Step]:
        """The steps by name."""
        return {step.name: step for step in self.steps}

    @cached_property
    def readers(self) -> dict[str, tuple[Step, ...]]:
        """Name of a value -> the steps that read it, in execution order."""
        steps_of: dict[str, list[Step]] = {}
        for step in self.steps:
            for name in step.inputs:
                steps_of.setdefault(name, []).append(step)
        return {name: tuple(steps) for name, steps in steps_of.items()}

    @cached_property
    def joints(self) -> tuple[Joint, ...]:
        """Steps that may be computed at once."""
        return find_joints(self.steps, self.readers, self.outputs)

    @cached_property
    def takes_any_layout(self) -> bool:
        """Whether its images may lie in memory as convolutions have them fastest."""
        return takes_any_layout(self.steps)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: traced_shape(node) for name, node in self.nodes.items() if isinstance(node.meta.get("val"), Tensor)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """Traced shape of a value; the batch, where it is symbolic, has its traced size."""
        return self._shapes[name.partition(_AGAIN)[0]]

    def computed(self) -> int:
        """Elements of all tensors that the traced batch computes, views counted in."""
        return sum(math.prod(shape) for name, shape in self._shapes.items() if name not in self.leaves)

    def largest(self) -> int:
        """Elements of the largest tensor that the traced batch computes."""
        return max((math.prod(shape) for name, shape in self._shapes.items() if name not in self.leaves), default=0)

    def tensor(self, name: str) -> str | None:
        """State name of the tensor that a leaf holds; None for any other value."""
        leaf = self.leaves.get(name)
        return leaf.name if isinstance(leaf, TensorLeaf) else None

    def downstream(self, tensors: Iterable[str], steps: Collection[str] = ()) -> set[str]:
        """Names of the values that depend on one of the named state tensors or steps, these included."""
        wanted = set(tensors)
        dirty = {name for name, leaf in self.leaves.items() if isinstance(leaf, TensorLeaf) and leaf.name in wanted}
        for step in self.steps:
            if step.name in steps or any(name in dirty for name in step.inputs):
                dirty.add(step.name)
        return dirty

    def upstream(self, names: Iterable[str], known: Iterable[str] = ()) -> set[str]:
        """Names of the values needed to compute `names` when the values in `known` are given."""
        needed, given = set(names), set(known)
        for step in reversed(self.steps):
            if step.name in needed and step.name not in given:
                needed.update(step.inputs)
        return needed - given

    def reads_input(self, names: Iterable[str], known: Iterable[str] = ()) -> bool:
        """Whether computing `names` takes the network's inputs when the values in `known` are given."""
        return any(isinstance(self.leaves.get(name), InputLeaf) for name in self.upstream(names, known))

    def frontier(self, changing: Iterable[str], wanted: Iterable[str], steps: Collection[str] = ()) -> tuple[str, ...]:
        """Values that a later pass for `wanted` can start from when only what is named will differ.

        Args:
            changing: state tensors; `steps`: names of those that will be computed otherwise.
        """
        moving = self.downstream(changing, steps)
        needed = self.upstream(wanted)
        border = {
            name
            for step in self.steps
            if step.name in needed and step.name in moving
            for name in step.inputs
            if name not in moving and name in self.by_name
        }
        border.update(name for name in wanted if name not in moving and name in self.by_name)
        return tuple(step.name for step in self.steps if step.name in border)


def run(
    program: Program,
    states: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    wanted: Iterable[str],
    *,
    start: Mapping[str, tuple[Value, ...]] | None = None,
    override: Mapping[str, Override] | None = None,
    fast: bool = False,
) -> dict[str, tuple[Value, ...]]:
    """Values of the nodes `wanted` in n networks that share one graph, for one batch; each as a tuple of n.

    What depends on no tensor in which two networks differ (not the same object in their states) is computed once and is
    the same object in both. Values are freed after their last use. No input and no state is written to, whatever the
    network does in place. Weights in another precision than the traced ones take the precisions and constants that are
    written down in the graph along.

    Args:
        states: state name -> tensor, of each network.
        inputs: the batch; not read where `start` makes it unnecessary.
        start: values already known, by name; what lies in front of them alone is not computed.
        override: step name -> what is called in the last of the networks, with the step and its arguments, in place of
            the step's operation.
        fast: on processors, lay images out as convolutions have them fastest and, where no gradients are asked for,
            compute steps at once. The last digits may be others than the network's own, but are the same wherever a
            pass starts.

    Raises:
        ValueError: no state, or another number of inputs than the network takes.
    """
    return dict(iterate(program, states, inputs, wanted, start=start, override=override, fast=fast))


def iterate(
    program: Program,
    states: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    wanted: Iterable[str],
    *,
    start: Mapping[str, tuple[Value, ...]] | None = None,
    override: Mapping[str, Override] | None = None,
    fast: bool = False,
) -> Iterator[tuple[str, tuple[Value, ...]]]:
    """As `run`, each value with its name as soon as it is there: whoever lets go of it keeps no more than one at once.

    What is known from the beginning comes first, then what is computed, in execution order.
    """
    if not states:
        raise ValueError("`states` must hold at least one network's tensors.")
    names = dict.fromkeys(wanted)
    values: dict[str, tuple[Value, ...]] = dict(start or {})
    needed = program.upstream(names, values)
    casts = [_precision_change(program, state) for state in states]
    fast = fast and not any(casts) and _on_processors(states)
    jointly = _rows_of_joints(program, needed, names, values) if fast and not torch.is_grad_enabled() else {}
    lay = channels_together if fast and program.takes_any_layout else _as_it_is
    values = {name: _once_each(lay, pair) for name, pair in values.items()}
    inputs = [lay(each) for each in inputs]
    for name, leaf in program.leaves.items():
        if name in needed:
            values[name] = _leaf_values(program, leaf, states, inputs, casts)
    remaining: dict[str, int] = {}
    for step in program.steps:
        if step.name in needed:
            for name in step.inputs:
                remaining[name] = remaining.get(name, 0) + 1
    for name in names:
        if name in values:
            yield name, values[name]
    special = override or {}
    for step in program.steps:
        if step.name not in needed:
            continue
        row = jointly.get(step.name)
        if row is None:
            values[step.name] = _once_each(lay, _compute((step,), values, casts, special.get(step.name)))
        elif row:
            values[step.name] = _once_each(lay, _compute(row, values, casts, None))
        else:  # a part of what is computed at the end of its row, from what is kept until then
            continue
        for each in row or (step,):
            for name in each.inputs:
                remaining[name] -= 1
                if not remaining[name]:
                    values.pop(name, None)
        if step.name in names:
            yield step.name, values[step.name]
        if step.name not in remaining:
            del values[step.name]


def output_values(program: Program, returned: object) -> dict[str, str | None]:
    """Name of each tensor in what the network `returned` -> the program's value that holds it.

    None where weights cannot change it: an input or a constant that is handed on.
    """
    named = named_outputs(returned)
    tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
    if len(tensors) != len(program.outputs):  # it was traced with its own tensors alone, without caches
        tensors = list(named.values())
    value_of: dict[str, str | None] = dict.fromkeys(named)
    left = list(named.items())
    for tensor, value in zip(tensors, program.outputs, strict=True):
        place = next((number for number, (_, output) in enumerate(left) if output is tensor), None)
        if place is not None:
            name, _ = left.pop(place)
            value_of[name] = value if value in program.by_name or program.tensor(value) is not None else None
    return value_of


def sample_dim(program: Program, name: str) -> int:
    """The dimension of a value that is the batch, in a graph that holds for every batch size; 0 where none is."""
    node = program.nodes.get(name)
    value = None if node is None else node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return next((dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)), 0)


def run_outputs(
    program: Program,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    override: Mapping[str, Override] | None = None,
) -> tuple[Value, ...]:
    """All output tensors of one network, in flattened order."""
    values = run(program, (state,), inputs, program.outputs, override=override)
    return tuple(values[name][0] for name in program.outputs)


_Cast: TypeAlias = tuple[torch.dtype, torch.dtype] | None


def _on_processors(states: Sequence[Mapping[str, Tensor]]) -> bool:
    return all(tensor.device.type == "cpu" for state in states for tensor in list(state.values())[:1])


def _as_it_is(value: Value) -> Value:
    return value


def _once_each(change: Callable[[Value], Value], pair: Sequence[Value]) -> tuple[Value, ...]:
    """Each value changed; what is the same object in several networks stays so."""
    if len(pair) == 1:
        return (change(pair[0]),)
    changed: dict[int, Value] = {}
    for value in pair:
        if id(value) not in changed:
            changed[id(value)] = change(value)
    return tuple(changed[id(value)] for value in pair)


def _rows_of_joints(
    program: Program, needed: Collection[str], wanted: Collection[str], known: Collection[str]
) -> dict[str, tuple[Step, ...]]:
    """Name of the last step of a row that is computed at once -> the row; of each before it -> nothing."""
    rows: dict[str, tuple[Step, ...]] = {}
    for joint in program.joints:
        row = joint.usable(needed, wanted, known)
        rows.update({step.name: () for step in row[:-1]})
        rows.update({step.name: row for step in row[-1:]})
    return rows


def _compute(
    row: Sequence[Step], values: Mapping[str, tuple[Value, ...]], casts: Sequence[_Cast], special: Override | None
) -> tuple[Value, ...]:
    """The value of a step, or of a row of steps, in every network, once for all whose inputs are the same objects."""
    if len(casts) == 1:
        return (_computed(row, values, 0, casts[0], special),)
    results: list[Value] = []
    known: dict[tuple[object, ...], Value] = {}
    inside = {step.name for step in row[:-1]}
    inputs = [name for step in row for name in step.inputs if name not in inside]
    for which, cast in enumerate(casts):
        own = special if which == len(casts) - 1 else None
        key = (cast, own, *(id(values[name][which]) for name in inputs))
        if key not in known:
            known[key] = _computed(row, values, which, cast, own)
        results.append(known[key])
    return tuple(results)


def _computed(
    row: Sequence[Step],
    values: Mapping[str, tuple[Value, ...]],
    which: int,
    cast: _Cast,
    special: Override | None,
) -> Value:
    if len(row) > 1:
        return compute_jointly(row, lambda argument: _resolve(argument, values, which))
    (step,) = row
    args = tuple(_resolve(argument, values, which) for argument in step.args)
    kwargs = {name: _resolve(argument, values, which) for name, argument in step.kwargs.items()}
    if cast is not None:
        args, kwargs = (_recast(part, cast) for part in (args, kwargs))
    target: Any = STRICT.get(step.target, step.target)
    return target(*args, **kwargs) if special is None else special(step, args, kwargs)


def _leaf_values(
    program: Program,
    leaf: Leaf,
    states: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    casts: Sequence[_Cast],
) -> tuple[Value, ...]:
    if isinstance(leaf, TensorLeaf):
        return tuple(state[leaf.name] for state in states)
    if isinstance(leaf, InputLeaf):
        if len(inputs) != len(program.network.inputs):
            raise ValueError(f"The network takes {len(program.network.inputs)} inputs, got {len(inputs)}.")
        return (inputs[leaf.position],) * len(states)
    constant = program.network.constants[leaf.name]
    if not isinstance(constant, Tensor):
        return (constant,) * len(states)
    known: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    constants = []
    for state, cast in zip(states, casts, strict=True):
        device = next((tensor.device for tensor in state.values()), constant.device)
        dtype = cast[1] if cast is not None and constant.dtype == cast[0] else constant.dtype
        constants.append(known.setdefault((device, dtype), constant.to(device, dtype)))
    return tuple(constants)


def _precision_change(program: Program, state: Mapping[str, Tensor]) -> _Cast:
    """(traced, used) precision where the weights are not in the one that the network was traced in."""
    for name, leaf in program.leaves.items():
        if isinstance(leaf, TensorLeaf):
            traced, used = program.nodes[name].meta["val"].dtype, state[leaf.name].dtype
            if traced.is_floating_point:
                return None if traced == used else (traced, used)
    return None


def _recast(value: Any, cast: tuple[torch.dtype, torch.dtype]) -> Any:
    return tree_map(lambda part: cast[1] if part is cast[0] else part, value)


def _resolve(argument: Any, values: Mapping[str, tuple[Value, ...]], which: int) -> Any:
    if isinstance(argument, Read):
        return values[argument.name][which]
    if isinstance(argument, (tuple, list)):
        return type(argument)(_resolve(part, values, which) for part in argument)
    if isinstance(argument, dict):
        return {name: _resolve(part, values, which) for name, part in argument.items()}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice(*(_resolve(part, values, which) for part in parts))
    return argument


# ---- from a graph with operations in place to functional steps

_AGAIN = "@"  # in names of values that no node of the graph has: what a node holds after something changed it


class _Builder:
    """Turns nodes into steps, one by one.

    An operation that changes its argument becomes one that gives a new value, which later readers read. Where the
    argument is a view of something, the new value is written into a copy of that, and its other views are taken again
    when they are read.
    """

    def __init__(self, network: NetworkGraph) -> None:
        self.network = network
        self.steps: list[Step] = []
        self.leaves: dict[str, Leaf] = {}
        self._present: dict[str, str] = {}  # node -> name of the value that it holds now
        self._same: dict[str, str] = {}  # result of an operation in place -> the node that it changed
        self._views: dict[str, tuple[str, Step]] = {}  # view -> the node that it is a view of, and how it is taken
        self._changes: dict[str, int] = {}  # node that is no view -> how often it, or a view of it, was changed
        self._taken: dict[str, int] = {}  # view -> that number when its value was made
        self._writes = any(_changes_argument(node) for node in network.graph.nodes)

    def add(self, node: fx.Node) -> None:
        """The steps of the next node."""
        if node.op in ("placeholder", "get_attr"):
            if node.name in self.network.inputs:
                self.leaves[node.name] = InputLeaf(self.network.inputs.index(node.name))
            elif node.name in self.network.tensors:
                name = self.network.tensors[node.name]
                self.leaves[node.name] = TensorLeaf(self.network.aliases.get(name, name))
            else:
                self.leaves[node.name] = ConstantLeaf(node.name)
        elif node.op == "call_function":
            if _changes_argument(node):
                self._change(node)
            else:
                step = self._step(node, node.target)
                self.steps.append(step)
                if self._writes and (source := _viewed(node)) is not None:
                    viewed = self._same.get(source.name, source.name)
                    self._views[node.name] = viewed, step
                    self._taken[node.name] = self._changes.get(self._root(viewed), 0)

    def present(self, node: fx.Node) -> str:
        """Name of the value that a reader of `node` sees now; views of what has changed are taken again."""
        return self._value(self._same.get(node.name, node.name))

    def _value(self, name: str) -> str:
        if name in self._views:
            changes = self._changes.get(self._root(name), 0)
            if self._taken[name] != changes:
                source, step = self._views[name]
                args = (Read(self._value(source)), *step.args[1:])
                again = _made(f"{name}{_AGAIN}{changes}", step.target, args, step.kwargs)
                self.steps.append(again)
                self._present[name], self._taken[name] = again.name, changes
        return self._present.get(name, name)

    def _root(self, name: str) -> str:
        while name in self._views:
            name = self._views[name][0]
        return name

    def _step(self, node: fx.Node, target: Any) -> Step:
        def read(source: fx.Node) -> Any:
            return Read(self.present(source))

        args: Any = fx.node.map_arg(node.args, read)
        kwargs: Any = fx.node.map_arg(node.kwargs, read)
        return _made(node.name, target, tuple(args), dict(kwargs))

    def _change(self, node: fx.Node) -> None:
        changed = node.args[0]
        if not isinstance(changed, fx.Node):
            raise TraceError(f"`{node.target}` changes several values in place, which cannot be followed.")
        name = self._same.get(changed.name, changed.name)
        step = self._step(node, functional_target(node))
        self.steps.append(step)
        self._same[node.name] = name
        root = self._root(name)
        number = self._changes.get(root, 0) + 1
        if name != root:
            path = []
            inner = name
            while inner in self._views:
                inner, how = self._views[inner]
                path.append(how)
            whole = _made(
                f"{root}{_AGAIN}{number}",
                _written,
                (
                    Read(self._value(root)),
                    Read(step.name),
                    [(how.target, tuple(how.args[1:]), how.kwargs) for how in reversed(path)],
                ),
                {},
            )
            self.steps.append(whole)
            self._present[root] = whole.name
            self._taken[name] = number
        self._changes[root] = number
        self._present[name] = step.name


def _made(name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    inputs: dict[str, None] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Read):
            inputs[value.name] = None
        elif isinstance(value, (tuple, list)):
            for part in value:
                collect(part)
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif isinstance(value, slice):
            collect((value.start, value.stop, value.step))

    collect((args, kwargs))
    return Step(name, target, args, kwargs, tuple(inputs))


def _written(whole: Tensor, part: Tensor, path: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> Tensor:
    """A copy of `whole` whose view along `path` holds `part`."""
    if torch.is_grad_enabled() and (whole.requires_grad or part.requires_grad):  # autograd refuses some views
        numbers = torch.arange(whole.numel(), device=whole.device).view(whole.shape)
        places = _along(numbers, path).reshape(-1)
        values = part.to(whole.dtype).expand(_along(numbers, path).shape).reshape(-1)
        return whole.reshape(-1).index_copy(0, places, values).view(whole.shape)
    written = whole.clone()
    _along(written, path).copy_(part)
    return written


def _along(whole: Tensor, path: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> Tensor:
    """The view of `whole` that the operations of `path` take one after another."""
    view: Any = whole
    for target, args, kwargs in path:
        view = target(view, *args, **kwargs)
    return view  # type: ignore[no-any-return]


def _changes_argument(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _viewed(node: fx.Node) -> fx.Node | None:
    """What the node's value is a view of: its first argument, where both lie in the same memory."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    memory = _memory(node)
    return source if memory is not None and memory == _memory(source) else None


def _memory(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return int(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None


def _copied(changed: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `changed` is after copy_."""
    return source.to(device=changed.device, dtype=changed.dtype).expand_as(changed).clone()


def _filled(changed: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """What `changed` is after fill_ or zero_."""
    if isinstance(value, Tensor):
        return _copied(changed, value)
    return torch.full_like(changed, value)


_DIFFERENTIABLE = {"copy_": _copied, "fill_": _filled, "zero_": _filled}  # torch's own forms have no derivative


def functional_target(node: fx.Node) -> Any:
    """For an operation that changes its first argument, the one that gives the changed value. Raises TraceError."""
    target: Any = node.target
    name = target.__name__.split(".")[0]
    if name in _DIFFERENTIABLE:
        return _DIFFERENTIABLE[name]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    functional = getattr(packet, target._overloadname, None) if packet is not None else None
    if functional is None:
        raise TraceError(f"`{target}` changes its argument and has no functional form.")
    return functional

"""Runs a traced graph for the original and the compressed network side by side, sharing what they have in common.

The compressed network is the original graph with other tensors (masked weights). Every node upstream of the first
changed tensor has the same value in both, and is computed once. An `ActivationStore` keeps the values at a frontier of
the graph on disk, so that the next layer's recording starts there and not at the input.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from compress.errors import TraceError
from compress.graph.trace import NetworkGraph

Pair = tuple[Any, Any]  # one node's value in the original and in the current network; the same object where shared


@dataclass(frozen=True, eq=False)
class Step:
    """One node to compute: its function (functional, never in place) and its arguments, aliases resolved."""

    name: str
    target: Any
    args: Any
    kwargs: Any
    inputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A graph as a list of functional steps.

    Attributes:
        steps: in execution order.
        leaves: placeholder node name -> what it holds: ("input", position), ("tensor", state name), ("constant", name).
            A tensor with several names goes by its first.
    """

    network: NetworkGraph
    steps: tuple[Step, ...]
    leaves: dict[str, tuple[str, Any]]

    @classmethod
    def of(cls, network: NetworkGraph) -> Program:
        """Program of a traced network. In-place ops become functional ones, later readers read their result."""
        current: dict[str, str] = {}
        leaves: dict[str, tuple[str, Any]] = {}
        steps: list[Step] = []
        for node in network.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                if node.name in network.inputs:
                    leaves[node.name] = ("input", network.inputs.index(node.name))
                elif node.name in network.tensors:
                    name = network.tensors[node.name]
                    leaves[node.name] = ("tensor", network.aliases.get(name, name))
                else:
                    leaves[node.name] = ("constant", node.name)
            elif node.op == "call_function":
                target, mutated = functional_target(node)
                inputs: list[str] = []

                resolve = partial(_resolved, current, inputs)
                args = fx.node.map_arg(node.args, resolve)
                kwargs = fx.node.map_arg(node.kwargs, resolve)
                steps.append(Step(node.name, target, args, kwargs, tuple(dict.fromkeys(inputs))))
                if mutated:
                    current[inputs[0]] = node.name
        return cls(network, tuple(steps), leaves)

    @property
    def output(self) -> str:
        """Name of the node that holds the network's (first) output tensor."""
        return next(node.name for node in self.network.outputs if node is not None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Traced shape of a node's value; the batch, where it is symbolic, has its traced size."""
        node = next(node for node in self.network.graph.nodes if node.name == name)
        return tuple(size if isinstance(size, int) else int(size.node.hint) for size in node.meta["val"].shape)

    def downstream(self, tensors: Iterable[str]) -> set[str]:
        """Names of the steps whose value depends on one of the named state tensors."""
        wanted = set(tensors)
        dirty = {name for name, (kind, key) in self.leaves.items() if kind == "tensor" and key in wanted}
        for step in self.steps:
            if any(name in dirty for name in step.inputs):
                dirty.add(step.name)
        return dirty

    def upstream(self, names: Iterable[str], known: Iterable[str] = ()) -> set[str]:
        """Names of the steps needed to compute `names` when the values in `known` are given."""
        needed, given = set(names), set(known)
        for step in reversed(self.steps):
            if step.name in needed and step.name not in given:
                needed.update(step.inputs)
        return needed - given

    def frontier(self, changing: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
        """Values that a later pass for `wanted` can start from when only the state tensors `changing` will differ."""
        moving = self.downstream(changing)
        needed = self.upstream(wanted)
        computed = {step.name for step in self.steps}
        border = {
            name
            for step in self.steps
            if step.name in needed and step.name in moving
            for name in step.inputs
            if name not in moving and name in computed
        }
        border.update(name for name in wanted if name not in moving and name in computed)
        return tuple(step.name for step in self.steps if step.name in border)


@dataclass(frozen=True)
class _Value:
    name: str


def _resolved(current: Mapping[str, str], inputs: list[str], node: fx.Node) -> Any:
    """The value that a reader of `node` sees now: the result of the last operation that changed it in place."""
    name = node.name
    while name in current:
        name = current[name]
    inputs.append(name)
    return _Value(name)


def first_tensor(outputs: object) -> Tensor:
    """The tensor a network returns, or the first one in the container it returns. Raises TraceError."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            return leaf
    raise TraceError(f"The network returns {type(outputs).__name__}; a tensor, or a container with one, was expected.")


def functional_target(node: fx.Node) -> tuple[Any, bool]:
    """The function of a node that changes none of its arguments, and whether the node itself changes its first."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return target, False
    name = target.__name__.split(".")[0]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    functional = getattr(packet, target._overloadname, None) if packet is not None else None
    if functional is None:
        raise ValueError(f"`{target}` changes its argument and has no functional form.")
    return functional, True


def run_pair(
    program: Program,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[str],
    *,
    changed: set[str] | None = None,
    start: Mapping[str, Pair] | None = None,
    keep: Sequence[str] = (),
) -> dict[str, Pair]:
    """Values of the nodes `wanted` and `keep` in both networks, for one batch.

    Args:
        original, current: state name -> tensor, of the two networks.
        inputs: the batch; not read where `start` makes it unnecessary.
        changed: steps that differ between the two (`program.downstream` of the tensors that differ).
        start: values already known, from an `ActivationStore`.
        keep: further nodes whose values to return; computed only if `wanted` needs them.
    """
    if changed is None:
        changed = program.downstream(name for name, tensor in original.items() if current[name] is not tensor)
    values: dict[str, Pair] = dict(start or {})
    needed = program.upstream(wanted, values)
    for name, (kind, key) in program.leaves.items():
        if name not in needed:
            continue
        if kind == "input":
            values[name] = (inputs[key], inputs[key])
        elif kind == "tensor":
            values[name] = (original[key], current[key])
        else:
            constant = program.network.constants[key]
            values[name] = (constant, constant)
    remaining: dict[str, int] = {}
    for step in program.steps:
        if step.name in needed:
            for name in step.inputs:
                remaining[name] = remaining.get(name, 0) + 1
    holding = {*wanted, *keep}
    for step in program.steps:
        if step.name not in needed:
            continue
        first = step.target(*_resolve(step.args, values, 0), **_resolve(step.kwargs, values, 0))
        if step.name in changed:
            second = step.target(*_resolve(step.args, values, 1), **_resolve(step.kwargs, values, 1))
        else:
            second = first
        values[step.name] = (first, second)
        for name in step.inputs:
            remaining[name] -= 1
            if not remaining[name] and name not in holding:
                del values[name]
    return {name: values[name] for name in holding if name in values}


def _resolve(argument: Any, values: Mapping[str, Pair], which: int) -> Any:
    if isinstance(argument, _Value):
        return values[argument.name][which]
    if isinstance(argument, (tuple, list)):
        return type(argument)(_resolve(part, values, which) for part in argument)
    if isinstance(argument, dict):
        return {name: _resolve(part, values, which) for name, part in argument.items()}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice(*(_resolve(part, values, which) for part in parts))
    return argument


@dataclass
class ActivationStore:
    """Values at one frontier of the graph, one file per batch, on disk, within a bound.

    A batch that a pass had no need of stays at the frontier it had reached before.

    Attributes:
        folder: a private temporary folder; `close()` removes it.
        limit: bytes that may lie there; a batch that would exceed it is not kept, and is recomputed.
        nodes: the frontier.
        sizes: bytes of each batch that is kept.
        generation: number of the frontier.
        behind: of batches at an earlier frontier, its number and nodes.
    """

    folder: Path
    limit: int
    nodes: tuple[str, ...] = ()
    sizes: dict[int, int] = field(default_factory=dict)
    generation: int = 0
    behind: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def open(cls, limit: int, parent: str | None = None) -> ActivationStore:
        """A store in a new temporary folder; at most half of the free disk is used."""
        folder = Path(tempfile.mkdtemp(prefix="compress-activations-", dir=parent))
        return cls(folder, min(limit, shutil.disk_usage(folder).free // 2))

    def advance(self, nodes: tuple[str, ...]) -> ActivationStore:
        """A store for the next frontier in the same folder. The values of this one stay readable until dropped."""
        return ActivationStore(self.folder, self.limit, nodes, {}, self.generation + 1)

    def put(self, batch: int, values: Mapping[str, Pair]) -> bool:
        """Keep one batch's values of `nodes`; False if they are not tensors or exceed the bound."""
        tensors: dict[str, Tensor] = {}
        for name in self.nodes:
            if name not in values or not isinstance(values[name][0], Tensor):
                return False
            first, second = values[name]
            tensors[f"original:{name}"] = first.detach().contiguous()
            if second is not first:
                tensors[f"current:{name}"] = second.detach().contiguous()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if not tensors or sum(self.sizes.values()) + size > self.limit:
            return False
        try:
            save_file(tensors, self._path(batch))
        except (OSError, SafetensorError):  # a full disk only means that this batch is recomputed
            self._path(batch).unlink(missing_ok=True)
            return False
        self.sizes[batch] = size
        return True

    def get(self, batch: int, device: torch.device) -> dict[str, Pair] | None:
        """One batch's values, or None where it was not kept."""
        if batch not in self.sizes:
            return None
        tensors = load_file(self._path(batch), device=str(device))
        return {
            name: (first := tensors[f"original:{name}"], tensors.get(f"current:{name}", first))
            for name in self._origin(batch)[1]
        }

    def reaches(self, batch: int) -> bool:
        """Whether the batch is kept at this very frontier."""
        return batch in self.sizes and batch not in self.behind

    def inherit(self, earlier: ActivationStore) -> None:
        """Take over what is left at an earlier frontier of the same folder, of batches that are not kept here."""
        for batch, size in list(earlier.sizes.items()):
            if batch in self.sizes or sum(self.sizes.values()) + size > self.limit:
                earlier.drop(batch)
                continue
            self.behind[batch] = earlier._origin(batch)
            self.sizes[batch] = earlier.sizes.pop(batch)

    def drop(self, batch: int) -> None:
        """Delete one batch's values."""
        if self.sizes.pop(batch, None) is not None:
            self._path(batch).unlink(missing_ok=True)
            self.behind.pop(batch, None)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _origin(self, batch: int) -> tuple[int, tuple[str, ...]]:
        return self.behind.get(batch, (self.generation, self.nodes))

    def _path(self, batch: int) -> Path:
        return self.folder / f"{self._origin(batch)[0]}-{batch}.safetensors"

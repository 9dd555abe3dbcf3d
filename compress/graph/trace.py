"""From a module to the graph of ATen operations that torch.export sees."""

from __future__ import annotations

import io
import logging
import operator
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch.export import Dim, export
from torch.export.graph_signature import InputKind, OutputKind

from compress.errors import OutputError, TraceError
from compress.graph.inlining import inline_regions
from compress.measures.outputs import named_outputs


@dataclass(frozen=True, eq=False)
class NetworkGraph:
    """The operations of a network in evaluation mode, with its parameters and buffers as inputs of the graph.

    Attributes:
        graph: ATen operations as torch.export gives them, without decomposition; `node.meta["val"]` holds fake tensors.
        tensors: placeholder name -> name in the state dict, for parameters and persistent buffers.
        constants: placeholder or attribute name -> constant tensor (or sub-graph) that is not in the state dict.
        inputs: placeholder names of the network's inputs, in call order.
        outputs: the output values that the network returns, in flattened order (None where it returns no tensor).
        batch_size: None when the graph holds for every batch size, else the only one that it holds for.
        examples: the tensors that the network was traced with.
        aliases: state-dict name -> the first name of the same tensor (tied weights); names of their own are left out.
        buffers: placeholder name -> name in the module, of those constants that are buffers outside the state dict.
    """

    graph: fx.Graph
    tensors: dict[str, str]
    constants: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[fx.Node | None, ...]
    batch_size: int | None
    examples: tuple[Tensor, ...]
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)


def trace_network(module: nn.Module, inputs: tuple[Tensor, ...]) -> NetworkGraph:
    """Export `module` (in evaluation mode, left as it was) on `inputs`, whose first dimension is the batch.

    The batch is symbolic where the network allows it, otherwise the graph is valid for the batch of `inputs` only.
    Raises TraceError with the exporter's first line when the network cannot be exported, OutputError on a full disk.
    """
    scripted = next((name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise TraceError(
            f"{f'`{scripted}`' if scripted else 'The network'} is compiled by torch.jit, which torch.export cannot "
            "follow; give the module that it was made from."
        )
    if not isinstance(inputs, tuple) or not all(isinstance(value, Tensor) for value in inputs):
        raise ValueError(f"`inputs` must be a tuple of tensors, got {type(inputs).__name__}.")
    wide = tuple(
        value.repeat(2, *[1] * (value.dim() - 1)) if value.dim() and len(value) == 1 else value for value in inputs
    )
    names = set(module.state_dict())
    before = _plain_attributes(module)
    module.eval()
    try:
        with silent_exporter(), torch.no_grad():
            program, batch_size = _export(module, inputs, wide)
    finally:
        _restore(before)
    inline_regions(program.graph_module)
    wrapped = not any(target in names for target in program.state_dict) and bool(names)
    prefix = _PREFIX if wrapped else ""
    if wrapped:
        _strip_prefix(program.graph)
    tensors: dict[str, str] = {}
    constants: dict[str, Any] = {}
    buffers: dict[str, str] = {}
    users: list[str] = []
    state = program.state_dict
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in state:
            tensors[name] = str(spec.target).removeprefix(prefix)
        elif spec.kind is InputKind.USER_INPUT:
            users.append(name)
        else:
            constants[name] = program.constants[str(spec.target)]
            if spec.kind is InputKind.BUFFER:
                buffers[name] = str(spec.target).removeprefix(_PREFIX)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            constants[node.name] = operator.attrgetter(node.target)(program.graph_module)
    (returned,) = next(node for node in program.graph.nodes if node.op == "output").args
    outputs = [
        value if isinstance(value, fx.Node) else None
        for spec, value in zip(program.graph_signature.output_specs, returned, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    return NetworkGraph(
        graph=program.graph,
        tensors=tensors,
        constants=constants,
        inputs=tuple(users),
        outputs=tuple(outputs),
        batch_size=batch_size,
        examples=wide if batch_size is None else tuple(inputs),
        aliases=_find_aliases(module),
        buffers=buffers,
    )


@contextmanager
def silent_exporter() -> Iterator[None]:
    """Without what torch's exporters warn of, log, and print of a graph that they cannot finish: a fault says it."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _plain_attributes(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every module's attributes and every dictionary among them, each with a copy: forward() may store into them."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in module.modules():
        attributes = vars(part)
        kept += [(value, dict(value)) for value in attributes.values() if type(value) is dict]
        kept.append((attributes, dict(attributes)))
    return kept


def _restore(kept: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for current, old in kept:
        if len(current) != len(old) or any(value is not old.get(key) for key, value in current.items()):
            current.clear()
            current.update(old)


def _export(module: nn.Module, inputs: tuple[Tensor, ...], wide: tuple[Tensor, ...]) -> tuple[Any, int | None]:
    try:
        import_module("torch._dynamo")  # torch 2.8 writes a temporary file then
    except OSError as fault:
        raise OutputError(f"torch cannot write its temporary files: {fault}.") from fault
    batch = Dim("batch")
    dynamic = tuple({0: batch} if value.dim() else {} for value in wide)
    try:
        return export(module, wide, dynamic_shapes=(dynamic,) if _takes_list(module) else dynamic, strict=False), None
    except Exception:  # the exporter raises many kinds; tensors alone, then a fixed batch, are the further tries
        pass
    plain = _TensorsOnly(module)
    try:
        return export(plain, wide, dynamic_shapes=(dynamic,), strict=False), None
    except Exception:
        pass
    size = len(inputs[0]) if inputs[0].dim() else 1
    try:
        return export(module, inputs, strict=False), size
    except Exception:
        pass
    try:
        return export(plain, inputs, strict=False), size
    except Exception as fault:
        if "Guard" in type(fault).__name__ and (program := _export_decided(plain, inputs)) is not None:
            return program, size
        raise TraceError(
            f"torch.export cannot turn {type(module).__name__} into a graph: {_explain(fault)}."
        ) from fault


def _export_decided(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The program where forward() decides by values that no input reaches, such as what kind a mask is; else None."""
    try:
        with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
            program = export(module, inputs, strict=False)
    except Exception:
        return None
    users = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in users or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            value = node.meta.get("val")
            sizes = value.shape if isinstance(value, Tensor) else ()
            if isinstance(value, _NUMBERS) or any(isinstance(size, torch.SymInt) for size in sizes):
                return None  # a number that the inputs decide
    return program


def _explain(fault: Exception) -> str:
    """What the exporter met, where in the user's code that was, and what can be done."""
    place = _line_of_user(fault)
    where = "" if place is None else f" ({place})"
    if "Guard" in type(fault).__name__:
        return (
            f"forward() decides by values that it computes{where}, which no graph holds; choose by torch.where there, "
            "or compress a part of the network that does without, such as its backbone"
        )
    first = next((line for line in str(fault).splitlines() if line.strip()), "").strip().rstrip(".")
    if "fake tensor in the exported program" in first:
        return (
            "forward() changes the network's own tensors through .data, which no graph holds; compute the changed one "
            "anew there, such as functional.linear(x, self.weight * self.mask, self.bias)"
        )
    return f"{type(fault).__name__}: {first}{where}"


def _line_of_user(fault: Exception) -> str | None:
    """The innermost line that was running outside torch and this package."""
    own = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
    frames = [frame for frame in traceback.extract_tb(fault.__traceback__) if Path(frame.filename).is_file()]
    user = [frame for frame in frames if not frame.filename.startswith(own)]
    if not user:
        return None
    code = " ".join((user[-1].line or "").split())
    shown = code if len(code) <= _MOST_CODE else f"{code[:_MOST_CODE]}…"
    return f"{Path(user[-1].filename).name}, line {user[-1].lineno}: `{shown}`"


class _TensorsOnly(nn.Module):
    """A module called with positional tensors whose outputs are cut down to tensors, caches left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.traced = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return output_tensors(self.traced(*inputs))


_PREFIX = "traced."
_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
_MOST_CODE = 60  # characters of a line that a fault shows


def output_tensors(outputs: object) -> tuple[Tensor, ...]:
    """The tensors that a network returned, in flattened order; key-value caches are no output of the network."""
    return tuple(named_outputs(outputs).values())


def _strip_prefix(graph: fx.Graph) -> None:
    """Module paths as the network itself has them, not as `_TensorsOnly` has."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (entry[0].removeprefix(_PREFIX), *entry[1:]) if isinstance(entry, tuple) else entry
                for key, entry in stack.items()
                if not (isinstance(entry, tuple) and entry[0] + "." == _PREFIX)
            }


def _takes_list(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return bool(code and code.co_flags & 0x04 and code.co_argcount == 1)  # forward(self, *inputs)


def _find_aliases(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            aliases[name] = owner
    return aliases


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward() ran the node; "" for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return str(paths[-1]) if paths else ""

"""ONNX: written through torch's graph exporter, read by onnxruntime."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.calls import call_of, parameters_of
from compress.errors import CompressError, OutputError, UnsupportedError
from compress.graph.trace import silent_exporter
from compress.measures.outputs import LONE, named_outputs

NEEDED = ("onnx", "onnxscript", "onnxruntime")
INPUT = "input"


def need(*packages: str) -> list[Any]:
    """The imported packages. Raises UnsupportedError with what to install."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise UnsupportedError(
            f"ONNX needs {', '.join(NEEDED)}, and {error.name or error} is missing: "
            "pip install 'compress-networks[onnx]'."
        ) from None


def write_onnx(module: nn.Module, sample: Tensor | Sequence[Tensor], path: Path, *, dynamic: bool = True) -> int:
    """Write `module` as one ONNX file whose batch dimension is free (`dynamic`) or that of `sample` (B, …).

    An only input is called `input`, several as in the network's own call.

    The same network gives the same bytes: source locations, which the exporter adds, are left out.

    Returns:
        The version of the operator set.

    Raises:
        UnsupportedError: an operation has no ONNX form, or the exporter is not installed.
    """
    need("onnx", "onnxscript")
    inputs = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    with torch.inference_mode():
        names = list(named_outputs(module(*inputs)))
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),) if dynamic else None
    try:
        with silent_exporter():
            program: Any = torch.onnx.export(
                TensorsAlone(module), inputs, dynamo=True, verbose=False, dynamic_shapes=shapes,
                input_names=input_names(module, len(inputs), names), output_names=names,
            )  # fmt: skip
        model = program.model_proto
        strip_metadata(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
    except OSError:
        raise
    except CompressError:
        raise
    except Exception as error:  # the exporter raises whatever its translations raise
        raise UnsupportedError(f"The network has no ONNX form: {first_cause(error)}") from None
    return int(next(opset.version for opset in model.opset_import if opset.domain == ""))


class TensorsAlone(nn.Module):
    """A network whose outputs are tensors in a tuple, whatever container it returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs, in the order of their names."""
        return tuple(named_outputs(self.module(*inputs)).values())


def input_names(module: nn.Module, count: int, taken: Sequence[str]) -> list[str]:
    """Names of so many inputs: `input`, or those of the network's call; none of those that are `taken`."""
    if count == 1:
        return [INPUT]
    call = call_of(module)
    parameters = [parameter.name for parameter in parameters_of(module)]
    names = list((parameters + [f"input{n}" for n in range(count)])[:count] if call is None else call.names(parameters))
    used = set(taken)
    for place, name in enumerate(names):
        while name in used:
            name += "_in"
        used.add(name)
        names[place] = name
    return names


def strip_metadata(model: Any) -> None:
    """Drop names of source files and of Python classes from an ONNX model, in place."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
    for holder in (model, graph, *values, *nodes, *model.functions):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")


def first_cause(error: BaseException) -> str:
    """The first telling line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0]


class OnnxNetwork(nn.Module):
    """An ONNX file as a module, computed by onnxruntime on the CPU with torch's thread count.

    Raises:
        OutputError: no such file, no ONNX file, or one that reads other files.
        UnsupportedError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        (onnxruntime,) = need("onnxruntime")
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise OutputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
        refuse_other_files(content, str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own, made at run time
            raise OutputError(f"{str(path)!r} is not an ONNX file that runs here: {first_cause(error)}") from None
        self.names = [port.name for port in self.session.get_inputs()]
        self.outputs = [port.name for port in self.session.get_outputs()]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | dict[str, Tensor]:
        """What the network returns for a batch (B, …) of every input, in order or by name: a tensor, or its outputs."""
        given = {**dict(zip(self.names, inputs, strict=False)), **named}
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}
        tensors = [torch.from_numpy(array) for array in self.session.run(None, arrays)]
        return tensors[0] if self.outputs == [LONE] else dict(zip(self.outputs, tensors, strict=True))


def refuse_other_files(content: bytes, name: str) -> None:
    """Refuse a model that keeps tensors in other files, wherever those lie. Raises OutputError."""
    try:
        (onnx,) = need("onnx")
    except UnsupportedError:
        return  # onnxruntime itself stays inside the current folder for a model read from memory
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own decoding errors
        raise OutputError(f"{name!r} is not an ONNX file: {first_cause(error)}") from None
    nodes = (node for function in model.functions for node in function.node)
    if any(tensor.external_data for tensor in chain(all_tensors(model.graph), node_tensors(nodes))):
        raise OutputError(
            f"{name!r} keeps tensors in other files; compress writes one file, so this is not one of its."
        )


def all_tensors(graph: Any) -> Iterable[Any]:
    """Every tensor of an ONNX graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from node_tensors(graph.node)


def node_tensors(nodes: Iterable[Any]) -> Iterable[Any]:
    """Every tensor in the attributes of nodes and in the graphs there."""
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer or inner.sparse_initializer:
                    yield from all_tensors(inner)

"""`.pt2`: torch.export's archive, with a free batch dimension, without pickles and without source locations."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artifact.exports.onnx_file import first_cause
from compress.artifact.exports.pt2_check import check_pt2
from compress.errors import OutputError, UnsupportedError
from compress.graph.trace import silent_exporter
from compress.measures.outputs import named_outputs


def write_pt2(module: nn.Module, sample: Tensor | Sequence[Tensor], path: Path, *, dynamic: bool = True) -> None:
    """Write `module` as an exported program whose batch dimension is free (`dynamic`) or that of `sample` (B, …).

    The same network and torch give the same bytes: source locations and the sample itself are left out.

    Raises:
        UnsupportedError: the network cannot be exported like this.
    """
    inputs = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    module = in_plain_containers(module, inputs)
    batch = torch.export.Dim("batch")
    batch_dims = tuple({0: batch} for _ in inputs)
    variadic = any(each.kind is each.VAR_POSITIONAL for each in inspect.signature(module.forward).parameters.values())
    shapes = ((batch_dims,) if variadic else batch_dims) if dynamic else None
    with silent_exporter():
        try:
            program = torch.export.export(module, inputs, dynamic_shapes=shapes)
        except Exception as error:  # torch.export raises whatever tracing raises
            raise UnsupportedError(f"The network cannot be exported to .pt2: {first_cause(error)}") from None
        program.example_inputs = None
        if hasattr(program, "_guards_code"):  # that inputs have one batch size, as code, which is never read back
            program._guards_code = []
        for node in program.graph.nodes:
            for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(name, None)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            draft = Path(scratch) / path.name  # the archive names its root after the file
            torch.export.save(program, draft)
            draft.replace(path)


class NamedOutputs(nn.Module):
    """A network whose outputs are tensors in a dict by their names, whatever container it returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The network's outputs by name."""
        return named_outputs(self.module(*inputs))


def in_plain_containers(module: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """The network itself where it returns tensors in tuples, lists and dicts, which the archive may name."""

    def plain(value: object) -> bool:
        if type(value) in (tuple, list):
            return all(map(plain, value))  # type: ignore[call-overload]
        return isinstance(value, Tensor) or (type(value) is dict and all(map(plain, value.values())))

    with torch.inference_mode():
        return module if plain(module(*inputs)) else NamedOutputs(module)


def keeps_weights_raw() -> bool:
    """Whether this torch writes the weights of a `.pt2` as raw bytes; older ones (2.8) pickle them."""
    from torch.export.pt2_archive import _package

    return hasattr(_package, "_package_state_dict")


def load_pt2(path: str | Path) -> nn.Module:
    """The exported graph in a `.pt2` file, as a module.

    Raises:
        OutputError: no such file, or no exported program.
        UnsupportedError: it holds pickles, compiled code or calls outside of torch's operators.
    """
    path = Path(path)
    check_pt2(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()
    except Exception as error:  # a damaged program raises whatever its reader raises
        raise OutputError(f"{str(path)!r} is not an exported program: {first_cause(error)}") from None

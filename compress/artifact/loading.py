"""load(): any file or folder that this tool wrote, as a module that can be called."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compress.artifact import folder as artifact
from compress.artifact.exports.onnx_file import OnnxNetwork
from compress.artifact.exports.pt2_file import load_pt2


def load(path: str | Path, *, trust_code: bool = False, model: nn.Module | None = None) -> nn.Module:
    """The compressed network in a folder that a run wrote, in its `hf` folder, its `.onnx` or its `.pt2` file.

    A folder gives the original class with smaller tensors, in eval mode; an ONNX file runs in onnxruntime, on the CPU;
    a `.pt2` file gives the exported graph. Nothing is unpickled, and nothing that the folder names is run: a network of
    torchvision, timm, transformers or compress.models is built from plain arguments, and a folder that names a
    `package.module:factory` is refused without your word.

    Args:
        trust_code: import and run the factory that the folder names.
        model: the original network, of the class that was compressed; a copy of it is cut and gets the weights.

    Raises:
        UntrustedCodeError: the folder names code; nothing was imported.
        OutputError: not a complete, unaltered artifact, or no such file.
        UnsupportedError: onnxruntime is not installed, or a `.pt2` file holds more than tensors and a graph.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return OnnxNetwork(path)
    if path.suffix == ".pt2":
        return load_pt2(path)
    return artifact.load(path, trust_code=trust_code, model=model)

"""load(): any file or folder that this tool wrote, as a module that can be called."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compress.artifact import folder as artifact
from compress.artifact.exports.onnx_file import OnnxNetwork
from compress.artifact.exports.pt2_file import load_pt2


def load(path: str | Path) -> nn.Module:
    """The compressed network in a folder that a run wrote, in its `hf` folder, its `.onnx` or its `.pt2` file.

    A folder gives the original class with smaller tensors, in eval mode; an ONNX file runs in onnxruntime, on the CPU;
    a `.pt2` file gives the exported graph. Nothing is unpickled. A folder whose architecture was given as
    `package.module:factory` imports that again, so that module must be importable.

    Raises:
        OutputError: not a complete, unaltered artifact, or no such file.
        UnsupportedError: onnxruntime is not installed, or a `.pt2` file holds more than tensors and a graph.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return OnnxNetwork(path)
    if path.suffix == ".pt2":
        return load_pt2(path)
    return artifact.load(path)

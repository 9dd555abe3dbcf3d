"""The folder a run writes: a safetensors file, a manifest, and load(), which needs no pickle and no tracing."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.atomic import current_umask
from compress.checkpoint.manifest import CONFIG, FORMAT, MODEL, file_sha256, read_artifact
from compress.errors import OutputError
from compress.measures.outputs import largest_deviation

RECIPE, REPORT_TEXT, REPORT_PAGE = "recipe.yaml", "report.md", "report.html"
NUMBERS = re.compile(r"\[\n\s*(?:(?:-?[\d.eE+-]+|null)(?:,\n\s*)?)+\n\s*\]")  # no string holds a line break
LISTED = ("compress-networks", "torch", "torchvision", "safetensors", "numpy", "cvxpy", "scs", "clarabel")


def load(folder: str | Path, *, trust_code: bool = False, model: nn.Module | None = None) -> nn.Module:
    """The compressed network in a folder that a run wrote: the original class with smaller tensors, in eval mode.

    Only `config.json`, `model.safetensors` and `SHA256SUMS` are read; nothing is unpickled. See `compress.load`.

    Raises:
        UntrustedCodeError: the folder names code, without `trust_code` or `model`.
        OutputError: the folder is not a complete, unaltered artifact.
    """
    return read_artifact(folder).build(trust_code=trust_code, model=model)


def write_artifact(
    folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], texts: Mapping[str, str]
) -> dict[str, Any]:
    """Write tensors, manifest and further text files into `folder`; returns the manifest with the hashes filled in."""
    save_file(dict(state), folder / MODEL, metadata={"format": "pt"})
    (folder / MODEL).chmod(0o666 & ~current_umask())
    manifest = {"format": FORMAT, **config}
    manifest["hashes"] = {**config.get("hashes", {}), MODEL: file_sha256(folder / MODEL)}
    write_json(folder / CONFIG, manifest)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return manifest


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON, two spaces deep, lists of numbers on one line, with a final newline; NaN is refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose arithmetic enters a result."""
    version_of = {"python": platform.python_version()}
    for name in LISTED:
        try:
            version_of[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return version_of


RELOAD = """
import sys
folder, probe, found, threads, arch, *sys.path = sys.argv[1:]
import torch
from compress.checkpoint.manifest import open_artifact
from compress.artifact.loading import load
from compress.measures.outputs import named_outputs
from safetensors.torch import load_file, save_file
torch.set_num_threads(int(threads))
inputs = load_file(probe)
exported = folder.endswith((".pt2", ".onnx"))
module = load(folder) if exported else open_artifact(folder, arch=arch or None, trust_code=True)[1]
with torch.inference_mode():
    outputs = module(*(inputs[str(number)] for number in range(len(inputs))))
outputs = named_outputs(outputs)
save_file({name: tensor.contiguous().clone() for name, tensor in outputs.items()}, found)
"""


def check_reload(
    folder: Path,
    examples: Sequence[Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    scratch: Path,
    *,
    arch: str | None = None,
) -> float:
    """Load `folder` in a fresh process, run `examples` (B, …) and compare all outputs with `expected`, by name.

    The process looks for modules where this one does, and nowhere else: not in the working directory. What the folder
    names was built in this process before, so that it is trusted in the other.

    Args:
        arch: the file that the user named, `file.py:factory`; the folder does not say where it lies.

    Returns:
        The largest deviation, relative to the output's largest expected magnitude.

    Raises:
        OutputError: the process failed or the outputs differ by more than `tolerance`.
    """
    inputs = {str(number): part.detach().cpu().clone().contiguous() for number, part in enumerate(examples)}
    save_file(inputs, scratch / "probe.safetensors")
    arguments = [str(folder.resolve()), str(scratch / "probe.safetensors"), str(scratch / "found.safetensors")]
    if reason := reload_alone([*arguments, str(torch.get_num_threads()), arch or "", *sys.path]):
        raise OutputError(f"The written model does not load in a fresh process: {reason}")
    return compare_reloaded(expected, load_file(scratch / "found.safetensors"), tolerance)


def reload_alone(arguments: Sequence[str]) -> str:
    """Run RELOAD in a fresh process; why it failed, empty where it did not."""
    command = [sys.executable, "-P", "-c", RELOAD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].partition(": ")[2] or lines[-1]


def compare_reloaded(expected: Mapping[str, Tensor], outputs: Mapping[str, Tensor], tolerance: float) -> float:
    """The largest deviation of a reloaded network's outputs, relative to the output's largest expected magnitude.

    Raises:
        OutputError: an output differs by more than `tolerance`.
    """
    deviation, where = largest_deviation(expected, outputs)
    if not deviation <= tolerance:
        said = "other outputs" if len(expected) == 1 else f"another output `{where}`"
        raise OutputError(
            f"The written model gives {said} in a fresh process: relative deviation {deviation:.1e}, "
            f"at most {tolerance:.0e} was expected."
        )
    return deviation

"""The folder a run writes: a safetensors file, a manifest, and load(), which needs no pickle and no tracing."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.errors import OutputError
from compress.network.architecture import build_architecture, load_weights
from compress.network.parametrisations import in_common_form
from compress.network.restoring import restore_shapes
from compress.output.atomic import current_umask

FORMAT = 1
TRAINING_JSON = "training.json"  # of a training, in place of a run's report
MODEL, CONFIG, RECIPE, REPORT_JSON, REPORT_TEXT = (
    "model.safetensors",
    "config.json",
    "recipe.yaml",
    "report.json",
    "report.md",
)
REPORT_PAGE = "report.html"
NUMBERS = re.compile(r"\[\n\s*(?:(?:-?[\d.eE+-]+|null)(?:,\n\s*)?)+\n\s*\]")  # no string holds a line break
LISTED = ("compress-networks", "torch", "torchvision", "safetensors", "numpy", "cvxpy", "scs", "clarabel")


@dataclass(frozen=True, eq=False)
class Artifact:
    """A written folder, read back. `config` is the parsed manifest, `state` the tensors as stored."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return tuple(self.config["architecture"]["input_shape"])

    def build(self) -> nn.Module:
        """The compressed network in eval mode, float32 where it was stored in half precision.

        Raises:
            CompressError: the architecture cannot be built here, or does not fit the tensors.
        """
        architecture = self.config["architecture"]
        module = build_architecture(architecture["spec"], architecture["arguments"])
        state = in_common_form(module, self.state)
        module = restore_shapes(module, self.config["shapes"], self.config["attributes"])
        if any(tensor.dtype == torch.float64 for tensor in state.values()):
            module = module.double()
        load_weights(module, computed_state(state))
        return module.eval()


def load(folder: str | Path) -> nn.Module:
    """The compressed network in a folder that a run wrote: the original class with smaller tensors, in eval mode.

    Only `config.json` and `model.safetensors` are read; nothing is unpickled. An architecture that was given as
    `package.module:factory` is imported again, so that module must be importable.

    Raises:
        OutputError: the folder is not a complete, unaltered artifact.
    """
    return read_artifact(folder).build()


def read_artifact(folder: str | Path) -> Artifact:
    """Read and check a written folder: format, hash of the tensors. Raises OutputError."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise OutputError(f"{str(folder)!r} is not a folder written by compress: {CONFIG}: {error}.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise OutputError(f"{str(folder / CONFIG)!r} has format {found!r}; this version reads format {FORMAT}.")
    missing = [name for name in ("architecture", "shapes", "attributes", "hashes") if name not in config]
    if missing:
        raise OutputError(f"{str(folder / CONFIG)!r} lacks {', '.join(missing)}; the folder is damaged.")
    try:
        digest = file_sha256(folder / MODEL)
        if digest != config["hashes"][MODEL]:
            raise OutputError(
                f"{str(folder / MODEL)!r} was changed after it was written: its SHA-256 is {digest[:12]}…, "
                f"the manifest says {str(config['hashes'][MODEL])[:12]}…."
            )
        state = load_file(folder / MODEL)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise OutputError(f"{str(folder / MODEL)!r} cannot be read: {error}.") from None
    return Artifact(folder, config, state)


def computed_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as it is computed with: half-precision tensors in float32."""
    return {
        name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for name, tensor in state.items()
    }


def stored_state(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in the dtypes of the original checkpoint. A value that overflows half precision raises OutputError."""
    stored = {}
    for name, tensor in state.items():
        dtype = like[name].dtype if name in like else tensor.dtype
        if name not in like and tensor.is_floating_point():  # an added bias, a weight that was computed
            beside = f"{name.rpartition('.')[0]}.".lstrip(".")
            near = (each for key, each in like.items() if key.startswith(beside) and each.is_floating_point())
            dtype = next(near, tensor).dtype
        cast = tensor.detach().cpu().to(dtype).contiguous()
        if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
            raise OutputError(
                f"`{name}` does not fit into {str(dtype).removeprefix('torch.')}: a refitted value overflows."
            )
        stored[name] = cast.clone()
    return stored


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose arithmetic enters a result."""
    found = {"python": platform.python_version()}
    for name in LISTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


RELOAD = """
import sys, numpy, torch, compress
folder, probe, found, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
with torch.inference_mode():
    outputs = compress.load(folder)(torch.from_numpy(numpy.load(probe)))
numpy.save(found, compress.first_tensor(outputs).double().numpy())
"""


def check_reload(folder: Path, probe: Tensor, expected: Tensor, tolerance: float, scratch: Path) -> float:
    """Load `folder` in a fresh process, run `probe` (B, …) and compare with `expected`.

    Returns:
        The largest deviation, relative to the largest expected magnitude.

    Raises:
        OutputError: the process failed or the outputs differ by more than `tolerance`.
    """
    np.save(scratch / "probe.npy", probe.cpu().numpy())
    arguments = [str(folder.resolve()), str(scratch / "probe.npy"), str(scratch / "found.npy")]
    command = [sys.executable, "-c", RELOAD, *arguments, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = lines[-1].partition(": ")[2] or lines[-1]
        raise OutputError(f"The written model does not load in a fresh process: {reason}")
    found = torch.from_numpy(np.load(scratch / "found.npy"))
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    deviation = float((found - expected.double().cpu()).abs().max()) / scale
    if not deviation <= tolerance:
        raise OutputError(
            f"The written model gives other outputs in a fresh process: relative deviation {deviation:.1e}, "
            f"at most {tolerance:.0e} was expected."
        )
    return deviation

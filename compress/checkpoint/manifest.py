"""Reading a folder that a run or a training wrote: the manifest and the tensors, checked, and the network they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.checkpoint.architecture import build_architecture, load_weights
from compress.checkpoint.parametrisations import in_common_form
from compress.checkpoint.restoring import restore_shapes
from compress.errors import OutputError

FORMAT = 1
MODEL, CONFIG = "model.safetensors", "config.json"


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

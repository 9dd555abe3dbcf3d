"""Folders as a stranger may hand them over: sound ones whose manifest was rewritten, hashes forged to match."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.artifact.checksums import write_checksums
from compress.artifact.folder import write_artifact
from compress.checkpoint.building.builders import build_architecture
from compress.report.model import CostReport, Counts
from tests.report.reports import make_small_report

SPEC, ARGUMENTS = "compress:mlp", {"widths": [4, 6, 3]}
TOUCH = "from pathlib import Path\nPath({mark!r}).touch()\ndef build(**_):\n    raise SystemExit\n"


def write_folder(folder: Path) -> Path:
    """A small network as a run writes it, with a report that every command accepts as far as it reads it."""
    module = build_architecture(SPEC, ARGUMENTS)
    config = {
        "architecture": {"spec": SPEC, "arguments": ARGUMENTS, "input_shape": [4], "input_dtype": "float32"},
        "data": {"preprocessing": None},
        "shapes": {},
        "attributes": {},
        "kept": {},
    }
    folder.mkdir(parents=True)
    write_artifact(folder, module.state_dict(), config, {"recipe.yaml": "keep: 0.5\n"})
    cost = CostReport(Counts(51, 51), Counts(42, 42), Counts(204, 204), ())
    report = replace(make_small_report(), layers=(), cost=cost, search=None, evaluation=None)
    (folder / "report.json").write_text(json.dumps(report.to_json()))
    write_checksums(folder)
    return folder


def forge(folder: Path, **changes: Any) -> Path:
    """Rewrite entries of the manifest (`architecture__spec` is one inside another) and make every hash hold again."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        outer, inside, inner = name.partition("__")
        if inside:
            config[outer] = {**config[outer], inner: value}
        else:
            config[outer] = value
    if "hashes" not in changes:
        config["hashes"] = {**config["hashes"], "model.safetensors": sha256(folder / "model.safetensors")}
    path.write_text(json.dumps(config))
    write_checksums(folder)
    return folder


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plant(place: Path, name: str) -> Path:
    """A module that leaves a mark when it is imported; gives the path of the mark."""
    mark = place / f"{name}-was-imported"
    (place / f"{name}.py").write_text(TOUCH.format(mark=str(mark)))
    return mark


def write_data(path: Path) -> Path:
    """Data that fits the network."""
    inputs = np.random.default_rng(0).normal(size=(48, 4)).astype("f4")
    np.savez(path, inputs=inputs, labels=np.arange(48) % 3)
    return path


def tensors() -> dict[str, torch.Tensor]:
    """The network's state."""
    return build_architecture(SPEC, ARGUMENTS).state_dict()

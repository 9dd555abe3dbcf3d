"""Which torchvision classifiers have which parameter names: the packaged index, and how it is made.

`python -m compress.checkpoint.building.torchvision_index` writes `torchvision_index.json` beside this file anew (a
minute). The index only narrows a search down: what it proposes is built without memory and compared name by name, shape
by shape, so that an index older than the installed torchvision proposes too little at worst.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from compress.checkpoint.building.without_memory import WithoutMemory

INDEX = Path(__file__).with_name("torchvision_index.json")
WITHOUT_AUX = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}


def names_digest(names: Iterable[str]) -> str:
    """A digest of a set of tensor names, BatchNorm's batch counters left out (old files lack them)."""
    counted = sorted(name for name in names if not name.endswith("num_batches_tracked"))
    return hashlib.blake2b("\n".join(counted).encode(), digest_size=8).hexdigest()


def build_torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A torchvision classifier with random weights. Raises ValueError for an unknown name, TypeError for arguments."""
    from torchvision import models

    if name in WITHOUT_AUX:
        arguments = {"init_weights": False, **arguments}
    module: nn.Module = models.get_model(name, weights=None, **arguments)
    return module


def classifier_names() -> list[str]:
    """The classification models of the installed torchvision."""
    from torchvision import models

    return [name for name in models.list_models(models) if not name.startswith("quantized_")]


@cache
def read_index() -> dict[str, list[tuple[str, dict[str, Any], str]]]:
    """Digest of the names → candidates (model, arguments, name of the weight with one row a class)."""
    index: dict[str, list[tuple[str, dict[str, Any], str]]] = json.loads(INDEX.read_text(encoding="utf-8"))
    return index


def make_index() -> dict[str, list[tuple[str, dict[str, Any], str]]]:
    """The index for the installed torchvision."""
    index: dict[str, list[tuple[str, dict[str, Any], str]]] = {}
    for name in classifier_names():
        for arguments in [{}, WITHOUT_AUX[name]] if name in WITHOUT_AUX else [{}]:
            shapes = []
            for classes in (1000, 7):
                with WithoutMemory(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    module = build_torchvision(name, {**arguments, "num_classes": classes})
                shapes.append({key: tuple(value.shape) for key, value in module.state_dict().items()})
            heads = [key for key in shapes[0] if shapes[0][key] != shapes[1][key] and key.endswith("weight")]
            index.setdefault(names_digest(shapes[0]), []).append((name, arguments, heads[-1]))
    return index


if __name__ == "__main__":
    INDEX.write_text(json.dumps(make_index(), indent=1) + "\n", encoding="utf-8")

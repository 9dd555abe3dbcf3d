"""Folders of weights that others write: the Hub's layout of timm and transformers, and what their trainers leave.

`config.json` says which class of the library, with which arguments; both are checked as a manifest's are. Weights stand
in one file or in several with an index. Nothing is executed and no other file is opened than those of the folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.checkpoint.building.arguments import is_denied
from compress.checkpoint.reading.read import Checkpoint, load_checkpoint, main_dtype
from compress.data.preprocessing import Preprocessing
from compress.errors import CheckpointError, UnsupportedError
from compress.strict_json import read_object

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.(safetensors|bin)")
MOST_SHARDS = 1000
WORDS_ONLY = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id", "auto_map",
    "tokenizer_class", "task_specific_params", "finetuning_task", "problem_type", "prefix", "pruned_heads",
    "torchscript",
}  # fmt: skip
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class WeightsFolder:
    """A folder of weights that this tool did not write.

    Attributes:
        files: that hold the weights.
        spec, arguments: the network that its `config.json` names; None and none where it names none.
        input_shape, preprocessing: what it says of inputs.
    """

    folder: Path
    files: tuple[Path, ...]
    spec: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None


def read_weights_folder(folder: str | Path) -> WeightsFolder | None:
    """What such a folder holds; None where it is a folder of this tool's own, or has no weights.

    Raises:
        CheckpointError: its files are damaged or name others.
        UnsupportedError: its network is not of timm or transformers.
    """
    folder = Path(folder)
    config: dict[str, Any] = {}
    if (folder / CONFIG).exists():
        config = read_object(folder / CONFIG, CheckpointError, "the configuration of a network")
        if "format" in config and "hashes" in config:
            return None
    files = weight_files(folder)
    if not files:
        return None
    weights = WeightsFolder(folder, files)
    try:
        if isinstance(config.get("architecture"), str):
            return read_timm(weights, config)
        if isinstance(config.get("architectures"), list) and config["architectures"]:
            return read_transformers(weights, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{str(folder / CONFIG)!r} is damaged: {error!r:.200}.") from None
    return weights


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights: one, or the shards of an index, which lie in the folder itself."""
    for name in SINGLE:
        if (folder / name).exists():
            return (folder / name,)
    for name in INDEXED:
        if (folder / name).exists():
            index = read_object(folder / name, CheckpointError, "an index of weights")
            names = index.get("weight_map")
            if not isinstance(names, dict) or not names:
                raise CheckpointError(f"{str(folder / name)!r} has no weight_map.")
            shards = list(dict.fromkeys(names.values()))
            for shard in shards:
                if not isinstance(shard, str) or not SHARD.fullmatch(shard) or ".." in shard:
                    raise CheckpointError(f"{str(folder / name)!r} names {shard!r:.80}, which is no file beside it.")
            if len(shards) > MOST_SHARDS:
                raise CheckpointError(f"{str(folder / name)!r} names {len(shards)} files; at most {MOST_SHARDS}.")
            return tuple(folder / str(shard) for shard in shards)
    return ()


def load_weights_folder(weights: WeightsFolder, *, trust_pickle: bool = False) -> Checkpoint:
    """The tensors of all its files as one checkpoint. Raises CompressError, also where two files hold one name."""
    parts = [load_checkpoint(path, trust_pickle=trust_pickle) for path in weights.files]
    if len(parts) == 1:
        return parts[0]
    state: dict[str, Any] = {}
    digest = hashlib.sha256()
    for part in parts:
        twice = state.keys() & part.state.keys()
        if twice or part.prefix:
            raise CheckpointError(f"{part.path.name!r} repeats `{min(twice, default=part.prefix)}` of another shard.")
        state.update(part.state)
        digest.update(part.sha256.encode())
    return replace(
        parts[0],
        state=state,
        module=None,
        path=weights.folder,
        sha256=digest.hexdigest(),
        dtype=main_dtype(state),
        bytes=sum(part.bytes for part in parts),
        trusted=any(part.trusted for part in parts),
    )


def read_timm(weights: WeightsFolder, config: Mapping[str, Any]) -> WeightsFolder:
    """timm's layout: `architecture`, `num_classes`, `model_args`, `pretrained_cfg`."""
    arguments = dict(config.get("model_args") or {})
    if isinstance(config.get("num_classes"), int):
        arguments.setdefault("num_classes", config["num_classes"])
    if isinstance(config.get("global_pool"), str) and config["global_pool"]:
        arguments.setdefault("global_pool", config["global_pool"])
    described = {**config, **(config.get("pretrained_cfg") or {})}
    shape, preprocessing = timm_inputs(described)
    return replace(
        weights,
        spec=f"timm:{config['architecture']}",
        arguments=arguments,
        input_shape=shape,
        preprocessing=preprocessing,
    )


def timm_inputs(config: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """Input shape and preprocessing of a timm configuration: mean, std, interpolation, `crop_pct` and `crop_mode`."""
    size = config.get("input_size")
    if not size or len(size) != 3:
        return None, None
    shape = tuple(int(side) for side in size)
    if config.get("mean") is None or config.get("std") is None:
        return shape, None
    height, width = shape[1:]
    share = float(config.get("crop_pct") or 1.0)
    resized = (int(height / share), int(width / share))
    squashed = config.get("crop_mode") == "squash" or height != width
    return shape, Preprocessing(
        mean=tuple(float(value) for value in config["mean"]),
        std=tuple(float(value) for value in config["std"]),
        resize=resized if squashed else resized[0],
        crop=(height, width) if height != width else height,
        interpolation="bicubic" if config.get("interpolation") == "bicubic" else "bilinear",
    )


def read_transformers(weights: WeightsFolder, config: Mapping[str, Any]) -> WeightsFolder:
    """transformers' layout: `architectures` names the class, the rest are fields of its configuration."""
    name = str(config["architectures"][0])
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{str(weights.folder)!r} holds quantized weights; give the network before quantization."
        )
    arguments = {
        key: value
        for key, value in config.items()
        if key not in WORDS_ONLY and not key.startswith("_") and not (is_denied(key) and not value)
    }
    labels = config.get("id2label")
    if isinstance(labels, dict) and labels and "num_labels" not in arguments:
        arguments["num_labels"] = len(labels)
    side, channels = config.get("image_size"), config.get("num_channels", 3)
    sides = (side, side) if isinstance(side, int) else tuple(side) if isinstance(side, list) else None
    return replace(
        weights,
        spec=f"transformers:{name}",
        arguments=arguments,
        input_shape=None if sides is None else (int(channels), *(int(extent) for extent in sides)),
        preprocessing=None if sides is None else read_processor(weights.folder / PREPROCESSOR),
    )


def read_processor(path: Path) -> Preprocessing | None:
    """The preprocessing of images in transformers' layout; None where there is none that this tool can do."""
    if not path.exists():
        return None
    known = read_object(path, CheckpointError, "the configuration of an image processor")
    if known.get("do_rescale", True) is not True or known.get("do_normalize", True) is not True:
        return None
    crops = known.get("do_center_crop", False)
    return Preprocessing(
        mean=tuple(known["image_mean"]) if known.get("image_mean") else None,
        std=tuple(known["image_std"]) if known.get("image_std") else None,
        resize=extent(known.get("size")) if known.get("do_resize", True) else None,
        crop=extent(known.get("crop_size")) if crops else None,
        interpolation=RESAMPLING.get(known.get("resample", 2), "bilinear"),
    )


def extent(size: Any) -> int | tuple[int, int] | None:
    """A size in transformers' notations."""
    if isinstance(size, dict):
        return size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
    return size if size is None or isinstance(size, int) else (size[0], size[1])

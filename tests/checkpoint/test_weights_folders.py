"""Folders in the Hub's layout and those that trainers leave: opened without --arch, and no file outside of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.checkpoint.folders import load_weights_folder, read_weights_folder, timm_inputs
from compress.errors import CheckpointError, CompressError, UnsupportedError
from compress.models import mlp
from compress.preparation import open_network
from compress.recipe import make_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
BERT = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 8,
}  # fmt: skip
WORDS = {
    "model_type": "bert", "transformers_version": "4.40.0", "torch_dtype": "float32", "_name_or_path": "/home/me/bert",
    "auto_map": {"AutoModel": "evil.Evil"}, "id2label": {"0": "a label, with words", "1": "b", "2": "c"},
    "label2id": {"b": 1}, "hidden_act": "gelu",
}  # fmt: skip


def opened(folder: Path, **options: Any) -> Any:
    """What a run makes of a folder."""
    return open_network(make_recipe({"checkpoint": str(folder), "data": "digits", **options}))


def write_timm(folder: Path, **changes: Any) -> torch.nn.Module:
    """A small model as timm pushes it."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    described = {"input_size": [3, 176, 176], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8}
    described |= {"interpolation": "bicubic", "fixed_input_size": False}
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": described, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_a_folder_of_timm_says_its_network_and_preprocessing(tmp_path: Path) -> None:
    model = write_timm(tmp_path / "hub")
    found = opened(tmp_path / "hub")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(found.module(images), model(images))
    shown = found.architecture.preprocessing
    assert (shown.mean, shown.std, shown.resize, shown.crop) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 220, 176)
    assert shown.interpolation == "bicubic"
    assert found.architecture.input_shape == (3, 176, 176)


def test_a_squashed_crop_resizes_both_sides() -> None:
    described = {"input_size": (3, 100, 100), "mean": (0.5,), "std": (0.5,), "crop_pct": 0.5, "crop_mode": "squash"}
    shape, preprocessing = timm_inputs(described)
    assert shape == (3, 100, 100)
    assert preprocessing is not None
    assert (preprocessing.resize, preprocessing.crop) == ((200, 200), 100)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_transformers_says_its_network(sharded: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = transformers.BertForSequenceClassification
    model = kind(transformers.BertConfig(**BERT, num_labels=3)).eval()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if sharded:
        names = sorted(state)
        parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for file, own in parts.items():
            save_file({name: state[name] for name in own}, tmp_path / file)
        index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, tmp_path / "model.safetensors")
    config = {"architectures": ["BertForSequenceClassification"], **BERT, **WORDS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(opened(tmp_path).module(tokens).logits, model(tokens).logits)


def test_a_folder_with_the_names_of_an_earlier_transformers_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=1, **sizes)).eval()
    model.save_pretrained(tmp_path / "hub")  # under the names that the Hub's files have
    with safe_open(tmp_path / "hub" / "model.safetensors", "pt") as file:
        assert "vit.encoder.layer.0.attention.attention.query.weight" in file.keys()  # noqa: SIM118
    found = opened(tmp_path / "hub")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(found.module(images).logits, model(images).logits)


def test_a_folder_without_a_configuration_takes_arch(tmp_path: Path) -> None:
    save_file(mlp([4, 6, 3]).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "optimizer.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    found = opened(tmp_path, arch="compress:mlp")
    assert found.architecture.arguments["widths"] == [4, 6, 3]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors", "..safetensors", "x.pkl", 3]
)
def test_an_index_names_files_of_its_own_folder_only(name: Any, tmp_path: Path) -> None:
    save_file(mlp([4, 6, 3]).state_dict(), tmp_path / "secret.safetensors")
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no file beside it"):
        read_weights_folder(tmp_path / "net")


def test_two_shards_with_one_name_are_refused(tmp_path: Path) -> None:
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(2)}, tmp_path / file)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_weights_folder(tmp_path)
    assert found is not None
    with pytest.raises(CheckpointError, match="repeats"):
        load_weights_folder(found)


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "hf-hub:stranger/net"},
        {"architecture": "resnet10t", "model_args": {"pretrained": True}},
        {"architecture": "resnet10t", "model_args": {"checkpoint_path": "x"}},
        {"architecture": "resnet10t", "pretrained_cfg": {"input_size": [3, "x", 4], "mean": [0], "std": [1]}},
        {"architecture": "resnet10t", "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0], "std": [0]}},
        {"architectures": ["os.system"]},
        {"architectures": ["TimmWrapperModel"]},
        {"architectures": [{"a": 1}]},
        {"architectures": ["BertModel"], "hidden_act": "../evil"},
        {"architectures": ["BertModel"], "attn_implementation": "stranger/kernel"},
        {"architectures": ["BertModel"], "num_hidden_layers": 1 << 23},
        {"architectures": ["BertModel"], "image_size": "x"},
    ],
)
def test_a_hostile_configuration_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    save_file(mlp([4, 6, 3]).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError):
        opened(tmp_path)


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_file(mlp([4, 6, 3]).state_dict(), tmp_path / "model.safetensors")
    config = {"architectures": ["BertModel"], "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantized"):
        opened(tmp_path)

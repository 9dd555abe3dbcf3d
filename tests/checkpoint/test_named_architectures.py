"""Networks of the transformers library and of timm, named with --arch: from a state dict to an artifact that loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compress
from compress.checkpoint.architecture import open_architecture
from compress.checkpoint.reading.read import load_checkpoint
from compress.cli import main
from compress.measures.outputs import named_outputs
from compress.preparation import build_network

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BERT = {"vocab_size": 40, "max_position_embeddings": 8, **SIZES}
LLAMA = {"vocab_size": 40, "num_key_value_heads": 1, **SIZES}
OPT = {"vocab_size": 40, **SIZES, "ffn_dim": 64, "max_position_embeddings": 8, "word_embed_proj_dim": 16}


def build(arch: str, arguments: dict[str, int]) -> nn.Module:
    """As the library's own documentation builds it."""
    package, _, name = arch.partition(":")
    library = pytest.importorskip(package)
    torch.manual_seed(0)
    if package == "timm":
        return library.create_model(name, pretrained=False, **arguments).eval()
    return getattr(library, name)(getattr(library, name).config_class(**arguments)).eval()


def save_distinct(module: nn.Module, path: Path) -> None:
    """A state dict as safetensors, a tied tensor under its first name alone."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            kept[name] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(kept, path)


@pytest.mark.parametrize(
    ("arch", "arguments", "width"),
    [
        ("transformers:BertForSequenceClassification", BERT, ["--keep", "0.5"]),
        ("transformers:LlamaForCausalLM", LLAMA, ["--params", "0.7"]),
        ("timm:test_resnet", {"num_classes": 10}, ["--keep", "0.5", "--layer", "layer1"]),
    ],
    ids=lambda value: value.partition(":")[2] if isinstance(value, str) else "",
)
def test_a_library_model_named_by_arch_is_cut_and_loads_again_with_the_same_outputs(
    arch: str, arguments: dict[str, int], width: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = build(arch, arguments)
    save_distinct(original, tmp_path / "weights.safetensors")
    generator = np.random.default_rng(0)
    images = generator.standard_normal((48, 3, 32, 32)).astype(np.float32)
    inputs = images if "timm" in arch else generator.integers(2, 40, (96, 6))
    np.savez(tmp_path / "data.npz", inputs=inputs)
    named = [text for key, value in arguments.items() for text in ("--arch-arg", f"{key}={value}")]
    files = ["--data", str(tmp_path / "data.npz"), "--output", str(tmp_path / "out"), "--json"]
    code = main([str(tmp_path / "weights.safetensors"), "--arch", arch, *named, *files, *width])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    report = json.loads(printed.out)
    before, after = report["cost"]["parameters"]
    assert after <= 0.7 * before if "--params" in width else after < before
    assert report["verification"]["narrowed_deviation"] <= 1e-4
    assert report["verification"]["reload_deviation"] <= 1e-6  # in a fresh process
    with torch.inference_mode():
        wanted = next(iter(named_outputs(original(torch.from_numpy(inputs))).values()))
        loaded = next(iter(named_outputs(compress.load(tmp_path / "out")(torch.from_numpy(inputs))).values()))
    assert loaded.shape == wanted.shape
    assert sum(value.numel() for value in compress.load(tmp_path / "out").parameters()) == after


def test_a_tied_tensor_may_stand_in_the_file_under_one_of_its_names_alone(tmp_path: Path) -> None:
    original = build("transformers:OPTForCausalLM", OPT)
    save_distinct(original, tmp_path / "weights.safetensors")
    checkpoint = load_checkpoint(tmp_path / "weights.safetensors")
    _, architecture = open_architecture(checkpoint, "transformers:OPTForCausalLM", OPT)
    loaded = build_network(checkpoint, architecture)
    assert len(checkpoint.state) < len(original.state_dict())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in original.state_dict().items())

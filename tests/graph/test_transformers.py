"""Models of the transformers library as they are: dictionaries and caches returned, sizes kept in configurations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.graph.trace import trace_network
from compress.units.find import find_units
from compress.units.surgery import module_outputs, narrow, relative_deviation, verify_narrowed

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=24, max_position_embeddings=16, word_embed_proj_dim=16)
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=24, max_position_embeddings=16)
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, intermediate_size=24))


@pytest.mark.parametrize(("build", "pooler"), [(opt, []), (llama, []), (bert, [16])])
def test_heads_and_inner_units_are_cut_exactly_and_matter(build: object, pooler: list[int]) -> None:
    torch.manual_seed(0)
    model: nn.Module = build().eval()  # type: ignore[operator]
    inputs = (torch.randint(2, 30, (2, 6)),)
    graph = trace_network(model, inputs)
    groups = find_units(graph, model)
    kept = {group.name: torch.arange(group.unit_count // 2) for group in groups if group.prunable}
    narrowed = narrow(model, kept, groups)
    heads = [2, 2] if build is llama else [4, 4]
    assert graph.batch_size is None
    assert sorted(group.unit_count for group in groups if group.prunable) == [*heads, *pooler, 24, 24]
    assert verify_narrowed(graph, model, kept, groups, narrowed, inputs) <= 1e-4
    assert relative_deviation(module_outputs(model, inputs), module_outputs(narrowed.module, inputs)) > 1e-3

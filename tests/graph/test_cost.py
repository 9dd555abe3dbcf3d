"""Multiply-accumulates are those of the operations, however torch fuses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.graph.cost import count_by_module, count_macs, latency_batches

WIDTH, HEADS, HIDDEN, STEPS = 24, 4, 48, 5


def attention_macs(width: int, steps: int) -> int:
    """Four projections, scores and their weighted sum, of all heads."""
    return 4 * steps * width**2 + 2 * steps**2 * width


def test_attention_counts_with_its_projections() -> None:
    module = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True).eval()  # has a fused form
    inputs = (torch.randn(2, STEPS, WIDTH),)
    whole = attention_macs(WIDTH, STEPS) + 2 * STEPS * WIDTH * HIDDEN
    assert count_macs(module, inputs) == whole
    assert sum(macs for _, macs in count_by_module(module, inputs).values()) == whole


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_every_step(kind: type[nn.RNNBase], gates: int) -> None:
    module = kind(8, 16, num_layers=2, batch_first=True).eval()  # type: ignore[call-arg]
    expected = STEPS * gates * 16 * ((8 + 16) + (16 + 16))
    assert count_macs(nn.Sequential(module), (torch.randn(2, STEPS, 8),)) == expected


def test_counting_leaves_the_fused_forms_as_they_were() -> None:
    count_macs(nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True).eval(), (torch.randn(2, 3, WIDTH),))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("shape", "batch"), [((3, 32, 32), 64), ((3, 224, 224), 16), ((3, 1024, 1024), 2), ((7,), 64)])
def test_latency_of_large_inputs_is_told_at_batches_that_fit_the_memory(shape: tuple[int, ...], batch: int) -> None:
    assert latency_batches((torch.empty(2, *shape, device="meta"),)) == (1, batch)


class Queries(nn.Module):
    """Learned queries, of which a view is handed to a module."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, STEPS, WIDTH))
        self.layer = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(self.queries.expand(len(inputs), -1, -1))
        return outputs


def test_a_module_called_with_a_view_of_a_parameter_is_counted() -> None:
    module = Queries().eval()
    assert count_macs(module, (torch.randn(2, 3),)) == STEPS * WIDTH * HIDDEN
    assert all(parameter.requires_grad for parameter in module.parameters())

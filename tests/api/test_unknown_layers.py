"""What is told of layers that hold no units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.api.steps.widths import unknown_layers
from compress.graph.trace import trace_network
from compress.units.find import find_units


class Voices(nn.Module):
    """A recurrent layer (B, T, 4) -> (B, 6), and a linear one that is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.memory(values)[0][:, -1])


def test_a_layer_of_a_kind_that_is_not_cut_is_named_with_its_type() -> None:
    module = Voices().eval()
    groups = find_units(trace_network(module, (torch.ones(2, 5, 4),)), module)
    assert unknown_layers(module, groups) == ["memory (LSTM)"]

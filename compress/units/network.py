"""A traced network with its units: what is compressed, whatever data it is compressed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.graph.program import Program
from compress.graph.trace import NetworkGraph
from compress.measures.outputs import Output
from compress.units.groups import Consumer, UnitGroup

LARGEST = 2**27  # bytes of one computed tensor: a dozen of them may live at once
FEWEST = 4  # samples of a batch that is made smaller


@dataclass(frozen=True, eq=False)
class Network:
    """A module, its graph, and what can be cut from it.

    For `Sequential(Conv2d(3, 8, 3), BatchNorm2d(8), ReLU(), Flatten(), Linear(8·6·6, 10))` on images (3, 8, 8) the
    program has five steps and the state nine tensors (with the batch norm's statistics and count). There are two
    groups: "0", 8 units of which each has 36 columns of the linear map, and "4", skipped because its units are the
    network's outputs.

    Attributes:
        module: eval mode, computing precision, on the device.
        program: its operations; `program.network` is the graph that torch.export gave.
        state: the module's tensors by name (parameters and buffers).
        groups: all groups of units, prunable or with a reason.
        examples: one small batch of every input, for tracing and for comparisons.
        outputs: every tensor that the network returns and that counts.
        answered: name of the output that the data's labels or targets are answers to; empty without any.
        biases: state names of zero biases that `module` has and the network as it was opened has not.
        filters: the depthwise convolutions.
    """

    module: nn.Module
    program: Program
    state: dict[str, Tensor]
    groups: tuple[UnitGroup, ...]
    examples: tuple[Tensor, ...]
    outputs: tuple[Output, ...] = ()
    answered: str = ""
    biases: tuple[str, ...] = ()
    filters: tuple[Consumer, ...] = ()

    @property
    def graph(self) -> NetworkGraph:
        """The traced graph."""
        return self.program.network

    @property
    def device(self) -> torch.device:
        """Where it lies and computes."""
        return self.examples[0].device

    @property
    def batch_size(self) -> int | None:
        """The one batch size that it runs on; None where any will do."""
        return self.graph.batch_size

    def batch_within(self, most: int) -> int:
        """Samples of a batch, at most so many: on a processor no computed tensor takes more than `LARGEST` bytes.

        A halved `most` is halved again until that holds. A network that runs on one batch size gets that.
        """
        if self.batch_size is not None or self.device.type != "cpu":
            return self.batch_size or most
        each = 4 * self.program.largest() / len(self.examples[0])
        while most > FEWEST and most * each > LARGEST:
            most //= 2
        return most

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of tensors that have several -> the name that they go by."""
        return self.graph.aliases

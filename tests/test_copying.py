"""Networks that keep computed tensors, in attributes, containers and buffers, are copied after they have run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.copying import deep_copy


class Keeping(nn.Module):
    """Leaves its features in a list and a dictionary, as those do that show attention maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.features: list[Tensor] = []
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.features, self.seen["hidden"] = [hidden], hidden
        result: Tensor = self.last(torch.relu(self.second(hidden)))
        return result


class Counting(Keeping):
    """Updates a buffer under autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            hidden = torch.relu(self.first(x))
            self.get_buffer("mean").lerp_(hidden.mean(0), 0.01)
        result: Tensor = self.last(torch.relu(self.second(hidden)))
        return result


@pytest.mark.parametrize("kind", [Keeping, Counting])
def test_a_network_that_has_run_is_compressed_and_trained(kind: type[Keeping]) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    net(torch.randn(5, 10))
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    batches = [(torch.randn(40, 10), torch.randint(0, 3, (40,))) for _ in range(4)]
    result = compress.prune(net, batches, keep=0.5, progress=False)
    assert [layer.kept for layer in result.report.layers] == [12, 8]
    taught = compress.finetune(net, batches, epochs=1, progress=False).model
    assert taught(batches[0][0]).shape == (40, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Averaging(Keeping):
    """Subtracts a running mean that it computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.mean = 0.9 * self.get_buffer("mean") + 0.1 * hidden.mean(0)
        result: Tensor = self.last(torch.relu(self.second(hidden - self.mean)))
        return result


def test_a_buffer_that_is_computed_from_the_last_batch_ends_the_gradient() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(40, 10), torch.randint(0, 3, (40,))) for _ in range(4)]
    taught = compress.finetune(Averaging(), batches, epochs=2, progress=False).model
    assert taught.get_buffer("mean").grad_fn is None
    assert bool(taught.get_buffer("mean").any())


def test_what_was_computed_is_a_constant_of_the_copy_and_stays_one_object() -> None:
    weight = nn.Parameter(torch.ones(3))
    computed = weight * 2
    first, (second, leaf) = deep_copy([computed, (computed, weight)])
    assert first is second
    assert not first.requires_grad
    assert first.tolist() == [2, 2, 2]
    assert first.data_ptr() != computed.data_ptr()
    assert leaf.requires_grad
    assert computed.requires_grad
    known = torch.zeros(1)
    assert deep_copy([computed], {id(computed): known})[0] is known

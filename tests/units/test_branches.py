"""Blocks that go as a whole: which there are, and that the network without them is the masked one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.removed import Removed, remove_modules
from compress.errors import SurgeryError
from compress.preparation import trace
from compress.units.branches import Branch, constant_part, find_branches, replacements
from compress.units.network import Network
from compress.units.surgery import Narrowed, narrow, verify_narrowed
from tests.networks import randomise


class Basic(nn.Module):
    """Two convolutions and a shortcut; the sum is written into the branch, or not."""

    def __init__(self, channels: int, *, written: bool = True, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.written:
            out += self.shortcut(x)
        else:
            out = self.shortcut(x) + out
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(channels, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, channels, 1)])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.body[0](x))
        return torch.relu(x + self.body[2](torch.relu(self.body[1](out))))


class Inverted(nn.Module):
    """Expanded, filtered channel by channel, gated, projected."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.filter = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.relu6(self.filter(nn.functional.relu6(self.expand(x))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(out.mean((2, 3), keepdim=True)))))
        return x + self.project(out * gate)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * self.size))


class Layer(nn.Module):
    """A transformer's layer, its scale in front of the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, 4), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.scale.reshape(1, 1, -1) * self.mlp(self.norm2(x)).view(x.size())


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], list[str]]] = {
    "basic, written into": (
        nn.Sequential(nn.Conv2d(3, 4, 1), Basic(4), Basic(4)),
        (3, 7, 6),
        ["1 (conv1, bn1, conv2, bn2)", "2 (conv1, bn1, conv2, bn2)"],
    ),
    "basic, added": (
        nn.Sequential(nn.Conv2d(3, 4, 1), Basic(4, written=False)),
        (3, 7, 6),
        ["1 (conv1, bn1, conv2, bn2)"],
    ),
    "smaller behind": (
        nn.Sequential(nn.Conv2d(3, 4, 1), Basic(4, written=False, stride=2)),
        (3, 8, 6),
        ["1 (conv1, bn1, conv2, bn2)"],
    ),
    "smaller behind, written into": (nn.Sequential(nn.Conv2d(3, 4, 1), Basic(4, stride=2)), (3, 8, 6), []),
    "bottleneck": (
        nn.Sequential(nn.Conv2d(3, 4, 1), Bottleneck(4)),
        (3, 5, 5),
        ["1.body (0, 1, 2)"],
    ),
    "inverted, gated": (
        nn.Sequential(nn.Conv2d(3, 4, 1), Inverted(4)),
        (3, 5, 5),
        ["1 (expand, filter, squeeze, excite, project)"],
    ),
    "transformer": (
        nn.Sequential(nn.Linear(5, 8), Layer(8)),
        (6, 5),
        ["1 (norm1, attention)", "1 (norm2, mlp)"],
    ),
    "no shortcut": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), (3, 5, 5), []),
}  # fmt: skip


class Averaged(nn.Module):
    """What the block adds depends on how long the sequence is."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.into(x))) / x.shape[0]


def test_a_constant_that_depends_on_a_size_is_none() -> None:
    module = randomise(nn.Sequential(nn.Linear(3, 4), Averaged()).double())
    network = trace(module, (torch.ones(3, 3, dtype=torch.float64),), couple=False)
    assert find_branches(network, network.groups) == ()


def traced(name: str) -> Network:
    module, shape, _ = NETWORKS[name]
    module = randomise(copy.deepcopy(module).double())
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return trace(module, (inputs,), couple=False)


def removed(network: Network, branches: tuple[Branch, ...]) -> tuple[dict[str, Tensor], Narrowed]:
    kept = {name: torch.arange(0) for branch in branches for name in branch.groups}
    replaced = replacements(network, branches, kept, {})
    return kept, narrow(network.module, kept, network.groups, replaced=replaced)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_found_front_to_back(name: str) -> None:
    network = traced(name)
    assert [branch.name for branch in find_branches(network, network.groups)] == NETWORKS[name][2]


@pytest.mark.parametrize("name", [name for name, (_, _, found) in NETWORKS.items() if found])
def test_the_network_without_a_block_is_the_masked_one(name: str) -> None:
    network = traced(name)
    for branch in find_branches(network, network.groups):
        kept, narrowed = removed(network, (branch,))
        deviation = verify_narrowed(
            network.graph, network.module, kept, network.groups, narrowed, network.examples, tolerance=1e-9
        )
        assert deviation <= 1e-9
        left = set(narrowed.module.state_dict())
        gone = {name for name in network.module.state_dict() if branch.holds(name)}
        assert gone
        assert left & gone == set()
        assert left - set(network.module.state_dict()) <= {f"{path}.value" for path in branch.modules}


def test_a_network_without_a_block_is_rebuilt_from_the_original_and_plain_data() -> None:
    network = traced("basic, written into")
    _, narrowed = removed(network, find_branches(network, network.groups)[:1])
    again = copy.deepcopy(NETWORKS["basic, written into"][0]).double().eval()
    remove_modules(again, narrowed.removed, narrowed.module.state_dict())
    again.double().load_state_dict(narrowed.module.state_dict())
    assert torch.equal(again(network.examples[0]), narrowed.module(network.examples[0]))


def test_a_block_with_a_layer_that_must_stay_is_none() -> None:
    network = traced("bottleneck")
    allowed = [group for group in network.groups if group.name != "1.body.0"]
    assert find_branches(network, allowed) == ()


def test_groups_without_units_are_refused_where_no_block_goes_with_them() -> None:
    network = traced("basic, added")
    with pytest.raises(ValueError, match="nonempty"):
        narrow(network.module, {"1.conv1": torch.arange(0)}, network.groups)


def test_a_removed_module_gives_a_tensor_of_its_own() -> None:
    network = traced("basic, written into")
    _, narrowed = removed(network, find_branches(network, network.groups))
    first = narrowed.module(network.examples[0]).clone()
    assert torch.equal(narrowed.module(network.examples[0]), first)


def test_values_along_two_dimensions_are_no_constant() -> None:
    assert constant_part(torch.arange(4.0).reshape(1, 4, 1, 1).expand(2, 4, 3, 3)).shape == (1, 4, 1, 1)
    with pytest.raises(SurgeryError, match="no constant"):
        constant_part(torch.arange(12.0).reshape(1, 4, 3, 1))


@pytest.mark.parametrize("path", ["", "9", "1.conv9"])
def test_what_is_no_module_cannot_be_removed(path: str) -> None:
    module = copy.deepcopy(NETWORKS["basic, added"][0])
    with pytest.raises(SurgeryError):
        remove_modules(module, {path: {"along": [], "outputs": 0}}, {})


def test_a_module_under_two_names_is_removed_under_both() -> None:
    shared = nn.Linear(3, 3)
    module = nn.ModuleDict({"one": shared, "two": nn.Sequential(shared)})
    remove_modules(module, {"one": {"along": [], "outputs": 0}}, {"one.value": torch.zeros(1, 3)})
    assert isinstance(module["one"], Removed)
    assert module["two"][0] is module["one"]

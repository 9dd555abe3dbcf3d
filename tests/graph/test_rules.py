"""One rule for each operation, one tiny network for each rule: its groups, and that cutting equals masking."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress.errors import TraceError
from compress.graph.ops import Layout
from compress.graph.rules import RULES
from compress.graph.trace import trace_network
from compress.models.resnet import resnet_cifar10
from compress.units.find import find_units
from compress.units.groups import SkipKind
from compress.units.surgery import narrow
from tests.networks import Function, analyse

IMAGE = (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)
ROWS = (torch.randn(2, 5, generator=torch.Generator().manual_seed(0)),)
TOKENS = (torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)),)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def chain(middle: Any, channels: int = 8, read: int | None = None) -> Function:
    """conv a → `middle` → conv b → output."""
    return Function(lambda m, x: m["b"](middle(m["a"](x))), a=conv(3, channels), b=conv(read or channels, 2, 1))


@pytest.mark.parametrize(
    ("middle", "activation", "homogeneous"),
    [
        (functional.relu, "relu", True),
        (lambda x: functional.leaky_relu(x, 0.1), "leaky_relu", True),
        (functional.gelu, "gelu", False),
        (functional.silu, "silu", False),
        (functional.hardswish, "hardswish", False),
        (lambda x: functional.max_pool2d(torch.tanh(x), 2), "tanh", False),
        (lambda x: functional.avg_pool2d(torch.relu_(x), 2), "relu", True),
        (lambda x: functional.interpolate(x, scale_factor=2), None, True),
        (lambda x: functional.pad(functional.relu6(x), (1, 1, 0, 0)), "relu6", False),
        (lambda x: functional.max_unpool2d(*functional.max_pool2d(x, 2, return_indices=True), 2), None, True),
        (lambda x: x.roll(1, 2).flip(3) * 2, None, True),
        (lambda x: x + 1, None, False),
        (lambda x: 2**x, "pow", False),
        (lambda x: torch.max(x, -x), None, False),
        (lambda x: torch.fmin(x, x.mT.mT), None, False),
        (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), None, False),
    ],
)
def test_operations_on_single_values_keep_channels_apart(
    middle: Any, activation: str | None, homogeneous: bool
) -> None:
    group = analyse(chain(middle), IMAGE)["layers.a"]
    assert group.skip_reason is None
    assert (group.unit_count, group.activation, group.homogeneous) == (8, activation, homogeneous)


@pytest.mark.parametrize(
    ("middle", "units", "read"),
    [
        (lambda x: torch.cat([x, -x], 1), 8, 16),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 4, 8),
        (lambda x: functional.glu(x, 1), 4, 4),
        (lambda x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], 4, 4),
        (lambda x: torch.mul(*x.split(x.shape[1] // 2, 1)), 4, 4),
        (lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), 4, 8),
        (lambda x: torch.stack([x, x], 2).flatten(1, 2), 8, 16),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2).unflatten(2, (6, 6)), 8, 8),
        (lambda x: x.repeat(1, 2, 1, 1), 8, 16),
        (lambda x: x.repeat_interleave(2, 1), 8, 16),
        (lambda x: functional.pixel_shuffle(x, 2), 2, 2),
        (lambda x: functional.pixel_unshuffle(x, 2), 8, 32),
        (lambda x: functional.unfold(x, 3, padding=1).unflatten(2, (6, 6)), 8, 72),
        (lambda x: functional.fold(functional.unfold(x, 3, padding=1).relu(), 6, 3, padding=1), 8, 8),
        (lambda x: x.unsqueeze(1).squeeze(1).movedim(1, -1).movedim(-1, 1), 8, 8),
    ],
)
def test_rearranged_channels_are_followed(middle: Any, units: int, read: int) -> None:
    groups = analyse(chain(middle, 8, read), IMAGE)
    assert [group.unit_count for group in groups.values() if group.skip_reason is None] == [units]


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda x: torch.cumsum(x, 1), "competes"),
        (lambda x: functional.softmax(x, 1), "competes"),
        (lambda x: x.sum(1, keepdim=True).expand(-1, 8, -1, -1), "reduced over"),
        (lambda x: x.amax(1, keepdim=True) + x, "reduced over"),
        (lambda x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], "index"),
        (lambda x: x.roll(1, 1), "moved"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, -1, 1)), "padded"),
        (lambda x: x[:, :1] + x, "fixed positions"),
        (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), "fixed in Python"),
        (lambda x: torch.lgamma(x.abs() + 1), "lgamma, which has no rule"),
        (lambda x: x.reshape(x.shape[0], 8, 36).reshape(x.shape[0], 36, 8).reshape(x.shape[0], 8, 6, 6), "mixes"),
        (lambda x: x + torch.arange(8.0, dtype=x.dtype).reshape(1, 8, 1, 1), "cannot be cut with it"),
    ],
)
def test_a_unit_that_matters_elsewhere_is_refused_with_the_operation_named(middle: Any, reason: str) -> None:
    group = analyse(chain(middle), IMAGE)["layers.a"]
    assert reason in (group.skip_reason or "")


def test_a_rule_that_cannot_read_a_form_of_its_operation_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flow: object, node: object) -> None:
        raise TypeError("of a form")

    monkeypatch.setitem(RULES, "tanh", dataclasses.replace(RULES["tanh"], channels=fail))
    group = analyse(chain(torch.tanh), IMAGE)["layers.a"]
    assert group.skip_reason == "it reaches the operation tanh, in a form that its rule does not know"


@pytest.mark.parametrize(
    "middle",
    [lambda x: x / x.shape[1], lambda x: x + x.size(1) ** 0.5, lambda x: x * x.numel() / x.shape[0]],
)
def test_units_whose_number_is_computed_with_are_refused_and_no_others(middle: Any) -> None:
    net = Function(
        lambda m, x: m["c"](torch.relu(m["b"](middle(m["a"](x))))), a=conv(3, 8), b=conv(8, 6), c=conv(6, 2, 1)
    )
    groups = analyse(net, IMAGE)
    assert groups["layers.a"].skip_reason == SkipKind.COUNTED.value
    assert groups["layers.b"].prunable


@pytest.mark.parametrize("norm", [lambda x: functional.group_norm(x, 2), functional.instance_norm])
def test_channels_that_a_normalisation_takes_for_positions_are_refused(norm: Any) -> None:
    net = Function(lambda m, x: m["b"](norm(m["a"](x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    assert "is averaged over by" in str(analyse(net, TOKENS)["layers.a"].skip_reason)


class PerSample(nn.Module):
    """A convolution whose weight is made for each sample: as many groups as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(4, 3, 3, 3)), conv(4, 6, 1)
        self.last = conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        weight = (self.weight * x.mean((2, 3))[:, None, :, None, None]).flatten(0, 1)
        x = functional.conv2d(x.flatten(0, 1)[None], weight, padding=1, groups=samples)
        return self.last(torch.relu(self.out(x.unflatten(1, (samples, 4))[0])))


def test_a_convolution_with_a_group_for_each_sample_stays_whole_and_the_rest_is_cut() -> None:
    groups = analyse(PerSample(), IMAGE)
    assert [name for name, group in groups.items() if group.prunable] == ["out"]


def test_channels_between_zeros_of_a_fixed_width_go_with_the_positions_behind_the_padding() -> None:
    network = Function(
        lambda m, x: m["c"](functional.pad(m["a"](x).relu(), (0, 0, 0, 0, 1, 3)) + m["b"](x)),
        a=conv(3, 4),
        b=conv(3, 8),
        c=conv(8, 2, 1),
    )
    groups = analyse(network, IMAGE, couple=True)
    assert groups["layers.a"].skip_reason is None
    assert groups["layers.a"].producers == ("layers.a", "layers.b")
    beside = [group for name, group in groups.items() if name.startswith("layers.b")]
    assert [group.unit_count for group in beside] == [1, 3]
    assert "fixed in Python" in (beside[1].skip_reason or "")


def test_zeros_whose_widths_are_attributes_are_cut_on_either_side() -> None:
    groups = analyse(resnet_cifar10(8, width=4), (torch.randn(2, 3, 8, 8),), couple=True)
    assert [name for name, group in groups.items() if group.skip_reason is not None] == ["linear"]
    changed = {rule.name for group in groups.values() for rule in group.attributes}
    assert {"channels_before", "channels_after"} <= changed


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: torch.zeros_like(x).index_add(1, torch.tensor([1, 0, 1, 2]), x),
        lambda x: torch.zeros_like(x).scatter_add(1, torch.tensor([1, 0, 1, 2])[None, :, None].expand(x.shape), x),
        lambda x: x.gather(1, x.mean(2).argsort(1)[..., None].expand(-1, -1, x.shape[2])),
        lambda x: x.sort(1)[0],
        lambda x: x.topk(2, 1)[0],
    ],
)
def test_channels_pass_what_chooses_or_orders_positions(middle: Any) -> None:
    net = Function(lambda m, x: m["b"](middle(m["a"](x).relu())), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    group = analyse(net, TOKENS)["layers.a"]
    assert (group.skip_reason, group.unit_count) == (None, 8)


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda x: x.sort(2)[0], "is ordered by sort"),
        (lambda x: torch.zeros_like(x).index_add(2, torch.arange(8).flip(0), x), "chosen by an index"),
        (lambda x: x.gather(2, x.argsort(2)), "is ordered by argsort"),
    ],
)
def test_channels_that_are_chosen_or_ordered_are_refused(middle: Any, reason: str) -> None:
    net = Function(lambda m, x: m["b"](middle(m["a"](x).relu())), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    assert reason in str(analyse(net, TOKENS)["layers.a"].skip_reason)


def test_channels_pass_a_convolution_that_takes_them_for_places_and_reads_each_by_itself() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m["b"](m["c"](m["a"](x).relu()).tanh())  # type: ignore[no-any-return]

    for size, reason in ((1, None), (3, "it is a spatial dimension of conv1d in layers.c")):
        net = Function(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Conv1d(4, 4, size, padding=size // 2))
        assert analyse(net, TOKENS)["layers.a"].skip_reason == reason


def test_a_flattened_unit_owns_all_its_positions() -> None:
    network = Function(lambda m, x: m["b"](m["a"](x).relu().flatten(1)), a=conv(3, 4), b=nn.Linear(144, 2))
    (consumer,) = analyse(network, IMAGE)["layers.a"].consumers
    assert tuple(consumer.positions.shape) == (4, 36)


def test_batch_norm_scale_shift_and_statistics_go_with_the_unit() -> None:
    network = Function(
        lambda m, x: m["b"](m["n"](m["a"](x)).relu()), a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 2, 1)
    )
    group = analyse(network, IMAGE)["layers.a"]
    assert {part.name for part in group.slices if ".n." in part.name} == {
        f"layers.n.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")
    }


@pytest.mark.parametrize(
    ("norm", "units"),
    [(nn.LayerNorm([6]), 6), (nn.RMSNorm([6]), 6)],
)
def test_a_normalisation_over_units_is_taken_over_the_kept_ones(norm: nn.Module, units: int) -> None:
    network = Function(lambda m, x: m["b"](m["n"](m["a"](x))), a=nn.Linear(5, 6), n=norm, b=nn.Linear(6, 2))
    group = analyse(network, ROWS)["layers.a"]
    assert group.unit_count == units
    assert group.statistics
    assert not group.homogeneous


def test_group_norm_loses_whole_groups() -> None:
    network = Function(lambda m, x: m["b"](m["n"](m["a"](x))), a=conv(3, 8), n=nn.GroupNorm(4, 8), b=conv(8, 2, 1))
    group = analyse(network, IMAGE)["layers.a"]
    assert (group.unit_count, group.statistics) == (4, ())


def test_a_depthwise_convolution_passes_the_units_on() -> None:
    network = Function(
        lambda m, x: m["b"](m["d"](m["a"](x)).relu()), a=conv(3, 8, 1), d=conv(8, 8, groups=8), b=conv(8, 2, 1)
    )
    group = analyse(network, IMAGE)["layers.a"]
    assert (group.unit_count, group.producers) == (8, ("layers.a",))
    assert "layers.d.groups" in [rule.path for rule in group.attributes]


def test_a_grouped_convolution_is_cut_by_whole_groups() -> None:
    network = Function(
        lambda m, x: m["b"](m["g"](m["a"](x)).relu()), a=conv(3, 8, 1), g=conv(8, 12, groups=4), b=conv(12, 2, 1)
    )
    assert analyse(network, IMAGE)["layers.a"].unit_count == 4


def test_a_transposed_convolution_is_producer_and_consumer() -> None:
    network = Function(
        lambda m, x: m["b"](m["t"](m["a"](x).relu()).relu()),
        a=conv(3, 4),
        t=nn.ConvTranspose2d(4, 6, 2),
        b=conv(6, 2, 1),
    )
    groups = analyse(network, IMAGE)
    assert (groups["layers.a"].unit_count, groups["layers.t"].unit_count) == (4, 6)


def test_a_squeeze_and_excite_gate_belongs_to_the_unit() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = m["a"](x).relu()
        return m["b"](y * m["up"](m["down"](y.mean((2, 3), keepdim=True)).relu()).sigmoid())

    groups = analyse(Function(forward, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8, 2, 1)), IMAGE)
    assert groups["layers.a"].producers == ("layers.a", "layers.up")
    assert groups["layers.a"].skip_reason is None
    assert groups["layers.down"].unit_count == 4


def test_a_gated_mlp_unit_is_a_row_of_both_projections() -> None:
    network = Function(
        lambda m, x: m["d"](functional.silu(m["g"](x)) * m["u"](x)),
        g=nn.Linear(5, 6),
        u=nn.Linear(5, 6),
        d=nn.Linear(6, 2),
    )
    assert analyse(network, ROWS)["layers.g"].producers == ("layers.g", "layers.u")


class Attention(nn.Module):
    """Fused projection, heads counted by an attribute, output width by another."""

    def __init__(self, heads: int = 3, width: int = 2, *, baked: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.baked = heads, width, heads * width, baked
        self.qkv = nn.Linear(6, 3 * heads * width)
        self.proj = nn.Linear(heads * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = 3 if self.baked else self.num_heads
        q, k, v = self.qkv(x).reshape(batch, length, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, self.attn_dim)
        return self.proj(y)


def test_an_attention_head_is_a_unit_and_its_attributes_follow() -> None:
    group = analyse(Attention(), TOKENS)["qkv"]
    assert (group.unit_count, group.skip_reason) == (3, None)
    assert {rule.path for rule in group.attributes} >= {"num_heads", "attn_dim"}
    assert group.consumers[0].positions.shape == (3, 2)


def test_heads_written_down_in_forward_are_refused() -> None:
    assert "fixed in Python" in (analyse(Attention(baked=True), TOKENS)["qkv"].skip_reason or "")


def test_a_residual_stream_is_cut_only_when_coupled() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = m["a"](x)
        y = y + m["c"](m["b"](y).relu())
        return m["d"](y)

    def build() -> Function:
        return Function(forward, a=conv(3, 4), b=conv(4, 6), c=conv(6, 4), d=conv(4, 2, 1))

    alone, coupled = analyse(build(), IMAGE), analyse(build(), IMAGE, couple=True)
    assert alone["layers.a"].skip_reason == "residual stream shared by 2 producers; use --couple"
    assert alone["layers.b"].skip_reason is None
    assert coupled["layers.a"].producers == ("layers.a", "layers.c")
    assert [consumer.weight for consumer in coupled["layers.a"].consumers] == ["layers.b.weight", "layers.d.weight"]


def test_matrix_products_and_einsum_with_activations_refuse_what_they_sum() -> None:
    network = Function(
        lambda m, x: torch.einsum("bik,bjk->bij", m["a"](x), m["b"](x)), a=nn.Linear(6, 4), b=nn.Linear(6, 4)
    )
    assert "summed over" in (analyse(network, TOKENS)["layers.a"].skip_reason or "")


def test_a_parameter_matrix_on_the_right_is_a_consumer() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.matrix = nn.Linear(6, 4), nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).relu() @ self.matrix

    assert analyse(Product(), TOKENS)["a"].consumers[0].layout is Layout.LINEAR_TRANSPOSED


def test_tied_weights_shrink_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(functional.relu(self.table(x)))

    group = analyse(Tied(), (torch.zeros(2, 3, dtype=torch.int64),))["table"]
    assert {(part.name, part.dim) for part in group.slices} == {("table.weight", 1), ("head.weight", 1)}


def test_weight_norm_passes_rows_and_refuses_the_columns_it_normalises() -> None:
    normed = nn.utils.parametrizations.weight_norm
    network = Function(lambda m, x: m["b"](m["a"](x).relu()), a=normed(nn.Linear(5, 6)), b=nn.Linear(6, 2))
    assert analyse(network, ROWS)["layers.a"].skip_reason is None
    network = Function(lambda m, x: m["b"](m["a"](x).relu()), a=nn.Linear(5, 6), b=normed(nn.Linear(6, 2)))
    assert "part of a weight norm" in (analyse(network, ROWS)["layers.a"].skip_reason or "")


def test_prelu_slopes_go_with_their_channels() -> None:
    network = Function(lambda m, x: m["b"](m["p"](m["a"](x))), a=conv(3, 4), p=nn.PReLU(4), b=conv(4, 2, 1))
    group = analyse(network, IMAGE)["layers.a"]
    assert "layers.p.weight" in {part.name for part in group.slices}
    assert group.homogeneous


def test_the_output_is_never_cut() -> None:
    network = Function(lambda m, x: m["a"](x), a=nn.Linear(5, 6))
    assert analyse(network, ROWS)["layers.a"].skip_reason == "it is an output of the network"


class StreamAttention(nn.Module):
    """torch's own attention on a residual stream: forward() takes the heads' width from the stream's."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(6, heads * width)
        self.attend = nn.ModuleList(nn.MultiheadAttention(heads * width, heads, batch_first=True) for _ in range(2))
        self.head = nn.Linear(heads * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for attend in self.attend:
            x = x + attend(x, x, x, need_weights=False)[0]
        return self.head(x)


@pytest.mark.parametrize("width", [2, 3])
def test_heads_and_the_stream_that_gives_their_width_are_cut_together(width: int) -> None:
    group = analyse(StreamAttention(3, width), TOKENS, couple=True)["stem"]
    assert (group.unit_count, group.skip_reason, group.coupled) == (3, None, True)
    assert {rule.path: rule.per_unit for rule in group.attributes}["attend.1.num_heads"] == 1
    assert len(group.consumers) == 5  # both attentions' q, k, v (one weight) and output, and the head


def test_without_coupling_such_heads_are_refused() -> None:
    groups = analyse(StreamAttention(3, 2), TOKENS)
    assert "--couple" in (groups["attend.0"].skip_reason or "")


def test_as_many_heads_as_channels_in_each_are_told_apart() -> None:
    group = analyse(Attention(heads=3, width=3), TOKENS)["qkv"]
    assert "num_heads" in [rule.path for rule in group.attributes]
    assert "head_dim" not in [rule.path for rule in group.attributes]


def test_a_constant_made_in_the_shape_of_an_activation_loses_the_same_units() -> None:
    assert analyse(chain(lambda x: x + x.new_zeros(x.shape[1:])), IMAGE)["layers.a"].skip_reason is None


def test_a_shape_kept_as_a_tuple_follows() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shape = conv(3, 8), conv(8, 2), (8, 1, 1)
            self.scale = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale.view(self.shape))

    group = analyse(Scale(), IMAGE)["a"]
    assert group.skip_reason is None
    assert [rule.index for rule in group.attributes if rule.path == "shape"] == [0]


class Remembering(nn.Module):
    """Keeps a tensor that forward() computed from its parameters, as some attention biases do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = nn.Linear(5, 6), nn.Linear(6, 2), nn.Parameter(torch.zeros(6))
        self.bias_cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.bias_cache:
            self.bias_cache["bias"] = self.bias * 2
        return self.b(self.a(x) + self.bias_cache["bias"])


def test_what_forward_remembers_does_not_outlive_the_trace_or_the_cut() -> None:
    network, rows = Remembering(), ROWS[0].float()
    groups = find_units(trace_network(network, (rows,)), network)
    assert not network.bias_cache
    network(rows)
    assert network.bias_cache["bias"].shape == (6,)
    (group,) = (each for each in groups if each.name == "a")
    if group.prunable:
        assert narrow(network, {"a": torch.arange(3)}, groups).module(rows).shape == (2, 2)
    else:  # torch 2.8 reads what is kept as a constant of the program: refused, not damaged
        assert "add" in str(group.skip_reason)
        assert torch.__version__ < "2.9"


class Branching(nn.Module):
    """Takes one of two ways by what it computes, which no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one_way, self.other_way = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        result: Tensor = self.one_way(hidden) if hidden.sum() > 0 else self.other_way(hidden)
        return result


def test_what_the_exporter_prints_of_a_network_that_it_cannot_follow_is_not_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(TraceError, match=r"decides by values .*test_rules.py, line \d+: `result: "):
        trace_network(Branching(), (ROWS[0].float(),))
    assert capfd.readouterr() == ("", "")


class Masked(nn.Module):
    """Takes one of two ways by what kind a mask is, which no input changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(2, 2).tril()
        hidden: Tensor = self.first(x).relu() if bool((mask == mask.tril()).all()) else self.first(x)
        return self.last(hidden)  # type: ignore[no-any-return]


def test_a_decision_that_no_input_changes_is_followed() -> None:
    network = Masked()
    graph = trace_network(network, (ROWS[0].float(),))
    group = {each.name: each for each in find_units(graph, network)}["first"]
    assert (group.skip_reason, group.activation) == (None, "relu")


def test_a_part_compiled_by_jit_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(5, 6))
    with pytest.raises(TraceError, match=r"`0` is compiled by torch.jit"):
        trace_network(nn.Sequential(scripted, nn.ReLU()), ROWS)


class DataWriting(nn.Linear):
    """Masks its weight in place, as autoregressive convolutions are often written."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= torch.ones_like(self.weight).tril()
        return super().forward(x)


def test_writing_into_the_networks_own_tensors_is_refused_with_what_to_do() -> None:
    network = nn.Sequential(DataWriting(5, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    said = ""
    try:
        graph = trace_network(network, ROWS)
    except TraceError as fault:
        said = str(fault)
    if said:
        assert "through .data, which no graph holds; compute the changed one anew" in said
    else:  # torch 2.8 exports it, with the writing as an operation that holds the units
        assert all(group.skip_reason for group in find_units(graph, network))


def test_an_instance_norm_without_a_scale_is_told_how_many_channels_are_left() -> None:
    network = nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8), nn.ReLU(), conv(8, 2, 1)).eval()
    groups = find_units(trace_network(network, IMAGE), network)
    (group,) = [each for each in groups if each.prunable]
    narrowed = narrow(network, {group.name: torch.arange(3)}, groups).module
    assert narrowed[1].num_features == 3  # type: ignore[index]
    narrowed(*IMAGE)  # torch would warn of another number


class Nothing(nn.Module):
    """A layer that is read by one without outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)
        self.nothing = nn.Linear(8, 2)
        self.nothing.weight, self.nothing.bias = nn.Parameter(torch.zeros(0, 8)), nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return torch.cat([self.second(hidden), self.nothing(hidden)], 1)


def test_a_reader_without_outputs_shrinks_and_is_fitted_to_nothing() -> None:
    network = Nothing().eval()
    result = compress.prune(network, [torch.randn(64, 5, generator=torch.Generator().manual_seed(0))], keep=0.5)
    assert result.model.nothing.weight.shape == (0, 4)
    assert result.model(ROWS[0].float()).shape == (2, 2)

"""Small networks of unusual shapes, with random weights: named by `--arch tests.strange_networks:NAME`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_norm(before: int, after: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias and its batch norm, with statistics that are not those of a fresh one."""
    norm = nn.BatchNorm2d(after)
    norm.running_mean = 0.1 * torch.randn(after)
    norm.running_var = 0.5 + torch.rand(after)
    return [nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), norm]


def head(channels: int) -> list[nn.Module]:
    """Global pooling and a classifier of five classes."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


class Residual(nn.Module):
    """x + body(x), then an activation."""

    def __init__(self, body: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.body(x))  # type: ignore[no-any-return]


def inverted_residual(expand: int = 3) -> nn.Module:
    """MobileNet's block: pointwise, depthwise, pointwise, ReLU6, no bias anywhere."""
    wide = 6 * expand
    body = nn.Sequential(
        *conv_norm(6, wide), nn.ReLU6(), *conv_norm(wide, wide, 3, groups=wide), nn.ReLU6(), *conv_norm(wide, 6)
    )
    return nn.Sequential(*conv_norm(3, 6, 3, stride=2), nn.ReLU6(), Residual(body), *head(6))


def grouped() -> nn.Module:
    """Producers and consumers with groups: ResNeXt's block without its shortcut."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(),
        *head(8),
    )


def grouped_output() -> nn.Module:
    """A grouped convolution whose outputs are the network's: only the same channels of every block can go."""
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2))


def residual() -> nn.Module:
    """Two basic blocks on one stream."""
    blocks = [
        Residual(nn.Sequential(*conv_norm(8, 10, 3), nn.ReLU(), *conv_norm(10, 8, 3)), nn.ReLU()) for _ in range(2)
    ]
    return nn.Sequential(*conv_norm(3, 8, 3), nn.ReLU(), *blocks, *head(8))


class Dense(nn.Module):
    """DenseNet: every layer reads the concatenation of all earlier ones, through a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList()
        for number in range(3):
            norm = nn.BatchNorm2d(6 + 4 * number)
            norm.running_mean = 0.1 * torch.randn(norm.num_features)
            self.layers.append(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(6 + 4 * number, 4, 3, padding=1, bias=False)))
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        scores: Tensor = self.head(self.norm(torch.cat(parts, 1)).relu().mean((2, 3)))
        return scores


class SqueezeExcite(nn.Module):
    """A channel gate between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.reduce = nn.Conv2d(12, 4, 1)
        self.expand = nn.Conv2d(4, 12, 1)
        self.second = nn.Conv2d(12, 8, 3)
        self.tail = nn.Sequential(*head(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        gate = self.expand(functional.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        scores: Tensor = self.tail(self.second(x * gate.sigmoid()).relu())
        return scores


class Inception(nn.Module):
    """One stem, four branches with unlike windows, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 4, 1)
        self.three = nn.Conv2d(8, 5, 3, padding=1)
        self.wide = nn.Conv2d(8, 4, (1, 5), padding=(0, 2), bias=False)
        self.pooled = nn.Conv2d(8, 3, 1)
        self.last = nn.Conv2d(16, 6, 3)
        self.tail = nn.Sequential(*head(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        branches = [self.one(x), self.three(x), self.wide(x), self.pooled(functional.max_pool2d(x, 3, 1, 1))]
        scores: Tensor = self.tail(self.last(torch.cat(branches, 1).relu()).relu())
        return scores


def without_bias() -> nn.Module:
    """Consumers without bias, one followed by a batch norm and one not."""
    return nn.Sequential(
        *conv_norm(3, 10, 3), nn.ReLU(), *conv_norm(10, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 12, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5, bias=False),
    )  # fmt: skip


def conv1d() -> nn.Module:
    """A convolution over a sequence."""
    return nn.Sequential(
        nn.Conv1d(4, 12, 5, stride=2), nn.LeakyReLU(), nn.Conv1d(12, 8, 3, dilation=2), nn.PReLU(8), nn.Flatten(),
        nn.Linear(8 * 8, 16), nn.ELU(), nn.Linear(16, 5),
    )  # fmt: skip


def conv3d() -> nn.Module:
    """A convolution over a volume."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, (1, 3, 3)), nn.ReLU(), nn.MaxPool3d(2),
        nn.Flatten(), nn.Linear(6 * 2 * 2 * 2, 5),
    )  # fmt: skip


def transposed() -> nn.Module:
    """A decoder: transposed convolutions as consumers, an image as output."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(10, 8, 4, stride=2, padding=1),
        nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


class Attention(nn.Module):
    """Multi-head attention written out, pre-norm, with an MLP of its own kind behind it."""

    def __init__(self, width: int = 16, heads: int = 2, gated: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.gate = nn.Linear(width, 24, bias=False) if gated else None
        self.up = nn.Linear(width, 24)
        self.down = nn.Linear(24, width, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = self.norm1(x)
        query, key, value = (
            part(y).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        read = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(read.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        y = self.norm2(x)
        hidden = functional.gelu(self.up(y)) if self.gate is None else functional.silu(self.gate(y)) * self.up(y)
        return x + self.down(hidden)  # type: ignore[no-any-return]


class Vit(nn.Module):
    """A vision transformer of one block; several rows of Φ a sample."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.place = nn.Parameter(0.1 * torch.randn(1, 4, 16))
        self.block = Attention(gated=gated)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        scores: Tensor = self.head(self.norm(self.block(tokens)).mean(1))
        return scores


class EncoderLayer(nn.Module):
    """torch's own encoder layer, fused projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 20, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(self.embed(x))[:, 0])
        return scores


class Glu(nn.Module):
    """Gated linear units: a unit is a row in both halves of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.second = nn.Linear(16, 12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(functional.silu(self.second(functional.glu(self.first(x)))))
        return scores


def padded(mode: str = "reflect") -> nn.Module:
    """Convolutions whose border is not zero, and `padding="same"` with an even and a dilated window."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode),
        nn.GELU(), nn.Conv2d(8, 7, 4, padding="same"), nn.ReLU(), nn.Conv2d(7, 6, 3, padding="same", dilation=2),
        nn.Hardswish(), *head(6),
    )  # fmt: skip


def mlp(widths: tuple[int, ...] = (10, 24, 16, 5)) -> nn.Module:
    """A chain of linear maps and ReLUs."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def narrow_mlp() -> nn.Module:
    """Layers of one and of two units."""
    return mlp((10, 2, 6, 1, 5))


def degenerate() -> nn.Module:
    """An MLP with dead units, constant units and twins."""
    network = mlp()
    first = network[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight[:4] = 0
        first.bias[:4] = -1.0  # dead
        first.weight[4:7] = 0
        first.bias[4:7] = torch.tensor([0.5, 1.0, 2.0])  # constant
        first.weight[8] = 2 * first.weight[7]
        first.bias[8] = 2 * first.bias[7]  # a twin
    return network


def all_dead() -> nn.Module:
    """An MLP whose first layer never fires, so that all that follows is constant."""
    network = mlp()
    first = network[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.fill_(-1.0)
    return network


class Shared(nn.Module):
    """One block applied to two inputs, and one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(5, 14), nn.ReLU(), nn.Linear(14, 6))
        self.first, self.second = nn.Linear(6, 12), nn.Linear(6, 12)
        self.left, self.right = nn.Linear(12, 5), nn.Linear(12, 5)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.block(x[:, :5]), self.block(x[:, 5:].sin())
        scores: Tensor = self.left(self.first(one).relu()) + self.right(self.second(two).relu())
        return scores


def dead_conv() -> nn.Module:
    """A convolution with dead units before one that pads with zeros."""
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 6, 3, padding=1), nn.ReLU(), *head(6))
    first = network[0]
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    with torch.no_grad():
        first.weight[::2] = 0
        first.bias[::2] = -1.0
    return network


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight transposed, and two layers that share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 14)
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(self.encoder(x).relu(), self.encoder.weight.T)
        scores: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return scores


class BufferNorm(nn.Module):
    """A normalisation that has buffers and no parameters, and one batch norm without affine."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.register_buffer("centre", torch.randn(12))
        self.register_buffer("spread", 0.5 + torch.rand(12))
        self.second = nn.Linear(12, 14, bias=False)
        self.norm = nn.BatchNorm1d(14, affine=False)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = ((self.first(x) - self.centre) / self.spread).relu()
        scores: Tensor = self.head(self.norm(self.second(x)).relu())
        return scores


class FixedBatch(nn.Module):
    """A view with the batch written into it: it runs on batches of two only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.hidden = nn.Linear(8 * 36, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.hidden(self.conv(x).relu().view(2, -1)).relu())
        return scores


class SeveralOutputs(nn.Module):
    """Class scores beside features, in a dict or in a tuple; the scores come first."""

    def __init__(self, kind: str = "dict") -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
        self.scores, self.other = nn.Linear(12, 5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        scores, other = self.scores(x), self.other(x)
        return {"logits": scores, "other": other} if self.kind == "dict" else (scores, other)


def regression() -> nn.Module:
    """One number a sample."""
    return mlp((10, 20, 12, 1))


def segmentation() -> nn.Module:
    """Class scores for every pixel."""
    return nn.Sequential(*conv_norm(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))


def flattened() -> nn.Module:
    """Units that own 49 columns each behind a flatten: 3136 columns."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 49, 16), nn.ReLU(), nn.Linear(16, 5)
    )


class Bert(nn.Module):
    """A classifier of the `transformers` library with a random configuration; token numbers in, scores out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=12, num_labels=5,
        )  # fmt: skip
        self.network = BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.network(tokens, return_dict=True).logits
        return scores


def opt() -> nn.Module:
    """OPT with its ReLU, as the library gives it: a container as output, token numbers as input."""
    from transformers import OPTConfig, OPTForSequenceClassification

    config = OPTConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, ffn_dim=24,
        max_position_embeddings=16, num_labels=5, word_embed_proj_dim=16, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return OPTForSequenceClassification(config)


class Tokens(nn.Module):
    """An embedding and an MLP over the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.body = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.body(self.table(tokens).mean(1))
        return scores

"""Small networks of many trades, with data made here: what they take, what they are asked, how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Arrays = dict[str, np.ndarray]


class UNet(nn.Module):
    """Two scales with a skip: scores of three classes at every pixel of a grey picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 2, stride=2),
        )  # fmt: skip
        self.last = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        seen = self.first(images)
        found: Tensor = self.last(torch.cat([seen, self.deep(seen)], 1))
        return found


class Tabular(nn.Module):
    """A regression from ten numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.layers(values)
        return found


class Audio(nn.Module):
    """Strided 1-D convolutions over a waveform: four kinds of tone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 24, 9, stride=4), nn.BatchNorm1d(24), nn.ReLU(),
            nn.Conv1d(24, 32, 9, stride=4), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 5, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip

    def forward(self, waves: Tensor) -> Tensor:
        found: Tensor = self.layers(waves)
        return found


class Recurrent(nn.Module):
    """A recurrent layer with a head of linear layers on its last state."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.before = nn.Linear(4, 24)
        self.memory = getattr(nn, kind)(24, 32, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 3))

    def forward(self, series: Tensor) -> Tensor:
        states, _ = self.memory(torch.relu(self.before(series)))
        found: Tensor = self.head(states[:, -1])
        return found


def lstm() -> nn.Module:
    return Recurrent("LSTM")


def gru() -> nn.Module:
    return Recurrent("GRU")


class TwoInputs(nn.Module):
    """A picture and a row of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU())
        self.read = nn.Sequential(nn.Linear(6, 24), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        both = torch.cat([self.look(image).mean((2, 3)), self.read(features)], 1)
        found: Tensor = self.head(both)
        return found


class Detector(nn.Module):
    """One object a picture: its class and its box."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.scores, self.boxes = nn.Linear(64, 2), nn.Linear(64, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        seen = self.body(images)
        return {"scores": self.scores(seen), "boxes": self.boxes(seen)}


class LanguageModel(nn.Module):
    """Two blocks of causal attention over tokens."""

    def __init__(self, words: int = 32, width: int = 32, length: int = 24) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.words(tokens) + self.places
        for block in self.blocks:
            values = block(values)
        found: Tensor = self.head(self.norm(values))
        return found


class Block(nn.Module):
    """Attention and an MLP, each with a shortcut."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, values: Tensor) -> Tensor:
        seen = self.first(values)
        count, length, width = seen.shape
        parts = [
            layer(seen).reshape(count, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        values = values + self.out(mixed.transpose(1, 2).reshape(count, length, width))
        found: Tensor = values + self.down(functional.gelu(self.up(self.second(values))))
        return found


def shapes(
    count: int, rng: np.random.Generator, side: int = 24
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Noisy pictures with a disc or a square: pictures, masks, kinds, boxes (x, y, width, height)."""
    grid = np.arange(side)
    kinds = rng.integers(0, 2, count)
    centres, radii = rng.uniform(6, side - 6, (count, 2)), rng.uniform(3, 5, count)
    across, down = (grid[None, None, :] - centres[:, :1, None]), (grid[None, :, None] - centres[:, 1:, None])
    disc = across**2 + down**2 < radii[:, None, None] ** 2
    square = np.maximum(abs(across), abs(down)) < radii[:, None, None]
    inside = np.where(kinds[:, None, None] == 0, disc, square)
    pictures = inside + rng.normal(0, 0.4, inside.shape)
    boxes = np.c_[centres, 2 * radii, 2 * radii] / side
    return pictures[:, None].astype(np.float32), inside * (1 + kinds[:, None, None]), kinds, boxes


def segmentation_data(count: int, rng: np.random.Generator) -> Arrays:
    pictures, masks, _, _ = shapes(count, rng)
    return {"inputs": pictures, "labels": masks}


def detector_data(count: int, rng: np.random.Generator) -> Arrays:
    pictures, _, kinds, boxes = shapes(count, rng, side=16)
    return {"inputs": pictures, "labels": kinds, "boxes": boxes.astype(np.float32)}


def tabular_data(count: int, rng: np.random.Generator) -> Arrays:
    """Friedman's first function."""
    x = rng.uniform(size=(count, 10)).astype(np.float32)
    y = np.sin(np.pi * x[:, 0] * x[:, 1]) + 2 * (x[:, 2] - 0.5) ** 2 + x[:, 3] + 0.5 * x[:, 4]
    return {"inputs": x, "targets": (y + rng.normal(0, 0.05, count)).astype(np.float32)}


def audio_data(count: int, rng: np.random.Generator) -> Arrays:
    time, kinds = np.arange(512) / 512, rng.integers(0, 4, count)
    pitch = rng.uniform(10, 40, count)[:, None]
    phase = 2 * np.pi * (pitch * time + rng.uniform(size=(count, 1)))
    tones = [np.sin(phase), np.sign(np.sin(phase)), np.sin(phase * (1 + time)), np.sin(phase) * (time < 0.5)]
    waves = np.choose(kinds[:, None], tones) + rng.normal(0, 0.3, (count, 512))
    return {"inputs": waves[:, None].astype(np.float32), "labels": kinds}


def series_data(count: int, rng: np.random.Generator) -> Arrays:
    """Which of three channels rose most over a walk of 20 steps."""
    steps = rng.normal(size=(count, 20, 4)).astype(np.float32)
    return {"inputs": steps, "labels": steps[..., :3].sum(1).argmax(1)}


def pair_data(count: int, rng: np.random.Generator) -> Arrays:
    pictures, _, kinds, _ = shapes(count, rng, side=16)
    features = rng.normal(size=(count, 6)).astype(np.float32)
    return {"inputs": pictures, "inputs_1": features, "labels": kinds + (features[:, 0] > 0)}


def language_data(count: int, rng: np.random.Generator) -> Arrays:
    """A walk over 32 words of which each is followed by one of three."""
    follow = np.random.default_rng(7).integers(0, 32, (32, 3))
    tokens = np.empty((count, 25), np.int64)
    tokens[:, 0] = rng.integers(0, 32, count)
    for place in range(24):
        tokens[:, place + 1] = follow[tokens[:, place], rng.integers(0, 3, count)]
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}


def scores_loss(outputs: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, classes in the second or the last dimension."""
    labels = data["labels"]
    return functional.cross_entropy(outputs.movedim(-1, 1) if labels.ndim == 2 else outputs, labels)


def square_loss(outputs: Tensor, data: dict[str, Tensor]) -> Tensor:
    return (outputs[:, 0] - data["targets"]).square().mean()


def detector_loss(outputs: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(outputs["scores"], data["labels"]) + 10 * functional.mse_loss(
        outputs["boxes"], data["boxes"]
    )


@dataclass(frozen=True)
class Task:
    """A network with its data.

    Attributes:
        figure: what the report says of it; most: by how much that may worsen, in points or in its own unit.
        options: of the compression.
    """

    build: Callable[[], nn.Module]
    data: Callable[[int, np.random.Generator], Arrays]
    loss: Callable[..., Tensor]
    figure: str
    most: float
    options: dict[str, float]


TASKS = {
    "segmentation": Task(UNet, segmentation_data, scores_loss, "mean_iou", 3.0, {"macs": 0.6}),
    "tabular": Task(Tabular, tabular_data, square_loss, "squared_error", 0.01, {"macs": 0.5}),
    "audio": Task(Audio, audio_data, scores_loss, "top1", 3.0, {"macs": 0.5}),
    "lstm": Task(lstm, series_data, scores_loss, "top1", 3.0, {"keep": 0.5}),
    "gru": Task(gru, series_data, scores_loss, "top1", 3.0, {"keep": 0.5}),
    "two inputs": Task(TwoInputs, pair_data, scores_loss, "top1", 3.0, {"macs": 0.5}),
    "detector": Task(Detector, detector_data, detector_loss, "top1", 3.0, {"macs": 0.5}),
    "language": Task(LanguageModel, language_data, scores_loss, "perplexity", 0.1, {"params": 0.8}),
}


def inputs_of(arrays: Arrays) -> list[np.ndarray]:
    """What the network takes, in order."""
    return [arrays[name] for name in ("inputs", "inputs_1") if name in arrays]


def trained(task: Task, steps: int, samples: int) -> nn.Module:
    """The task's network after so many steps of Adam, seeded."""
    torch.manual_seed(0)
    network, arrays = task.build(), task.data(samples, np.random.default_rng(0))
    data = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    data = {name: values.long() if values.dtype == torch.int32 else values for name, values in data.items()}
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    for _ in range(steps):
        rows = torch.randint(samples, (64,))
        batch = {name: values[rows] for name, values in data.items()}
        found = network(*(batch[name] for name in ("inputs", "inputs_1") if name in batch))
        optimizer.zero_grad()
        task.loss(found, batch).backward()
        optimizer.step()
        schedule.step()
    return network.eval()

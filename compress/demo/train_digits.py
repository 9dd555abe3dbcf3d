"""Train the packaged example: `python -m compress.demo.train_digits [FILE]`, a minute on one CPU thread.

The data are the handwritten digits that scikit-learn ships (8×8 grey, 16 levels): the test part of "Optical Recognition
of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository 1998, doi 10.24432/C50P49, licence
CC BY 4.0. Levels 0…16 were scaled to 0…255. `split_digits` made the packaged files: 1 297 samples to train on, 500 to
test on. The run is deterministic on a CPU: the same torch version gives the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from compress.data import Preprocessing, open_data
from compress.demo import CHECKPOINT
from compress.models import REFERENCE_NETS, digits_net

EPOCHS = 80
BATCH = 64
PEAK_RATE = 0.1
WEIGHT_DECAY = 2e-3
TEST_SAMPLES = 500
SEED = 0


def split_digits(levels: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """The packaged split of scikit-learn's `load_digits()`: levels (1797, 8, 8) in 0…16 and labels (1797,).

    Returns:
        "train" and "test", each with `images` (N, 8, 8, 1) uint8 and `labels` (N,) int64, in the original order.
    """
    images = np.rint(levels * (255 / 16)).astype(np.uint8)[..., None]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED)).numpy()
    parts = {"test": np.sort(order[:TEST_SAMPLES]), "train": np.sort(order[TEST_SAMPLES:])}
    return {
        name: {"images": images[numbers], "labels": labels[numbers].astype(np.int64)} for name, numbers in parts.items()
    }


def read_all(split: str) -> tuple[Tensor, Tensor]:
    """Inputs (N, 1, 8, 8) and labels (N,) of a packaged part."""
    known = REFERENCE_NETS["digits_net"].normalisation
    source = open_data(f"digits?train={split}", Preprocessing(mean=known.mean, std=known.std))
    batch = next(iter(source.batches(source.sample_count)))
    assert batch.labels is not None, "the packaged digits have labels"
    return batch.inputs, batch.labels


def shift_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 1, 8, 8) moved by up to one pixel each way, the edge repeated."""
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(8)  # (B, 8)
    columns = offsets[:, 1:] + torch.arange(8)  # (B, 8)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(epochs: int = EPOCHS) -> nn.Module:
    """The network after SGD with momentum, weight decay and a one-cycle rate; eval mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    inputs, labels = read_all("true")
    network = digits_net()
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for start in range(0, len(inputs) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            loss = functional.cross_entropy(network(shift_images(inputs[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def accuracy(network: nn.Module, split: str) -> float:
    """Percent of a packaged part that the network gets right."""
    inputs, labels = read_all(split)
    with torch.inference_mode():
        return 100 * float((network(inputs).argmax(1) == labels).double().mean())


def main(path: Path) -> None:
    """Train, write the state dict, say how good it is."""
    torch.set_num_threads(1)
    network = train()
    save_file(network.state_dict(), path, metadata={"trained_by": "compress.demo.train_digits"})
    print(f"{path}: train {accuracy(network, 'true'):.2f} %, test {accuracy(network, 'false'):.2f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT)

"""Every command of the command line, with what it does in one line; its module is imported once it is called."""

from __future__ import annotations

from dataclasses import dataclass

FIRST, SMALLER, MANY, TRAINED, HELP = (
    "What people do first",
    "With a smaller network",
    "Many networks",
    "Training and theory",
    "Help",
)


@dataclass(frozen=True)
class Command:
    """One command: the panel of the help that it stands in, and what it does."""

    panel: str
    about: str


COMMANDS = {
    "demo": Command(FIRST, "See it work on a packaged network: compress demo"),
    "inspect": Command(FIRST, "See what could be cut: compress inspect net.pt --data train.npz"),
    "run": Command(FIRST, "Make it smaller: compress net.pt --data train.npz --eval test.npz --macs 0.5"),
    "verify": Command(FIRST, "Check the folder before it ships: compress verify net-compressed --eval test.npz"),
    "evaluate": Command(SMALLER, "Measure its accuracy again."),
    "export": Command(SMALLER, "Write it as ONNX, as a torch.export program, or for the Hugging Face Hub."),
    "report": Command(SMALLER, "Build its report pages again."),
    "compare": Command(SMALLER, "Put runs side by side."),
    "zoo": Command(MANY, "Compress many networks, each in a process of its own."),
    "train": Command(TRAINED, "Train a network so that it compresses well."),
    "finetune": Command(TRAINED, "Train a network on, also a compressed one."),
    "balance": Command(TRAINED, "Rescale the units to the least sum of squares, same outputs."),
    "plateau": Command(TRAINED, "Find the width from which a wider net gains nothing."),
}

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
    """One command: the panel of the help that it stands in, what it does, and the function that does it from Python."""

    panel: str
    about: str
    function: str


COMMANDS = {
    "demo": Command(FIRST, "See it work on a packaged network: compress demo", "demo_recipe"),
    "inspect": Command(FIRST, "See what could be cut: compress inspect net.pt --data train.npz", "inspect"),
    "run": Command(FIRST, "Make it smaller: compress net.pt --data train.npz --eval test.npz --macs 0.5", "run"),
    "verify": Command(FIRST, "Check it before it ships: compress verify net-compressed --eval test.npz", "verify"),
    "evaluate": Command(SMALLER, "Measure its accuracy again.", "evaluate"),
    "export": Command(SMALLER, "Write it as ONNX, as a torch.export program, or for the Hugging Face Hub.", "export"),
    "report": Command(SMALLER, "Build its report pages again.", "rebuild_report"),
    "compare": Command(SMALLER, "Put runs side by side.", "compare"),
    "zoo": Command(MANY, "Compress many networks, each in a process of its own.", "run_zoo"),
    "train": Command(TRAINED, "Train a network so that it compresses well.", "train"),
    "finetune": Command(TRAINED, "Train a network on, also a compressed one.", "finetune"),
    "balance": Command(TRAINED, "Rescale the units to the least sum of squares, same outputs.", "balance"),
    "plateau": Command(TRAINED, "Find the width from which a wider net gains nothing.", "plateau"),
    "doctor": Command(HELP, "Print what a bug report needs.", "doctor"),
}

"""Writes the reports of the gallery, from networks that strangers trained, and from the packaged one.

python docs/gallery/make.py --checkpoints FOLDER --data FOLDER [NAME …]

The folders hold `cnn-cifar10-sequential.pth` and `smallvgg-mnist.pt`; `cifar10-train.npz`, `cifar10-test.npz`,
`mnist-train.npz`, `mnist-test.npz` with `images` and `labels`. A minute or two each on one core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CIFAR = "--data cifar10-train.npz --eval cifar10-test.npz"
COMMANDS = {
    "cnn": f"cnn-cifar10-sequential.pth --arch tests.strangers:SequentialCnn {CIFAR} --mean 0.5 --std 0.5 "
    "--macs 0.5 --calibration-samples 500 --recover off",
    "small-vgg": "smallvgg-mnist.pt --arch tests.strangers:SmallVgg --data mnist-train.npz --eval mnist-test.npz "
    "--mean 0.1307 --std 0.3081 --macs 0.25 --calibration-samples 500 --recover off",
    "digits": "digits.safetensors --data digits --eval digits?train=false --macs 0.4 --max-drop 2",
}


def main() -> int:
    """Run each command in a folder of its own, so that a report names no place of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("names", nargs="*", default=list(COMMANDS), metavar="NAME", choices=[*COMMANDS, []])
    given = parser.parse_args()
    places = (given.checkpoints.resolve(), given.data.resolve(), ROOT / "compress/demo")
    sys.path[:0] = [str(ROOT)]
    os.environ["PYTHONPATH"] = str(ROOT)
    from compress.cli import main as compress

    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for place in places:
                for file in place.glob("*.*"):
                    Path(file.name).symlink_to(file)
            code = compress([*COMMANDS[name].split(), "--output", name])
            if code:
                return code
            shutil.copy(Path(name, "report.html"), ROOT / "docs/gallery" / f"{name}.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())

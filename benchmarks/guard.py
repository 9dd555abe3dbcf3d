"""A guard set at work: a CIFAR-10 network cut with and without corrupted pictures among its calibration samples.

    python -m benchmarks.guard --checkpoint resnet20-cifar10-wrapped.pth --data TRAIN.npz --eval TEST.npz

The corruptions are made here: Gaussian noise, blur and a lowered contrast, a third of the pictures each. The guard is
corrupted training pictures that are not calibrated on otherwise; what is compared is the accuracy on corrupted *test*
pictures, which no run sees. A run whose guard loses more than its bound must end with exit code 3. `--quick`: 200
calibration, 100 guard and 300 test pictures, a fixed share of each layer; else 2 000, 500 and 2 000, and a budget.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.reporting import start
from compress.cli import main as shell

NORMAL = ["--mean", ".4914,.4822,.4465", "--std", ".2023,.1994,.2010"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)


def corrupted(images: np.ndarray, seed: int) -> np.ndarray:
    """Pictures (N, H, W, C) of bytes with noise, blur or less contrast, in turns."""
    values = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    blurred = functional.avg_pool2d(functional.pad(values, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    means = values.mean((1, 2, 3), keepdim=True)
    kinds = [values + 25 * noise, blurred, means + 0.4 * (values - means)]
    chosen = torch.arange(len(values)) % 3
    mixed = sum((chosen == kind)[:, None, None, None] * made for kind, made in enumerate(kinds))
    return torch.as_tensor(mixed).clamp(0, 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


def part(path: str, rows: slice) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name][rows] for name in ("images", "labels")}


def command(words: list[str]) -> tuple[int, str]:
    """Exit code and the last line of a command."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = shell(words)
    return code, (said.getvalue().strip().splitlines() or [""])[-1]


def top1(folder: Path, data: Path) -> float:
    """Accuracy in per cent of the network in a folder on other data."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        shell(["evaluate", str(folder), "--eval", str(data), "--json"])
    return float(100 * json.loads(said.getvalue())["top1"])


def main() -> int:
    run = start("guard", __doc__, add_options=options)
    own, quick = run.options, run.quick
    samples, guarding, testing = (200, 100, 300) if quick else (2000, 500, 2000)
    cut = ["--keep", "60%", "--selection", "magnitude"] if quick else ["--macs", "0.5"]
    cut += ["--recover", "off"]
    run.say(f"{samples} calibration, {guarding} guard and {testing} test pictures; {' '.join(cut)}")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        clean, other, test = (
            part(own.data, slice(samples)),
            part(own.data, slice(-guarding, None)),
            part(own.eval, slice(testing)),
        )
        np.savez(place / "train.npz", **clean)
        np.savez(place / "guard.npz", images=corrupted(other["images"], 1), labels=other["labels"])
        np.savez(place / "test.npz", **test)
        np.savez(place / "dark.npz", images=corrupted(test["images"], 2), labels=test["labels"])
        common = [own.checkpoint, *NORMAL, "--data", str(place / "train.npz"), *cut]
        guard = ["--guard", f"corrupted={place / 'guard.npz'}", "--guard-weight", "40%"]
        rows, found = [], {}
        for title, more in (("without", []), ("with", [*guard, "--guard-drop", "100"])):
            output = place / title
            code, last = command([*common, *more, "--eval", str(place / "test.npz"), "--output", str(output)])
            if code:
                raise SystemExit(f"{title} a guard: exit code {code}: {last}")
            scores = json.loads((output / "report.json").read_text())["evaluation"]
            before, after = (100 * scores[which]["top1"] for which in ("original", "compressed"))
            found[title] = (after, top1(output, place / "dark.npz"))
            rows.append((f"{title} the guard", before, *found[title]))
        run.table(
            "Top-1 in per cent",
            ("calibrated", "clean before", "clean after", "corrupted after"), rows,
        )  # fmt: skip
        code, last = command([*common, *guard, "--guard-drop", "corrupted=0.01", "--dry-run"])
        run.say(f"a bound of 0.01 points: exit code {code}: {last}")
        gain, cost = found["with"][1] - found["without"][1], found["without"][0] - found["with"][0]
        few = "one picture is 0.3 points" if quick else ""
        run.goal("guard-gains-on-its-domain", None if quick else gain, 0.0, at_least=True, unit=" points", note=few)
        run.goal("guard-costs-on-clean-pictures", None if quick else cost, 2.0, unit=" points", note=few)
        run.goal("guard-beyond-its-bound-exits-with", code, "3", met=code == 3)
    return run.finish()


if __name__ == "__main__":
    raise SystemExit(main())

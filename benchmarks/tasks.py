"""Networks of many trades through both doors: from the shell with files, from Python with objects in memory.

    python -m benchmarks.tasks [--only segmentation,lstm]

Each is trained here on data made here, compressed by `compress …` and by `compress.prune`, and must come out with the
same bytes; the table has its figure before and after, and what was left alone and why. `--quick` takes four of them,
100 steps of training and 300 calibration samples (else 800 and 1 500), and keeps half of every layer without a search.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import compress
from benchmarks.reporting import start
from benchmarks.task_networks import TASKS, Arrays, Task, inputs_of, trained
from compress.cli import main as shell
from compress.errors import CompressError

BATCH = 128
QUICK = ["segmentation", "lstm", "two inputs", "language"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="names of tasks with commas between them")


def save_arrays(path: Path, arrays: Arrays) -> None:
    np.savez(path, **{name: values for name, values in arrays.items() if name != "boxes"})


def batches_of(arrays: Arrays) -> list[tuple[Any, torch.Tensor]]:
    """Pairs of what the network takes and the answers."""
    answers = torch.from_numpy(np.ascontiguousarray(arrays.get("labels", arrays.get("targets"))))
    inputs = [torch.from_numpy(np.ascontiguousarray(part)) for part in inputs_of(arrays)]
    parts = []
    for first in range(0, len(answers), BATCH):
        own = tuple(part[first : first + BATCH] for part in inputs)
        parts.append((own if len(own) > 1 else own[0], answers[first : first + BATCH]))
    return parts


def from_shell(task: Task, network: nn.Module, fitting: Arrays, testing: Arrays, place: Path) -> int:
    """The exit code of the command; its folder is `place / shell`."""
    save_file(network.state_dict(), place / "net.safetensors")
    save_arrays(place / "train.npz", fitting)
    save_arrays(place / "test.npz", testing)
    arch = f"benchmarks.task_networks:{task.build.__qualname__}"
    words = [str(place / "net.safetensors"), "--arch", arch, "--data", str(place / "train.npz")]
    words += ["--eval", str(place / "test.npz"), "--output", str(place / "shell"), "--batch-size", str(BATCH)]
    for name, value in task.options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = shell(words)
    if code:
        raise SystemExit(f"{arch}: exit code {code}: {said.getvalue().strip().splitlines()[-1]}")
    return code


def main() -> int:
    run = start("tasks", __doc__, add_options=options)
    steps, samples = (100, 300) if run.quick else (800, 1500)
    run.say(f"{steps} steps of training, {samples} calibration and 400 test samples, seed 0")
    shorter: dict[str, Any] = {"keep": 0.5, "selection": "magnitude"}
    rows, same, kept, within = [], 0, [], 0
    names = [name for name in run.options.only.split(",") if name] or (QUICK if run.quick else list(TASKS))
    for name in names:
        task = replace(TASKS[name], options=shorter) if run.quick else TASKS[name]
        network = trained(task, steps, 1000 if run.quick else 4000)
        fitting, testing = (task.data(count, np.random.default_rng(seed)) for seed, count in ((1, samples), (2, 400)))
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            from_shell(task, network, fitting, testing, place)
            report = json.loads((place / "shell" / "report.json").read_text())
            try:
                result = compress.prune(
                    network, batches_of(fitting), test=batches_of(testing), batch_size=BATCH, progress=False,
                    **task.options,
                )  # fmt: skip
                result.save(place / "python")
                written = [(place / door / "model.safetensors").read_bytes() for door in ("shell", "python")]
                equal = written[0] == written[1]
            except CompressError as error:
                run.say(f"{name} from Python: {error}")
                equal = False
        figure = next(one for one in report["evaluation"]["figures"] if one["key"] == task.figure)
        before, after = figure["original"], figure["compressed"]
        share = figure["key"] not in ("squared_error", "perplexity")
        lost = 100 * (before - after) if share else after - before
        parameters, macs = (pair[1] / pair[0] for pair in (report["cost"]["parameters"], report["cost"]["macs"]))
        left = {skipped["reason"] for skipped in report["skipped"]}
        shown = [f"{100 * one:.2f} %" if share else f"{one:.4g}" for one in (before, after)]
        rows.append((name, task.figure, *shown, parameters, macs, "yes" if equal else "no"))
        kept.append((name, "; ".join(sorted(left))))
        same += equal
        within += lost <= task.most
    run.table("Both doors", ("task", "figure", "before", "after", "parameters", "MACs", "same bytes"), rows)
    run.table("Left alone", ("task", "why"), kept)
    run.goal("tasks-same-bytes-through-both-doors", same, len(names), at_least=True)
    if run.quick:
        run.goal("tasks-within-their-bound", None, len(names), note="networks of a quick run are hardly trained")
    else:
        run.goal("tasks-within-their-bound", within, len(names), at_least=True)
    return run.finish()


if __name__ == "__main__":
    raise SystemExit(main())

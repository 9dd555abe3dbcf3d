"""A zoo of models: throughput against one after another, overhead per model, local processes and Ray side by side.

    python -m benchmarks.zoo [--models 8] [--backends local,ray] [--quick] [--json]

Every model is the packaged digits network with another seed, so that all cost the same. "One after another" is a loop
over `compress.run` in this process, libraries loaded and one thread, as each of the zoo's processes has. Ray is started
here and its start-up is counted; it is left out where it is not installed. `--quick`: three models with 100 samples
each, local alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from pathlib import Path

import torch
import yaml

import compress
from benchmarks.reporting import start
from compress.demo import DEMO_OPTIONS
from compress.zoo import plan_zoo, run_zoo

SHARED = {"data": "digits", "eval": "digits?train=false", "keep": 0.5}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--backends", default="local,ray")


def main() -> int:
    found = start("zoo", __doc__, add_options=options)
    count = 3 if found.quick else found.options.models
    backends = ["local"] if found.quick else found.options.backends.split(",")
    if "ray" in backends and importlib.util.find_spec("ray") is None:
        found.say("ray is not installed: left out")
        backends.remove("ray")
    shared = {**SHARED, "calibration_samples": 100} if found.quick else SHARED
    checkpoint = str(DEMO_OPTIONS["checkpoint"])
    cores = os.cpu_count() or 1
    found.say(f"{count} models, {cores} cores, one thread a model")
    with tempfile.TemporaryDirectory() as scratch:
        torch.set_num_threads(1)
        compress.run(compress.make_recipe({**shared, "checkpoint": checkpoint, "output": f"{scratch}/warm"}))
        began = time.perf_counter()
        for seed in range(count):
            given = {**shared, "checkpoint": checkpoint, "seed": seed, "output": f"{scratch}/serial-{seed}"}
            compress.run(compress.make_recipe(given))
        serial = time.perf_counter() - began
        rows: list[tuple[str, float, float, float | None, bool | None]] = [
            ("one after another, in one process", serial, serial / count, None, None)
        ]
        for backend in backends:
            for jobs in dict.fromkeys((1, cores)):
                folder = Path(scratch, f"{backend}-{jobs}")
                plan = {
                    "output": str(folder),
                    "defaults": shared,
                    "models": [{"name": f"m{seed}", "checkpoint": checkpoint, "seed": seed} for seed in range(count)],
                    "jobs": jobs,
                    "threads": 1,
                    "backend": backend,
                }
                path = Path(scratch, f"{backend}-{jobs}.yaml")
                path.write_text(yaml.safe_dump(plan), encoding="utf-8")
                began = time.perf_counter()
                summary = run_zoo(plan_zoo([str(path)]))
                spent = time.perf_counter() - began
                same = summary["exit_code"] == 0 and all(
                    (folder / "models" / f"m{seed}" / "model.safetensors").read_bytes()
                    == Path(scratch, f"serial-{seed}", "model.safetensors").read_bytes()
                    for seed in range(count)
                )
                rows.append((f"{backend}, {jobs} at once", spent, spent / count, serial / spent, same))
    found.table(
        "Seconds for a zoo of equal models",
        ("", "all", "per model", "throughput against one after another", "same bytes"),
        rows,
    )
    local = {name: (spent, same) for name, spent, _, _, same in rows}
    alone, most = local["local, 1 at once"][0], local[f"local, {cores} at once"][0]
    found.goal("same-bytes-everywhere", sum(row[4] is True for row in rows), len(rows) - 1, at_least=True)
    found.goal("overhead-per-model-seconds", (alone - serial) / count, 3.0)
    if cores > 1:
        found.goal("throughput-on-all-cores", alone / most, 0.7 * cores, at_least=True, unit="x")
    return found.finish()


if __name__ == "__main__":
    raise SystemExit(main())

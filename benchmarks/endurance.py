"""Endurance: kill -9 and resume, many models in one go, damaged files. Counts what was lost, half-written or uncaught.

    python -m benchmarks.endurance [--quick] [--parts kills,soak,fuzz,networks,live] [--json]

- kills: a zoo is killed with SIGKILL at random moments (the runner alone, or with its process server) and resumed,
  until it is complete; its artifacts are compared byte for byte with those of a run that nobody disturbed. Compared are
  `model.safetensors`, `config.json` and `recipe.yaml` of every model; reports hold wall-clock seconds and latencies.
- soak: models with different seeds through one runner, whose resident memory and open files are read after each.
- fuzz: mutated checkpoints, data files, recipes and zoo files through the command line, in processes with a bound on
  their memory and a limit on each case's time.
- networks: random small networks (several outputs, odd names, dense and 1-D outputs, tokens, constant features, dead
  and saturated units, shared weights, single-unit layers, scales from 0 to 1e12) × faults of their data × commands.
  Most in one process, which leaves out the reload in a fresh one; every 100th in processes of its own.
- live: random modules in memory (several inputs, mappings, wrappers, other states) × batches × measures × options
  through `compress.prune`: no exception but a `CompressError` of one line, the module that was given unchanged.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reporting import Run, start

PARTS = ("kills", "soak", "fuzz", "networks", "live")
COMPARED = ("model.safetensors", "config.json", "recipe.yaml")
QUICK_MODEL = {"data": "digits", "calibration_samples": 60, "keep": 0.5, "selection": "magnitude"}
CASE_SECONDS = 600.0  # on a busy machine, start-up included; a case takes a few hundredths of a second
KINDS = ("zip", "legacy", "safetensors", "stored.npz", "packed.npz", "arrays", "recipe", "zoo")


def main() -> int:
    """Run the parts asked for."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--parts", default=",".join(PARTS), help="which of kills, soak, fuzz, networks")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--minutes", type=float, default=600.0, help="stop a part after so long")
        parser.add_argument("--soak-models", type=int, default=200)
        parser.add_argument("--networks", type=int, default=2000, help="cases of the part of that name")
        parser.add_argument("--live", type=int, default=500, help="cases of the part of that name")
        parser.add_argument("--first", type=int, default=0, help="number of their first case")

    run = start("endurance", __doc__, add_options=add_options)
    chosen = run.options.parts.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        if "kills" in chosen:
            measure_kills(run, Path(scratch, "kills"), 2 if run.quick else 50, 2 if run.quick else 3)
        if "soak" in chosen:
            measure_soak(run, Path(scratch, "soak"), 3 if run.quick else run.options.soak_models)
        if "fuzz" in chosen:
            measure_fuzz(run, Path(scratch, "fuzz"), 160 if run.quick else 10_400)
        if "networks" in chosen:
            title = "Random networks with faults in their data through the command line"
            measure_cases(run, "network", title, Path(scratch, "networks"), 12 if run.quick else run.options.networks)
        if "live" in chosen:
            title = "Random modules in memory through compress.prune"
            measure_cases(run, "live", title, Path(scratch), 12 if run.quick else run.options.live)
    return run.finish()


def write_zoo(folder: Path, models: int) -> None:
    """A zoo file over copies of the packaged network that differ in their seed and width."""
    from compress.demo import CHECKPOINT

    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"name": f"m{k:03d}", "checkpoint": str(CHECKPOINT), "seed": k, "keep": 0.3 + k % 5 / 10} for k in range(models)
    ]
    content = {"output": "zoo", "defaults": QUICK_MODEL, "models": entries, "threads": 1, "jobs": 2, "job_memory": "1G"}
    (folder / "zoo.yaml").write_text(yaml.safe_dump(content))


def start_zoo(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`compress zoo` in `folder`, in a session of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "compress.cli", "zoo", "zoo.yaml", *arguments]
    log = (folder / "stderr.log").open("ab")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def measure_kills(run: Run, scratch: Path, kills: int, models: int) -> None:
    """Kill and resume zoos until there were `kills` kills; every zoo ends complete and is compared."""
    draw = random.Random(run.options.seed)
    write_zoo(scratch / "reference", models)
    began = time.monotonic()
    codes = Counter({start_zoo(scratch / "reference").wait(): 1})
    whole = time.monotonic() - began
    done, zoos, different, lost, redone, remains = 0, 0, 0, 0, 0, 0
    at_work = 0
    deadline = began + 60 * run.options.minutes
    while done < kills and time.monotonic() < deadline:
        folder = scratch / f"zoo{zoos}"
        write_zoo(folder, models)
        zoos += 1
        arguments: tuple[str, ...] = ()
        while True:
            process = start_zoo(folder, *arguments)
            if done < kills and time.monotonic() < deadline:
                try:
                    process.wait(draw.uniform(0.05, 0.6) * whole)
                except subprocess.TimeoutExpired:
                    at_work += any((folder / "zoo/models").glob(".*")) if (folder / "zoo/models").is_dir() else 0
                    if draw.random() < 0.5:
                        os.kill(process.pid, signal.SIGKILL)
                    else:
                        os.killpg(process.pid, signal.SIGKILL)
                    done += 1
            code = process.wait()
            arguments = ("--resume",) if (folder / "zoo/journal.jsonl").exists() else ()
            if code != -signal.SIGKILL:
                codes[code] += 1
                break
        different += differences(scratch / "reference/zoo", folder / "zoo")
        entries = [json.loads(line) for line in (folder / "zoo/journal.jsonl").read_text().splitlines()]
        times = Counter(entry["name"] for entry in entries if entry["status"] == "done")
        lost += models - len(times)
        redone += sum(times.values()) - len(times)
        remains += sum(path.name.startswith(".") for path in (folder / "zoo/models").iterdir())
        remains += (folder / "zoo/.scratch").exists()
        shutil.rmtree(folder)
        run.say(f"{done} kills, {zoos} zoos complete, {different} files differ, {lost} lost, {redone} redone")
    run.table(
        f"kill -9 at random moments of a zoo of {models} models, then --resume",
        ("kills", "while an artifact was being written", "zoos completed", "models", "files that differ", "exit codes"),
        [(done, at_work, zoos, zoos * models, different, ", ".join(f"{n} × {code}" for code, n in codes.items()))],
    )
    run.goal("kills", done, kills, at_least=True)
    run.goal("files-that-differ-from-an-undisturbed-run", different, 0)
    run.goal("models-lost", lost, 0)
    run.goal("complete-models-done-again", redone, 0)
    run.goal("remains-after-resume", remains, 0)
    run.goal("zoos-that-did-not-end-with-0", sum(n for code, n in codes.items() if code), 0)


def differences(first: Path, second: Path) -> int:
    """Compared files of all models that are not the same bytes, or missing on one side."""
    names = {path.name for root in (first, second) for path in (root / "models").iterdir() if path.name[0] != "."}
    wrong = 0
    for model in names:
        for name in COMPARED:
            pair = [root / "models" / model / name for root in (first, second)]
            wrong += not all(path.is_file() for path in pair) or pair[0].read_bytes() != pair[1].read_bytes()
    return wrong


class MemoryWatch:
    """A zoo's display that reads this process's resident memory and open files whenever a model ends."""

    def __init__(self) -> None:
        self.resident: list[float] = []
        self.files: list[int] = []

    def begin(self, names: list[str], complete: Any) -> None:
        """Nothing to show."""

    def started(self, name: str) -> None:
        """Nothing to show."""

    def event(self, event: Any) -> None:
        """Read the two numbers."""
        if event.outcome is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            self.files.append(len(os.listdir("/proc/self/fd")))


def measure_soak(run: Run, scratch: Path, models: int) -> None:
    """All models through one runner in this process."""
    from compress.zoo import plan_zoo, run_zoo

    write_zoo(scratch, models)
    watch = MemoryWatch()
    began = time.perf_counter()
    plan = plan_zoo([str(scratch / "zoo.yaml")], output=str(scratch / "zoo"))
    found = run_zoo(plan, display=watch)
    seconds = time.perf_counter() - began
    early, late = watch.resident[len(watch.resident) // 10], watch.resident[-1]
    run.table(
        f"{models} models in one go, two at a time",
        ("done", "not done", "runner after a tenth, MiB", "at the end, MiB", "open files", "at the end", "seconds"),
        [
            (
                found["counts"]["done"],
                models - found["counts"]["done"],
                early,
                late,
                watch.files[len(watch.files) // 10],
                watch.files[-1],
                seconds,
            )
        ],
    )
    run.goal("soak-models-not-done", models - found["counts"]["done"], 0)
    run.goal("soak-runner-growth", round(late - early, 2), 4, unit=" MiB")
    run.goal("soak-open-files-growth", watch.files[-1] - watch.files[len(watch.files) // 10], 2)


def measure_fuzz(run: Run, scratch: Path, cases: int) -> None:
    """Mutated files of every kind; two processes at once, each watched."""
    from tests.safety.fuzzing import make_corpus

    share = cases // len(KINDS)
    limit = 60 * run.options.minutes * 2 / len(KINDS)
    make_corpus(scratch / "sound")
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    codes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    faults: list[str] = []
    waiting = list(KINDS)
    running: dict[str, tuple[Any, Connection, float]] = {}
    while waiting or running:
        while waiting and len(running) < 2:
            kind = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            shutil.copytree(scratch / "sound", scratch / kind)
            arguments = (str(scratch / kind), kind, share, run.options.seed, limit, sender)
            process = context.Process(target=fuzz_cases, args=arguments)
            process.start()
            sender.close()
            running[kind] = (process, receiver, time.monotonic())
        for kind, (process, receiver, since) in list(running.items()):
            try:
                while receiver.poll(0.05):
                    code, fault = receiver.recv()
                    counts[kind] += 1
                    codes[kind][str(code)] += 1
                    if fault:
                        faults.append(f"{kind}: {fault}")
                    running[kind] = (process, receiver, time.monotonic())
            except EOFError:
                process.join()
                if process.exitcode:
                    faults.append(f"{kind}: the process ended with exit code {process.exitcode}")
                del running[kind]
                continue
            if time.monotonic() - since > CASE_SECONDS:
                faults.append(f"{kind}: a case took longer than {CASE_SECONDS:g} seconds")
                process.kill()
    for fault in faults[:10]:
        run.say(fault)
    run.table(
        "Mutated files through the command line",
        ("what", "files", "exit codes"),
        [(kind, counts[kind], ", ".join(f"{n} × {code}" for code, n in sorted(codes[kind].items()))) for kind in KINDS],
    )
    run.goal("fuzz-files", sum(counts.values()), cases, at_least=True)
    run.goal("fuzz-tracebacks-hangs-wrong-exit-codes", len(faults), 0)


def fuzz_cases(folder: str, kind: str, count: int, seed: int, limit: float, pipe: Connection) -> None:
    """What a watched process does: `count` cases of one kind, each reported as (exit code, fault or None)."""
    import torch

    from tests.safety.fuzzing import bound_memory, damaged, make_corpus, meet

    torch.set_num_threads(1)
    corpus = make_corpus(Path(folder))
    empty = Path(folder, "empty")
    empty.mkdir()
    os.chdir(empty)
    bound_memory()
    draw = random.Random(f"{seed} {kind}")
    began = time.monotonic()
    for _ in range(count):
        if time.monotonic() - began > limit:
            break
        pipe.send(meet(corpus, kind, damaged(corpus.files[kind], kind, draw)))


def measure_cases(run: Run, kind: str, title: str, scratch: Path, cases: int) -> None:
    """Cases of a kind, "network" or "live", in a watched process that is started again where one takes too long."""
    meet = {"network": network_cases, "live": live_cases}[kind]
    context = multiprocessing.get_context("spawn")
    first, done = run.options.first, 0
    codes: Counter[str] = Counter()
    faults: list[str] = []
    deadline = time.monotonic() + 60 * run.options.minutes
    while done < cases and time.monotonic() < deadline:
        receiver, sender = context.Pipe(duplex=False)
        numbers = range(first + done, first + cases)
        process = context.Process(target=meet, args=(str(scratch), numbers, sender))
        process.start()
        sender.close()
        try:
            while time.monotonic() < deadline and receiver.poll(CASE_SECONDS):
                found, fault = receiver.recv()
                done += 1
                codes.update(map(str, found))
                if fault:
                    faults.append(fault)
                    run.say(fault)
            if time.monotonic() < deadline:
                faults.append(f"{kind} seed {first + done}: a case took longer than {CASE_SECONDS:g} seconds")
                run.say(faults[-1])
                done += 1
        except EOFError:
            process.join()
            if process.exitcode:
                faults.append(f"{kind} seed {first + done}: the process ended with exit code {process.exitcode}")
                run.say(faults[-1])
                done += 1
        process.kill()
    run.table(
        title,
        ("cases", "calls", "exit codes or outcomes"),
        [(done, sum(codes.values()), ", ".join(f"{n} × {code}" for code, n in sorted(codes.items())))],
    )
    run.goal(f"{kind}-cases", done, cases, at_least=True)
    run.goal(f"{kind}-tracebacks-hangs-wrong-outcomes", len(faults), 0)


def network_cases(folder: str, numbers: range, pipe: Connection) -> None:
    """What a watched process does: the cases of these numbers, each reported as (exit codes, fault or None)."""
    import torch

    from compress.api import writing
    from tests.safety.network_cases import make_case, meet_case

    torch.set_num_threads(1)
    writing.check_reload = lambda *_, **__: 0.0
    for number in numbers:
        pipe.send(meet_case(make_case(number, Path(folder)), process=number % 100 == 99))


def live_cases(_folder: str, numbers: range, pipe: Connection) -> None:
    """As `network_cases`, of `tests.safety.live_cases`."""
    import torch

    from tests.safety.live_cases import make_live_case, meet_live

    torch.set_num_threads(1)
    for number in numbers:
        outcome, fault = meet_live(make_live_case(number))
        pipe.send(([outcome], fault))


if __name__ == "__main__":
    sys.exit(main())

"""run_zoo(): every model of a plan, once; what is complete is in the journal and is not done again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from compress.atomic import explain, new_folder
from compress.errors import CompressError, InterruptionError, OutputError
from compress.recipe import Recipe, parse_bytes
from compress.zoo.backends.protocol import Backend, Event, failure
from compress.zoo.execution import COMPLETE, Status
from compress.zoo.fingerprint import Fingerprints, file_digest
from compress.zoo.journal import JOURNAL, Journal, locked, read_journal
from compress.zoo.plan import LOGS, MODELS, Job, Shard, ZooPlan
from compress.zoo.summary import summarise, write_summary

SCRATCH = ".scratch"
OVERHEAD_BYTES = 1 << 30  # of a process with its libraries loaded
POLL_SECONDS = 0.5
ARTIFACT_FILES = ("config.json", "model.safetensors", "recipe.yaml")  # reports hold seconds, and may be rebuilt


class ZooDisplay(Protocol):
    """Shows how a zoo is getting on."""

    def begin(self, names: list[str], complete: Mapping[str, Mapping[str, Any]]) -> None:
        """The models there are, and the outcomes of those that were complete before."""

    def started(self, name: str) -> None:
        """A model was handed to the backend."""

    def event(self, event: Event) -> None:
        """A model got on, or ended."""


def run_zoo(
    plan: ZooPlan,
    backend: Backend | None = None,
    *,
    resume: bool = False,
    shard: Shard | None = None,
    display: ZooDisplay | None = None,
) -> dict[str, Any]:
    """Run every model of the plan, or of one shard; write the summary; return its content.

    A model counts as complete once its outcome is in the journal, and is not done again with `resume` while its
    fingerprint is the same and its artifact is as it was written. Models with equal fingerprints are run once; the
    later ones are copies. A model that failed is tried again by the next `resume`.

    Args:
        backend: where models run; None: what the plan names. It is closed at the end.

    Raises:
        OutputError: the folder holds an earlier run and `resume` was not given, another run is working in it, or it
            cannot be written.
    """
    shard = shard or Shard()
    part = plan.shard(shard)
    journal_file = plan.output / f"{JOURNAL}{shard.suffix}.jsonl"
    make_folders(plan.output)
    with locked(plan.output, shard.suffix):
        if not resume and journal_file.exists():
            raise OutputError(
                f"{str(plan.output)!r} holds an earlier run; give --resume to go on, or choose another --output."
            )
        jobs = make_jobs(part, shard)
        remove_remains(plan.output, {job.name for job in jobs} if shard.suffix else None, shard)
        known = complete_outcomes(jobs, journals(plan.output) if resume else [])
        with Journal(journal_file) as journal:
            zoo = _Zoo(jobs, known, journal, display)
            if zoo.waiting:
                backend = backend or make_backend(part)
                try:
                    zoo.run(backend)
                except KeyboardInterrupt:
                    complete = sum(outcome["status"] in COMPLETE for outcome in zoo.outcomes.values())
                    raise InterruptionError(
                        f"interrupted; {complete} of {len(jobs)} models are complete. --resume goes on from here."
                    ) from None
                finally:
                    backend.close()
                    remove_remains(plan.output, {job.name for job in jobs}, shard)
            elif backend is not None:
                backend.close()
        summary = summarise(jobs, zoo.outcomes, plan.output)
        write_summary(plan.output, summary, shard.suffix)
    return summary


class _Zoo:
    """One go through the jobs: submits, records outcomes, copies twins."""

    def __init__(
        self, jobs: list[Job], known: Mapping[str, dict[str, Any]], journal: Journal, display: ZooDisplay | None
    ) -> None:
        self.jobs = {job.name: job for job in jobs}
        self.outcomes = dict(known)
        self.journal = journal
        self.display = display
        self.twins: dict[str, list[Job]] = {}
        first: dict[str, str] = {}
        self.waiting: list[Job] = []
        for job in jobs:
            model = first.setdefault(job.fingerprint, job.name)
            if job.name in known:
                continue
            if model != job.name:
                self.twins.setdefault(model, []).append(job)
            else:
                self.waiting.append(job)
        for model in list(self.twins):
            if model in known:
                self.settle_twins(model)

    def run(self, backend: Backend) -> None:
        """Until nothing waits and nothing runs."""
        if self.display is not None:
            self.display.begin(list(self.jobs), self.outcomes)
        while self.waiting or backend.running:
            while (job := next((waiting for waiting in self.waiting if backend.accepts(waiting)), None)) is not None:
                self.waiting.remove(job)
                clear(job)
                backend.submit(job)
                if self.display is not None:
                    self.display.started(job.name)
            for event in backend.wait(POLL_SECONDS):
                if event.outcome is not None:
                    shutil.rmtree(self.jobs[event.name].scratch, ignore_errors=True)
                    self.record(event.name, dict(event.outcome))
                if self.display is not None:
                    self.display.event(event)

    def record(self, name: str, outcome: dict[str, Any]) -> None:
        """Put an outcome into the journal, then settle those that wait for it."""
        job = self.jobs[name]
        if outcome["status"] == Status.DONE:
            outcome["sha256"] = artifact_digest(job.folder)
        self.outcomes[name] = outcome
        self.journal.append({"name": name, "fingerprint": job.fingerprint, "time": round(time.time(), 3), **outcome})
        self.settle_twins(name)

    def settle_twins(self, name: str) -> None:
        """Give the models of equal fingerprint the outcome of the one that ran, and a copy of its artifact."""
        for twin in self.twins.pop(name, ()):
            outcome = {**self.outcomes[name], "same_as": name, "seconds": 0.0}
            if outcome["status"] == Status.DONE:
                try:
                    with new_folder(twin.folder, force=True) as draft:
                        shutil.copytree(self.jobs[name].folder, draft, dirs_exist_ok=True)
                except CompressError as error:
                    outcome = failure(str(error))
            else:
                clear(twin)
            self.record(twin.name, outcome)


def make_jobs(plan: ZooPlan, shard: Shard) -> list[Job]:
    """A job for every model, with what it is expected to take."""
    settings, prints = plan.settings, Fingerprints()
    count = job_count(plan)
    threads = settings.threads or max(1, core_count() // count)
    return [
        Job(
            name=name,
            recipe=recipe,
            memory=expected_memory(recipe, settings.job_memory),
            threads=threads,
            timeout=settings.timeout,
            log=str(plan.output.absolute() / LOGS / f"{name}.log"),
            scratch=str(plan.output.absolute() / f"{SCRATCH}{shard.suffix}" / name),
            fingerprint=prints.of(recipe),
        )
        for name, recipe in plan.models
    ]


def job_count(plan: ZooPlan) -> int:
    """Models at once: as set, else a process for each core."""
    return plan.settings.jobs or max(1, min(core_count(), len(plan.models)))


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expected_memory(recipe: Recipe, stated: str | None) -> int:
    """Bytes that a model may take: as stated, else its recipe's bound, a few copies of the weights, the libraries."""
    if stated is not None:
        return parse_bytes(stated)
    with contextlib.suppress(OSError):
        return recipe.memory_bytes + 4 * os.path.getsize(recipe.checkpoint) + OVERHEAD_BYTES
    return recipe.memory_bytes + OVERHEAD_BYTES


def make_backend(plan: ZooPlan) -> Backend:
    """The backend that the plan names. Raises RecipeError when its package is not installed."""
    if plan.settings.backend == "ray":
        from compress.zoo.backends.ray_tasks import RayBackend

        return RayBackend(job_count(plan))
    if plan.settings.backend == "slurm":
        from compress.zoo.backends.slurm import SlurmBackend

        return SlurmBackend(plan.output / "slurm", plan.settings.slurm)
    from compress.zoo.backends.local import LocalBackend

    return LocalBackend(job_count(plan))


def make_folders(output: Path) -> None:
    """The zoo's folders. Raises OutputError."""
    if output.is_dir() and any(output.iterdir()) and not (output / MODELS).is_dir():
        raise OutputError(f"The output {str(output)!r} exists and holds no zoo; choose another --output.")
    try:
        for name in (MODELS, LOGS):
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write to {str(output)!r}: {explain(error)}. Choose another --output.") from None


def remove_remains(output: Path, names: set[str] | None, shard: Shard) -> None:
    """Remove what killed processes left: drafts of artifacts (of these models only, or of all) and temporary files."""
    shutil.rmtree(output / f"{SCRATCH}{shard.suffix}", ignore_errors=True)
    for entry in (output / MODELS).iterdir():
        model = entry.name[1:].rpartition("-")[0].removesuffix("-old")  # `.NAME-xxxx`, `.NAME-old-xxxx`, `.NAME-lock`
        if entry.name.startswith(".") and (names is None or model in names):
            if entry.is_file():
                entry.unlink(missing_ok=True)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def clear(job: Job) -> None:
    """Remove what an earlier attempt of a job left: its log, and an artifact that is not the one to come."""
    Path(job.log).unlink(missing_ok=True)
    shutil.rmtree(job.folder, ignore_errors=True)


def journals(output: Path) -> list[dict[str, Any]]:
    """Entries of all journals in a zoo's folder, of the whole and of shards, in order of time."""
    entries = [entry for file in sorted(output.glob(f"{JOURNAL}*.jsonl")) for entry in read_journal(file)]

    def when(entry: dict[str, Any]) -> float:
        return float(entry["time"]) if isinstance(entry.get("time"), (int, float)) else 0.0

    return sorted(entries, key=when)


def complete_outcomes(jobs: list[Job], entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Outcomes, by name, of the jobs that need not be done again."""
    latest = {entry["name"]: entry for entry in entries}
    complete = {}
    for job in jobs:
        entry = latest.get(job.name)
        if entry is None or entry.get("fingerprint") != job.fingerprint or entry.get("status") not in COMPLETE:
            continue
        if entry["status"] == Status.DONE and artifact_digest(job.folder) != entry.get("sha256"):
            continue
        complete[job.name] = {key: value for key, value in entry.items() if key not in ("name", "fingerprint", "time")}
    return complete


def artifact_digest(folder: Path) -> str | None:
    """SHA-256 over what determines an artifact: manifest, tensors and recipe; None where one of them is missing."""
    digest = hashlib.sha256()
    for name in ARTIFACT_FILES:
        try:
            digest.update(file_digest(folder / name).encode())
        except OSError:
            return None
    return digest.hexdigest()

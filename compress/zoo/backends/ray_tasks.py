"""Tasks of a Ray cluster: the one that is there, or one started on this machine."""

from __future__ import annotations

import logging
import time
from typing import Any

from compress.errors import RecipeError
from compress.zoo.backends.protocol import Event, failure
from compress.zoo.execution import end_at, execute, one_line, use_scratch
from compress.zoo.plan import Job

USABLE_MEMORY = 0.9  # of a node's, that one model may ask for


class RayBackend:
    """Each job is a task with CPU, GPU and memory requests, in a worker process that serves no second task.

    Ray decides when each runs. A cluster that RAY_ADDRESS or this machine names is used, else one is started here
    with `jobs` CPUs. Checkpoints, data and output must be on a file system that its nodes share.

    Raises:
        RecipeError: Ray is not installed.
    """

    def __init__(self, jobs: int) -> None:
        try:
            import ray
        except ImportError:
            raise RecipeError("backend: ray is not installed; `pip install 'compress-networks[ray]'`.") from None
        self._ray = ray
        self._owns = not ray.is_initialized()
        if self._owns:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError:
                ray.init(address="local", num_cpus=jobs, include_dashboard=False, **quiet)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._largest = {kind: max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "memory")}
        self._jobs: dict[Any, tuple[Job, float]] = {}

    @property
    def running(self) -> int:
        """Tasks that were submitted and have not ended."""
        return len(self._jobs)

    def accepts(self, job: Job) -> bool:
        """Always: Ray queues."""
        return True

    def submit(self, job: Job) -> None:
        """Submit one task; requests beyond the largest node are cut to it, so that no task waits for ever."""
        task = self._ray.remote(max_calls=1, max_retries=0)(run_job).options(
            num_cpus=min(job.threads, self._largest["CPU"]),
            num_gpus=1 if job.wants_gpu else 0,
            memory=int(min(job.memory, USABLE_MEMORY * self._largest["memory"])),
            name=job.name,
        )
        self._jobs[task.remote(job)] = (job, time.monotonic())

    def wait(self, seconds: float) -> list[Event]:
        """Outcomes of tasks that ended."""
        if not self._jobs:
            return []
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=seconds)
        return [self._end(reference) for reference in ready]

    def close(self) -> None:
        """Cancel what still runs, and leave the cluster."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        self._jobs.clear()
        if self._owns:
            self._ray.shutdown()

    def _end(self, reference: Any) -> Event:
        job, started = self._jobs.pop(reference)
        seconds = round(time.monotonic() - started, 3)
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.WorkerCrashedError:
            reason = "its process ended before it was done; out of memory, crashed, or killed from outside"
            if job.timeout is not None and seconds >= job.timeout:
                reason = f"it took longer than the {job.timeout:g} seconds that --timeout allows"
            outcome = failure(reason, seconds)
        except self._ray.exceptions.RayError as error:
            outcome = failure(f"Ray could not run it: {one_line(error)[:300]}", seconds)
        return Event(job.name, outcome=outcome)


def run_job(job: Job) -> dict[str, Any]:
    """What a task does."""
    end_at(job.timeout)
    use_scratch(job)
    return execute(job)

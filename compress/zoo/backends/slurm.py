"""Jobs of Slurm through submitit; its local executor runs the same without a cluster."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from compress.zoo.backends.protocol import Event, failure
from compress.zoo.execution import end_at, execute, one_line, use_scratch
from compress.zoo.plan import Job

GRACE_MINUTES = 2  # beyond a model's own time limit, so that it can say why it ended
PENDING_SECONDS = 1.0


class SlurmBackend:
    """Each job is a Slurm job that asks for its threads, memory and, where it computes on one, a GPU.

    Args:
        folder: where submitit keeps its files; nodes must see it, the checkpoints, the data and the output.
        parameters: of submitit's `AutoExecutor.update_parameters`, such as `slurm_partition`; and `cluster`, which
            `local` makes processes of this machine.

    Raises:
        RecipeError: submitit is not installed, there is no Slurm, or a parameter is unknown.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise RecipeError("backend: submitit is not installed; `pip install 'compress-networks[slurm]'`.") from None
        self._submitit = submitit
        self._folder = folder.absolute()
        self._parameters = {name: value for name, value in parameters.items() if name != "cluster"}
        self._cluster = parameters.get("cluster", "slurm")
        self._jobs: dict[str, tuple[Job, Any]] = {}
        try:
            submitit.AutoExecutor(folder=self._folder, cluster=self._cluster).update_parameters(**self._parameters)
        except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
            raise RecipeError(f"slurm: {one_line(error)}.") from None

    @property
    def running(self) -> int:
        """Jobs that were submitted and have not ended."""
        return len(self._jobs)

    def accepts(self, job: Job) -> bool:
        """Always: Slurm queues."""
        return True

    def submit(self, job: Job) -> None:
        """Submit one job."""
        executor = self._submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
        executor.update_parameters(
            **{
                "name": job.name,
                "cpus_per_task": job.threads,
                "mem_gb": math.ceil(job.memory / 2**30),
                "gpus_per_node": 1 if job.wants_gpu else 0,
                "timeout_min": 24 * 60 if job.timeout is None else math.ceil(job.timeout / 60) + GRACE_MINUTES,
                **self._parameters,
            }
        )
        self._jobs[job.name] = (job, executor.submit(run_job, job))

    def wait(self, seconds: float) -> list[Event]:
        """Outcomes of jobs that ended."""
        deadline = time.monotonic() + seconds
        while True:
            ended = [name for name, (_, submitted) in self._jobs.items() if submitted.done()]
            left = deadline - time.monotonic()
            if ended or left <= 0:
                return [self._end(name) for name in ended]
            time.sleep(min(left, PENDING_SECONDS))

    def close(self) -> None:
        """Cancel what still runs."""
        for _, submitted in self._jobs.values():
            with suppress(Exception):  # a scheduler that cannot be reached must not hide why we are closing
                submitted.cancel(check=False)
        self._jobs.clear()

    def _end(self, name: str) -> Event:
        job, submitted = self._jobs.pop(name)
        try:
            outcome = submitted.result()
        except self._submitit.core.utils.FailedJobError as error:
            outcome = failure(f"its job failed: {one_line(error)[:300]}")
        except self._submitit.core.utils.UncompletedJobError as error:
            limit = f" (its limit was {job.timeout:g} seconds)" if job.timeout is not None else ""
            outcome = failure(f"its job ended before it was done{limit}: {one_line(error)[:300]}")
        return Event(name, outcome=outcome)


def run_job(job: Job) -> dict[str, Any]:
    """What a job does."""
    end_at(job.timeout)
    use_scratch(job)
    return execute(job)

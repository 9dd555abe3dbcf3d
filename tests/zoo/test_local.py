"""Models in processes of this machine: one that ends badly ends alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.zoo import run_zoo
from compress.zoo.backends.local import LocalBackend
from compress.zoo.plan import Job, ZooPlan
from compress.zoo.runner import make_jobs
from tests.zoo.models import copies, small_plan, write_misbehaviour


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose module `misbehaviour` the models' processes can import."""
    write_misbehaviour(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_bad_end_is_one_models_own_with_its_reason(misbehaving: Path) -> None:
    (path,) = copies(misbehaving, 1)
    kinds = ("abort", "leave", "killed", "raises", "exhausted")
    entries = [{"name": kind, "checkpoint": path, "arch": f"misbehaviour:{kind}"} for kind in kinds]
    plan = small_plan(misbehaving, [*entries, path], job_memory="1M", jobs=4)
    found = run_zoo(plan)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["net000"]["status"] == "done"
    assert found["exit_code"] == 1
    assert found["counts"] == {"done": 1, "gate failed": 0, "failed": 5}
    for name, words in {
        "abort": "SIGABRT",
        "leave": "exit code 7",
        "killed": "SIGKILL; out of memory, or killed",
        "raises": "first line second line",
        "exhausted": "not enough memory",
    }.items():
        assert words in rows[name]["reason"]
    assert sorted(entry.name for entry in (plan.output / "models").iterdir()) == ["net000"]
    assert not (plan.output / ".scratch").exists()


def test_a_hanging_model_and_what_it_started_end_at_the_timeout(misbehaving: Path) -> None:
    (path,) = copies(misbehaving, 1)
    arguments = {"pids": str(misbehaving / "pids")}
    entry = {"name": "hang", "checkpoint": path, "arch": "misbehaviour:hang", "arch_arg": arguments}
    found = run_zoo(small_plan(misbehaving, [entry], timeout=8))
    assert "longer than the 8 seconds" in found["rows"][0]["reason"]
    pids = [int(pid) for pid in (misbehaving / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_models_end_with_the_runner_however_it_ends_and_do_not_run_its_script(misbehaving: Path) -> None:
    (path,) = copies(misbehaving, 1)
    pids = misbehaving / "pids"
    entry = {"name": "hang", "checkpoint": path, "arch": "misbehaviour:hang", "arch_arg": {"pids": str(pids)}}
    small_plan(misbehaving, [entry])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(misbehaving), *sys.path])}
    script = misbehaving / "script.py"  # without the guard that multiprocessing asks for
    script.write_text("import compress\nprint('run', flush=True)\ncompress.run_zoo(compress.plan_zoo(['zoo.yaml']))\n")
    with (misbehaving / "printed").open("w") as printed:
        runner = subprocess.Popen(
            [sys.executable, str(script)], cwd=misbehaving, env=environment, stdout=printed, stderr=subprocess.DEVNULL
        )
    try:
        deadline = time.monotonic() + 120
        while not (pids.exists() and len(pids.read_text().split()) == 2):
            assert runner.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    assert (misbehaving / "printed").read_text() == "run\n"
    found = [int(pid) for pid in pids.read_text().split()]
    for _ in range(200):
        if not any(alive(pid) for pid in found):
            break
        time.sleep(0.05)
    assert not any(alive(pid) for pid in found)


def jobs_of(plan: ZooPlan) -> list[Job]:
    from compress.zoo import Shard

    return make_jobs(plan, Shard())


def test_memory_and_devices_bound_what_runs_at_once(tmp_path: Path) -> None:
    (path,) = copies(tmp_path, 1)
    entries = [{"name": f"m{k}", "checkpoint": path, "device": "cuda" if k < 2 else "cpu"} for k in range(4)]
    jobs = jobs_of(small_plan(tmp_path, entries, job_memory="10M"))
    backend = LocalBackend(8, memory=25 << 20, devices=1)
    try:
        backend._running["m0"] = type("Running", (), {"job": jobs[0], "device": "0", "deadline": None})  # type: ignore[assignment]
        assert not backend.accepts(jobs[1])  # the one device is taken
        assert backend.accepts(jobs[2])
        backend._running["m2"] = type("Running", (), {"job": jobs[2], "device": None, "deadline": None})  # type: ignore[assignment]
        assert not backend.accepts(jobs[3])  # 30 MiB do not fit 25
        backend._running.clear()
        assert LocalBackend(8, memory=1).accepts(jobs[3])  # alone, one that is too big may try
    finally:
        backend._running.clear()
        backend.close()

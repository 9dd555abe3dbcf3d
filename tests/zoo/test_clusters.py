"""Ray and Slurm's local executor give what local processes give, byte for byte."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zoo.models import copies, small_plan, write_misbehaviour

ARTIFACT = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a zoo file of a good model and one that kills its process, run by local processes."""
    folder = tmp_path_factory.mktemp("clusters")
    write_misbehaviour(folder)
    (path,) = copies(folder, 1)
    entries = [{"name": f"m{k}", "checkpoint": path, "keep": k / 10} for k in (3,)]
    entries.append({"name": "killed", "checkpoint": path, "arch": "misbehaviour:killed"})
    small_plan(folder, entries, threads=1, job_memory="500M", slurm={"cluster": "local"})
    assert compress_zoo(folder, "--output", str(folder / "zoo")).returncode == 1
    return folder


def compress_zoo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`compress zoo` in a process of its own."""
    paths = os.pathsep.join([str(folder), *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, "-m", "compress.cli", "zoo", str(folder / "zoo.yaml"), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_same_artifacts(first: Path, second: Path) -> None:
    """The models' files are the same bytes (a recipe names its own folder, a report its seconds)."""
    for name in ARTIFACT:
        assert (first / "models/m3" / name).read_bytes() == (second / "models/m3" / name).read_bytes()


def outcomes(folder: Path, suffix: str = "") -> dict[str, tuple[str, str]]:
    with (folder / f"summary{suffix}.csv").open(newline="") as file:
        return {row["name"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_tasks_give_the_same_models_and_a_crash_stays_alone(zoo: Path) -> None:
    done = compress_zoo(zoo, "--backend", "ray", "--output", str(zoo / "ray"), "--jobs", "2")
    assert done.returncode == 1, done.stderr
    found = outcomes(zoo / "ray")
    assert [found[name][0] for name in ("m3", "killed")] == ["done", "failed"]
    assert "its process ended before it was done" in found["killed"][1]
    assert_same_artifacts(zoo / "zoo", zoo / "ray")


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
def test_submitit_jobs_give_the_same_models_and_a_crash_stays_alone(zoo: Path) -> None:
    done = compress_zoo(zoo, "--backend", "slurm", "--output", str(zoo / "slurm"))
    assert done.returncode == 1, done.stderr
    found = outcomes(zoo / "slurm")
    assert [found[name][0] for name in ("m3", "killed")] == ["done", "failed"]
    assert "its job" in found["killed"][1]
    assert_same_artifacts(zoo / "zoo", zoo / "slurm")


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
def test_slurm_without_a_cluster_is_one_line(tmp_path: Path) -> None:
    (path,) = copies(tmp_path, 1)
    small_plan(tmp_path, [path])
    done = compress_zoo(tmp_path, "--backend", "slurm", "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: slurm: ")
    assert done.stderr.count("\n") == 1

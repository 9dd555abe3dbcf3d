"""Calibration shared out over two processes (gloo) gives the moments and the kept units of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.api import run
from compress.demo import CHECKPOINT
from compress.recipe import make_recipe

OPTIONS = {
    "checkpoint": str(CHECKPOINT), "data": "digits", "calibration_samples": 300, "batch_size": 64, "keep": 0.5,
}  # fmt: skip

SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from compress.api.running import run
from compress.api.steps.widths import make_problem
from compress.compression.problem import record_all
from compress.recording import record as recording
from compress.recording.sharing import Share, process_group
from compress.preparation import prepare
from compress.progress import SilentProgress
from compress.recipe import Recipe

torch.set_num_threads(1)
recording.COST_SHARE = 0.0  # few positions of each sample, so that which ones are drawn matters
recording.FEWEST_ROWS = 100
folder, options = sys.argv[1], json.loads(sys.argv[2])
recipe = Recipe(**options)
with process_group() as share:
    problem = make_problem(prepare(recipe, SilentProgress(), needs_data=True), recipe)
    shared = record_all(replace(problem, share=share), SilentProgress()).moments
    batches = [number for number in range(len(problem.fitting.sizes())) if share.owns(number)]
    if share.writes:
        whole = record_all(problem, SilentProgress()).moments
        deviations = []
        for name, expected in whole.items():
            for kind in ("fitting", "held_back"):
                pairs = zip(getattr(shared[name], kind), getattr(expected, kind), strict=True)
                for first, second in pairs:
                    assert first.count == second.count
                    for part in ("gram", "cross", "feature_mean", "output_mean"):
                        a, b = getattr(first, part), getattr(second, part)
                        deviations.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
        found = {"ranks": share.count, "batches": batches, "layers": len(whole), "largest": max(deviations)}
        json.dump(found, open(f"{folder}/moments.json", "w"))
    result = run(recipe)
    assert bool(result.report) == share.writes
    assert share.from_first(lambda: share.rank + 7) == 7
    assert share.any(share.rank == 1) and not share.any(False)
    timed = recipe.model_copy(update={"keep": None, "latency": 0.8, "output": recipe.output + "-timed"})
    shapes = [tuple(tensor.shape) for tensor in run(timed).module.state_dict().values()]
    assert shapes == share.from_first(lambda: shapes)
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads  # none is left to end the process while it shuts down
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under torchrun found."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "job.py").write_text(SCRIPT)
    options = json.dumps({**OPTIONS, "output": str(folder / "two")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder / "job.py"), str(folder), options],
        capture_output=True, text=True, env=environment, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_record_the_moments_of_one(shared: Path) -> None:
    found = json.loads((shared / "moments.json").read_text())
    assert found["ranks"] == 2
    assert found["batches"] == [0, 2, 4]  # of 5
    assert found["layers"] > 1
    assert found["largest"] <= 1e-10


def test_two_processes_keep_the_units_of_one_and_write_once(shared: Path, tmp_path: Path) -> None:
    from compress.recording import record as recording

    patch = pytest.MonkeyPatch()
    patch.setattr(recording, "COST_SHARE", 0.0)
    patch.setattr(recording, "FEWEST_ROWS", 100)
    try:
        run(make_recipe({**OPTIONS, "output": str(tmp_path / "one")}))
    finally:
        patch.undo()
    kept = [json.loads((folder / "config.json").read_text())["kept"] for folder in (shared / "two", tmp_path / "one")]
    assert kept[0] == kept[1]
    first, second = (load_file(folder / "model.safetensors") for folder in (shared / "two", tmp_path / "one"))
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)


def test_one_process_has_everything() -> None:
    from compress.recording.sharing import Share, process_group

    with process_group() as share:
        assert share == Share(0, 1)
        assert all(share.owns(number) for number in range(5))

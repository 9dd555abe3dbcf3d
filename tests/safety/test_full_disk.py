"""A disk that fills up in the middle of a run: one line, exit code 1, nothing left. A limit on file sizes stands in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compress.demo import DEMO_OPTIONS

LIMITED = """
import resource, signal, sys
from compress.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [2_000, 60_000])
@pytest.mark.parametrize("state", [(), ("resume",)])
def test_a_full_disk_ends_a_run_in_one_line_and_leaves_nothing_half_written(
    limit: int, state: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [str(DEMO_OPTIONS["checkpoint"]), "--data", "digits", "--calibration-samples", "60"]
    arguments += ["--selection", "magnitude", "--macs", "0.5"] if state else ["--keep", "0.5"]
    arguments += [f"--{'resume' if state else 'output'}", str(out)]
    command = [sys.executable, "-c", LIMITED, str(limit), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    faults = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1, done.stderr
    assert len(faults) == 1
    assert "Traceback" not in done.stderr
    assert not out.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"out.state"}
    if state:
        again = subprocess.run(
            [sys.executable, "-m", "compress.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert again.returncode == 0, again.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

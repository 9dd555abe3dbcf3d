"""What the runner does and does not do again, with a backend that does as the test says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import InterruptionError, OutputError
from compress.zoo import Shard, ZooPlan, run_zoo
from tests.zoo.models import QUICK, ScriptedBackend, copies, small_plan

FAILED = {"status": "failed", "exit_code": 1, "reason": "because"}
GATE = {"status": "gate failed", "exit_code": 3, "reason": "0.3 points"}


def three(folder: Path) -> ZooPlan:
    """Three models that differ in their width."""
    (path,) = copies(folder, 1)
    return small_plan(folder, [{"name": f"m{k}", "checkpoint": path, "keep": k / 10} for k in (1, 2, 3)])


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [({}, 0), ({"m2": GATE}, 3), ({"m2": FAILED}, 1), ({"m1": GATE, "m2": FAILED}, 1)],
)
def test_the_exit_code_says_the_worst(tmp_path: Path, outcomes: dict[str, Any], code: int) -> None:
    found = run_zoo(three(tmp_path), ScriptedBackend(outcomes))
    assert found["exit_code"] == code
    assert sum(found["counts"].values()) == 3


def test_resume_does_again_what_failed_and_nothing_else(tmp_path: Path) -> None:
    plan = three(tmp_path)
    run_zoo(plan, ScriptedBackend({"m1": FAILED, "m2": GATE}))
    again = ScriptedBackend()
    found = run_zoo(plan, again, resume=True)
    assert again.submitted == ["m1"]
    assert found["counts"] == {"done": 2, "gate failed": 1, "failed": 0}
    assert found["rows"][1]["reason"] == "0.3 points"


def test_without_resume_an_earlier_run_is_refused(tmp_path: Path) -> None:
    plan = three(tmp_path)
    run_zoo(plan, ScriptedBackend())
    with pytest.raises(OutputError, match="give --resume"):
        run_zoo(plan, ScriptedBackend())


def test_a_folder_that_is_no_zoo_is_left_alone(tmp_path: Path) -> None:
    plan = three(tmp_path)
    plan.output.mkdir()
    (plan.output / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="holds no zoo"):
        run_zoo(plan, ScriptedBackend())
    assert [path.name for path in plan.output.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_an_artifact_that_is_not_as_written_is_made_again(tmp_path: Path, damage: str) -> None:
    plan = three(tmp_path)
    run_zoo(plan, ScriptedBackend())
    model = plan.output / "models/m2/model.safetensors"
    model.write_text("other") if damage == "change" else model.unlink()
    again = ScriptedBackend()
    run_zoo(plan, again, resume=True)
    assert again.submitted == ["m2"]


def test_changed_options_a_changed_checkpoint_and_changed_data_are_new_models(tmp_path: Path) -> None:
    path, other = copies(tmp_path, 2)
    data = tmp_path / "data.npz"
    data.write_bytes(b"first")

    def plan(**changed: Any) -> ZooPlan:
        return small_plan(tmp_path, [{"name": "m", "checkpoint": path, "data": f"npz:{data}", **changed}])

    def redone(plan: ZooPlan) -> bool:
        backend = ScriptedBackend()
        run_zoo(plan, backend, resume=True)
        return backend.submitted == ["m"]

    assert redone(plan())
    assert not redone(plan())
    assert not redone(plan(checkpoint=other))  # the same bytes elsewhere
    assert redone(plan(keep=0.4))
    data.write_bytes(b"second")
    assert redone(plan(keep=0.4))
    Path(path).write_bytes(b"x")
    assert redone(plan(keep=0.4))


def test_equal_inputs_are_run_once_and_copied(tmp_path: Path) -> None:
    copies(tmp_path, 3)
    backend = ScriptedBackend()
    plan = small_plan(tmp_path, [str(tmp_path / "*.safetensors")])
    found = run_zoo(plan, backend)
    assert backend.submitted == ["net000"]
    assert [row["same_as"] for row in found["rows"]] == [None, "net000", "net000"]
    texts = {(plan.output / "models" / name / "model.safetensors").read_text() for name, _ in plan.models}
    assert len(texts) == 1
    idle = ScriptedBackend()
    run_zoo(plan, idle, resume=True)
    assert idle.submitted == []


def test_a_twin_of_a_model_that_was_complete_before_is_copied(tmp_path: Path) -> None:
    path, other = copies(tmp_path, 2)
    run_zoo(small_plan(tmp_path, [path]), ScriptedBackend())
    backend = ScriptedBackend()
    found = run_zoo(small_plan(tmp_path, [path, other]), backend, resume=True)
    assert backend.submitted == []
    assert found["rows"][1]["same_as"] == "net000"


def test_shards_in_one_folder_are_gathered_by_resume(tmp_path: Path) -> None:
    plan = three(tmp_path)
    for index in (1, 2):
        run_zoo(plan, ScriptedBackend(), shard=Shard(index, 2))
    assert json.loads((plan.output / "summary-1-of-2.json").read_text())["models"] == 2
    last = ScriptedBackend()
    found = run_zoo(plan, last, resume=True)
    assert last.submitted == []
    assert found["counts"]["done"] == 3


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    plan = three(tmp_path)
    run_zoo(plan, ScriptedBackend())
    for remains in (".m1-abc", ".m2-old-abc", ".gone-abc"):
        (plan.output / "models" / remains).mkdir()
    (plan.output / ".scratch/m1").mkdir(parents=True)
    run_zoo(plan, ScriptedBackend(), resume=True)
    assert sorted(path.name for path in (plan.output / "models").iterdir()) == ["m1", "m2", "m3"]
    assert not (plan.output / ".scratch").exists()


def test_an_earlier_artifact_does_not_stand_in_for_a_failed_model(tmp_path: Path) -> None:
    (path,) = copies(tmp_path, 1)
    run_zoo(small_plan(tmp_path, [path]), ScriptedBackend())
    plan = small_plan(tmp_path, [path], defaults={**QUICK, "keep": 0.1})
    run_zoo(plan, ScriptedBackend({"net000": GATE}), resume=True)
    assert not (plan.output / "models/net000").exists()


def test_the_summaries_have_a_row_for_every_model_and_show_nothing_as_code(tmp_path: Path) -> None:
    plan = three(tmp_path)
    reason = "=HYPERLINK(1) <script>alert(1)</script>"
    run_zoo(plan, ScriptedBackend({"m1": {**FAILED, "reason": reason}}))
    with (plan.output / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["status"]) for row in rows] == [("m1", "failed"), ("m2", "done"), ("m3", "done")]
    assert rows[0]["reason"].startswith("'=")
    page = (plan.output / "index.html").read_text()
    assert "<script>alert" not in page
    assert 'href="models/m2/report.html"' in page
    assert json.loads((plan.output / "summary.json").read_text())["rows"][0]["reason"] == reason


def test_ctrl_c_closes_the_backend_and_says_how_to_go_on(tmp_path: Path) -> None:
    class Broken(ScriptedBackend):
        def wait(self, seconds: float) -> Any:
            raise KeyboardInterrupt

    backend = Broken()
    with pytest.raises(InterruptionError, match="0 of 3 models are complete") as caught:
        run_zoo(three(tmp_path), backend)
    assert backend.closed
    assert caught.value.exit_code == 130

"""action.yml and the examples for CI systems: they parse, their commands and options exist, the action's steps run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.cli.app import load_command
from compress.cli.catalogue import COMMANDS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "ci"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def commands_in(text: str) -> list[list[str]]:
    """The words of every `compress …` in a script, line by line."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines() if "compress" in line]
    return [words[1:] for words in lines if words and Path(words[0]).name == "compress"]


def all_scripts() -> dict[str, str]:
    """Every script of the examples."""
    gitlab, hook = read(EXAMPLES / "gitlab-ci.yml"), read(EXAMPLES / "pre-commit-config.yaml")
    workflow = read(EXAMPLES / "github-workflow.yml")
    return {
        "gitlab": "\n".join(gitlab["compress"]["script"]),
        "pre-commit": hook["repos"][0]["hooks"][0]["entry"],
        "workflow": "\n".join(step["run"] for step in workflow["jobs"]["compress"]["steps"] if "run" in step),
        "action": read(ROOT / "action.yml")["runs"]["steps"][1]["run"].splitlines()[-1].strip(),
    }


@pytest.mark.parametrize("name", ["gitlab", "pre-commit", "workflow", "action"])
def test_every_command_and_option_of_the_examples_exists(name: str) -> None:
    found = commands_in(all_scripts()[name])
    assert found
    for command, *words in found:
        assert command in COMMANDS
        options = {option for parameter in load_command(command).params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_the_workflow_gives_the_action_inputs_that_it_has_and_all_that_it_needs() -> None:
    inputs = read(ROOT / "action.yml")["inputs"]
    steps = read(EXAMPLES / "github-workflow.yml")["jobs"]["compress"]["steps"]
    given = next(step["with"] for step in steps if step.get("id") == "compress")
    assert set(given) <= set(inputs)
    assert {name for name, one in inputs.items() if one.get("required")} <= set(given)


def test_no_input_of_the_action_is_pasted_into_a_script() -> None:
    for step in read(ROOT / "action.yml")["runs"]["steps"]:
        assert "${{" not in step.get("run", "")


def run_step(place: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """The action's main step, as the runner would run it."""
    action = read(ROOT / "action.yml")
    inputs = {**{name: one.get("default", "") for name, one in action["inputs"].items()}, **given}
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "compress")
    variables = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: inputs[match[1]], value)
        for name, value in step["env"].items()
    }
    program = place / "compress" / "bin" / "compress"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m compress.cli "$@"\n')
    program.chmod(0o755)
    own = {"RUNNER_TEMP": str(place), "GITHUB_OUTPUT": str(place / "o"), "GITHUB_STEP_SUMMARY": str(place / "s")}
    environment = {**os.environ, **variables, **own, "PYTHONPATH": str(ROOT)}
    script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(script, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_the_action_runs_its_gates_and_fills_in_the_outputs_that_it_declares(tmp_path: Path) -> None:
    given = {
        "checkpoint": str(ROOT / "compress/demo/digits.safetensors"),
        "data": "digits",
        "eval": "digits?train=false",
        "arguments": "--keep 0.5 --calibration-samples 300",
        "output": "an output",
    }
    done = run_step(tmp_path, **given, **{"max-drop": "5", "min-reduction": "2x macs:1.5x"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "an output" / "report.html").is_file()
    outputs = re.findall(r"^([\w-]+)<<", (tmp_path / "o").read_text(), re.M)
    assert set(outputs) == set(read(ROOT / "action.yml")["outputs"])


def test_every_dependency_has_the_lower_bound_that_the_lowest_row_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pattern,) = re.findall(r'fullmatch\(r"(.+?)", line\)', (ROOT / ".ci/lowest").read_text())
    assert all(re.fullmatch(pattern, line) for line in project["dependencies"])
    assert len(project["dependencies"]) >= 10


def test_the_scripts_of_ci_are_shell_that_parses_and_can_be_run() -> None:
    for name in ("run", "portability", "lowest", "release"):
        path = ROOT / ".ci" / name
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_an_input_that_looks_like_a_command_stays_text(tmp_path: Path) -> None:
    done = run_step(tmp_path, checkpoint="$(touch canary); `touch canary`.pt", data="digits; touch canary")
    assert done.returncode == 1
    assert not (tmp_path / "canary").exists()

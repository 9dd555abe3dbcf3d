"""What a program calls and what the command line calls: run, inspect, evaluate, demo."""

from __future__ import annotations

from compress.api.evaluating import evaluate
from compress.api.inspecting import inspect
from compress.api.running import RunResult, demo_recipe, run
from compress.api.widths import make_problem

__all__ = ["RunResult", "demo_recipe", "evaluate", "inspect", "make_problem", "run"]

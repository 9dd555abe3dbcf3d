"""What a program calls and what the command line calls: run, inspect, evaluate, verify, export, compare, demo."""

from __future__ import annotations

from compress.api.evaluating import evaluate
from compress.api.exporting import export
from compress.api.inspecting import inspect
from compress.api.plateau import plateau
from compress.api.reporting import compare, rebuild_report
from compress.api.running import RunResult, demo_recipe, run
from compress.api.verifying import verify
from compress.api.widths import make_problem

__all__ = [
    "RunResult",
    "compare",
    "demo_recipe",
    "evaluate",
    "export",
    "inspect",
    "make_problem",
    "plateau",
    "rebuild_report",
    "run",
    "verify",
]

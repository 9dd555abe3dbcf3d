"""A function a command, for programs and for the command line: each opens, calls one stage after another, returns."""

from __future__ import annotations

from compress.api.balancing import balance
from compress.api.diagnosing import doctor
from compress.api.evaluating import evaluate
from compress.api.exporting import export
from compress.api.finetuning import FinetuneResult, finetune
from compress.api.inspecting import inspect
from compress.api.plateau import plateau
from compress.api.pruning import PruneResult, prune
from compress.api.reporting import compare, rebuild_report
from compress.api.running import RunResult, demo_recipe, run
from compress.api.training import TrainResult, train
from compress.api.verifying import verify

__all__ = [
    "FinetuneResult",
    "PruneResult",
    "RunResult",
    "TrainResult",
    "balance",
    "compare",
    "demo_recipe",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "plateau",
    "prune",
    "rebuild_report",
    "run",
    "train",
    "verify",
]

"""Where Torch-Pruning's dependency graph lists more parameters than can be cut here: does its own cut run?

    python -m benchmarks.coverage_peer [--only PART,...]

Each network of `coverage` that is behind in the share of prunable parameters is halved by Torch-Pruning's magnitude
pruner (heads declared, the network's output layer left alone) and called once; beside it what our cut leaves.
`--quick`: two networks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from typing import Any

from benchmarks.coverage_models import build_model, scramble
from benchmarks.reporting import start

BEHIND = (
    *("timm:resmlp_12_224", "timm:gmlp_ti16_224", "timm:edgenext_xx_small", "timm:pvt_v2_b0", "timm:nf_resnet26"),
    "video:mvit_v1_b",
)
QUICK = BEHIND[:2]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="comma-separated parts of the names to run")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def main() -> int:
    found = start("coverage_peer", __doc__, add_options=options)
    if found.options.one:
        print(json.dumps(halve(found.options.one)))
        return 0
    wanted = found.options.only
    names = QUICK if found.quick else [n for n in BEHIND if not wanted or any(p in n for p in wanted.split(","))]
    rows = [(name, *attempt(name)) for name in names]
    found.table("Torch-Pruning's half cut", ("network", "parameters left", "forward"), rows)
    failed = sum(outcome != "runs" for _, _, outcome in rows)
    found.goal(
        f"cuts-of-the-peer-that-fail, of {len(rows)}", failed / len(rows), 0.5, at_least=True,
        note="where its graph lists more than ours, its own cut does not run",
    )  # fmt: skip
    return found.finish()


def attempt(name: str) -> tuple[float | None, str]:
    """(share of the parameters left, "runs" or the fault) of one network, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage_peer", "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return None, "not done after 300 s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines()
    if done.returncode:
        return None, lines[-1] if lines else f"process ended with {done.returncode}"
    result: dict[str, Any] = json.loads(lines[-1])
    return result["left"], result["outcome"]


def halve(name: str) -> dict[str, Any]:
    """Torch-Pruning's cut of one network, then one call of what is left."""
    import torch
    import torch_pruning

    warnings.simplefilter("ignore")
    module, inputs = build_model(name)
    scramble(module)
    before = sum(parameter.numel() for parameter in module.parameters())
    last = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)][-1]
    heads = {
        layer.qkv: layer.num_heads
        for layer in module.modules()
        if hasattr(layer, "qkv") and hasattr(layer, "num_heads")
    }
    outcome = "runs"
    try:
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        torch_pruning.pruner.MagnitudePruner(
            module, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=[last], num_heads=heads
        ).step()
        with torch.no_grad():
            module(*inputs)
    except Exception as fault:  # the peer fails in many ways; its failure is the result
        outcome = f"{type(fault).__name__}: {str(fault).splitlines()[0][:90]}"
    return {"left": sum(parameter.numel() for parameter in module.parameters()) / before, "outcome": outcome}


if __name__ == "__main__":
    raise SystemExit(main())

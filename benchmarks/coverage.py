"""Which networks can be cut, how much of them, and whether what comes out equals the masked original.

For every network (random weights): groups found, units, share of the parameters that belong to prunable groups (inner
widths alone, and with the coupled residual streams) beside the share in Torch-Pruning's dependency graph; a random half
of the units of every group removed; the narrowed network at two batch sizes against the masked original in float32 and
float64; saved and rebuilt in a fresh process. Each network runs in a process of its own, with a time limit; times are
processor time of one thread.

    python -m benchmarks.coverage --journal FILE     resumes: networks already in FILE are not run again
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.coverage_models import QUICK, build_model, model_names, scramble
from benchmarks.reporting import start

_PEER_SECONDS = 30
_DOUBLE_LIMIT = 120_000_000  # parameters up to which float64 is run too


def main() -> int:
    """Run the rows that the journal lacks, print the table and the goals."""
    if len(sys.argv) > 2 and sys.argv[1] == "--one":
        print(json.dumps(measure_model(sys.argv[2], Path(sys.argv[3]))))
        return 0
    if len(sys.argv) > 2 and sys.argv[1] == "--reload":
        print(json.dumps({folder: reload_deviation(Path(folder)) for folder in sys.argv[2:]}))
        return 0
    run = start("coverage", __doc__, add_options=_add_options)
    names = list(QUICK) if run.quick else model_names()
    if run.options.only:
        names = [name for name in names if any(part in name for part in run.options.only.split(","))]
    if run.options.shard:
        part, _, parts = run.options.shard.partition("/")
        names = names[int(part) - 1 :: int(parts)]
    run.say(f"{len(names)} networks" + (" (the quick subset: " + ", ".join(names) + ")" if run.quick else ""))
    if run.options.show:
        written = {json.loads(line)["name"] for line in run.options.journal.read_text().splitlines()}
        missing = [name for name in names if name not in written]
        run.say(f"not run: {', '.join(missing) or 'none'}")
        names = [name for name in names if name in written]
    rows = _collect(names, run.options.journal, run.options.timeout)
    run.table("Coverage", _HEADER, [_cells(row) for row in rows])
    reasons: dict[str, int] = {}
    for row in rows:
        for reason, count in row.get("skipped", {}).items():
            reasons[reason] = reasons.get(reason, 0) + count
    top = sorted(reasons.items(), key=lambda entry: -entry[1])[:20]
    run.table("Why groups are skipped (with the streams coupled)", ("reason", "groups"), top)
    faults = [(row["name"], row["error"][:160]) for row in rows if row.get("error")]
    if faults:
        run.table("Networks that failed", ("network", "fault"), faults)
    _state_goals(run, rows)
    return run.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--journal", type=Path, help="append results to this JSONL file and resume from it")
    parser.add_argument("--show", action="store_true", help="run nothing: the tables of what the journal holds")
    parser.add_argument("--only", help="comma-separated parts of the names to run")
    parser.add_argument("--shard", help="I/N: every N-th network, from the I-th (journals can be joined)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one network")


def _collect(names: list[str], journal: Path | None, timeout: float) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    if journal is not None and journal.exists():
        for line in journal.read_text().splitlines():
            row = json.loads(line)
            known[row["name"]] = row
    with tempfile.TemporaryDirectory() as scratch:
        waiting: list[tuple[dict[str, Any], Path]] = []
        for name in [name for name in names if name not in known]:
            folder = Path(scratch) / name.replace(":", "-")
            folder.mkdir()
            row = _run_child(["--one", name, str(folder)], timeout)
            known[name] = {"name": name, **row}
            if (folder / "plan.json").exists():
                waiting.append((known[name], folder))
            else:
                _write(journal, known[name])
            if len(waiting) >= 4:
                _reload_all(waiting, journal)
                waiting = []
        _reload_all(waiting, journal)
    return [known[name] for name in names]


def _reload_all(waiting: list[tuple[dict[str, Any], Path]], journal: Path | None) -> None:
    if not waiting:
        return
    found = _run_child(["--reload", *(str(folder) for _, folder in waiting)], 600.0)
    for row, folder in waiting:
        row["reload"] = found.get(str(folder), found.get("error"))
        _write(journal, row)
        for file in folder.iterdir():
            file.unlink()


def _write(journal: Path | None, row: dict[str, Any]) -> None:
    if journal is not None:
        with journal.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _run_child(arguments: list[str], timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1] if lines else f"process ended with {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_model(name: str, folder: Path) -> dict[str, Any]:
    """One row: analysis, surgery and comparison of one network; what a reload needs is left in `folder`."""
    import torch
    from safetensors.torch import save_file

    from compress.errors import CompressError
    from compress.graph.trace import trace_network
    from compress.units.find import find_units
    from compress.units.surgery import module_outputs, narrow, verify_narrowed

    warnings.simplefilter("ignore")
    module, inputs = build_model(name)
    scramble(module)
    total = sum(parameter.numel() for parameter in module.parameters())
    row: dict[str, Any] = {"parameters": total}
    tiny = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 2))
    find_units(trace_network(tiny, (torch.randn(2, 2),)), tiny)  # what is imported and filled once is in no row's time
    begin = time.process_time()
    try:
        graph = trace_network(module, inputs)
    except CompressError as fault:
        return {**row, "error": str(fault)}
    row["export_seconds"] = time.process_time() - begin
    row["batch"] = "any" if graph.batch_size is None else graph.batch_size
    begin = time.process_time()
    inner = find_units(graph, module)
    row["analysis_seconds"] = time.process_time() - begin
    groups = find_units(graph, module, couple=True)
    row.update(groups=sum(group.prunable for group in groups), inner_groups=sum(group.prunable for group in inner))
    row["units"] = sum(group.unit_count for group in groups if group.prunable)
    row["inner_share"], row["share"] = (_share(module, found, total) for found in (inner, groups))
    skipped: dict[str, int] = {}
    for group in groups:
        if group.skip_reason is not None:
            reason = group.skip_reason.partition(" in ")[0].partition(" (")[0].partition(" part of ")[0]
            skipped[reason] = skipped.get(reason, 0) + 1
    row["skipped"] = skipped
    row["peer_share"] = _peer_share(module, inputs, groups, total)
    generator = torch.Generator().manual_seed(2)
    for label, found in (("inner_", inner), ("", groups)):
        kept = {
            group.name: torch.randperm(group.unit_count, generator=generator)[: group.unit_count // 2].sort().values
            for group in found
            if group.prunable
        }
        narrowed = narrow(module, kept, found)
        row[f"{label}left"] = sum(parameter.numel() for parameter in narrowed.module.parameters()) / total
        row[f"{label}float32"] = verify_narrowed(graph, module, kept, found, narrowed, inputs, tolerance=1e9)
    if total <= _DOUBLE_LIMIT:
        row["float64"] = verify_narrowed(graph, module, kept, groups, narrowed, inputs, dtype=torch.float64)
    state = {key: value.clone() for key, value in narrowed.module.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    output = module_outputs(narrowed.module, inputs)[0]
    torch.save((inputs, output), folder / "expected.pt")
    plan = {"name": name, "shapes": narrowed.shapes, "attributes": narrowed.attributes}
    (folder / "plan.json").write_text(json.dumps(plan))
    return row


def reload_deviation(folder: Path) -> float | str:
    """Build the original class anew, give it the stored shapes and weights, and compare its output."""
    import torch
    from safetensors.torch import load_file

    from compress.checkpoint.fitting import with_versions
    from compress.checkpoint.restoring import restore_shapes
    from compress.units.surgery import module_outputs, relative_deviation

    try:
        plan = json.loads((folder / "plan.json").read_text())
        module, _ = build_model(plan["name"])
        restore_shapes(module, plan["shapes"], plan["attributes"])
        module.load_state_dict(with_versions(module, load_file(folder / "model.safetensors")))
        inputs, expected = torch.load(folder / "expected.pt")
        return relative_deviation([expected], [module_outputs(module, inputs)[0]])
    except (RuntimeError, ValueError, OSError, KeyError) as fault:
        return f"{type(fault).__name__}: {str(fault).splitlines()[0]}"


def _give_up(number: int, frame: object) -> None:
    raise TimeoutError


def _share(module: Any, groups: Any, total: int) -> float:
    names = {part.name for group in groups if group.prunable for part in group.slices}
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    return sum(size for name, size in sizes.items() if name in names) / total


def _peer_share(module: Any, inputs: Any, groups: Any, total: int) -> float | str:
    """Share of the parameters in the groups of Torch-Pruning's dependency graph, the network's outputs left alone."""
    import torch_pruning
    from torch import nn

    producers = {
        name for group in groups if "output of the network" in (group.skip_reason or "") for name in group.producers
    }
    modules = dict(module.named_modules())
    ignored = [modules[name] for name in producers if name in modules]
    found: dict[int, int] = {}
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_PEER_SECONDS)
    try:
        peer = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=inputs, verbose=False)
        for group in peer.get_all_groups(ignored_layers=ignored):
            for dependency, _ in group:
                target = dependency.target.module
                if isinstance(target, nn.Parameter):
                    found[id(target)] = target.numel()
                    continue
                outward = "out" in dependency.handler.__name__
                for leaf, parameter in target.named_parameters():
                    if outward or not leaf.endswith("bias"):
                        found[id(parameter)] = parameter.numel()
    except Exception as fault:  # the peer fails in many ways; its failure is the result
        return f"{type(fault).__name__}"
    finally:
        signal.alarm(0)
    return sum(found.values()) / total


_HEADER = (
    *("network", "params, M", "groups", "units", "share inner", "share coupled", "Torch-Pruning", "params left"),
    *("float32", "float64", "reload", "export, CPU s", "analysis, CPU s", "skipped"),
)


def _cells(row: dict[str, Any]) -> list[Any]:
    if "groups" not in row:
        return [row["name"], row.get("parameters", 0) / 1e6, *[None] * 11, row.get("error", "")[:80]]
    return [
        row["name"],
        row["parameters"] / 1e6,
        row["groups"],
        row["units"],
        *(row[key] for key in ("inner_share", "share", "peer_share", "left", "float32")),
        row.get("float64"),
        row.get("reload"),
        row["export_seconds"],
        row["analysis_seconds"],
        sum(row["skipped"].values()),
    ]


def _state_goals(run: Any, rows: list[dict[str, Any]]) -> None:
    from_file = [row for row in rows if "groups" in row]
    exported = [row for row in rows if "groups" in row or "torch.export" not in row.get("error", "")]
    fine = [row for row in from_file if row["float32"] <= 1e-4 and row["inner_float32"] <= 1e-4]
    double = [row for row in from_file if "float64" in row]
    classifiers = [row for row in rows if row["name"].startswith("torchvision:")]
    passed = [row for row in classifiers if row in fine and row.get("reload") == 0]
    run.goal("classifiers-of-torchvision-that-pass", len(passed), len(classifiers), at_least=True)
    run.goal("networks-that-pass", len([row for row in fine if row.get("reload") == 0]), len(exported), at_least=True)
    run.goal("networks-equal-to-1e-4-in-float32", len(fine), len(exported), at_least=True)
    run.goal(
        "networks-equal-to-1e-9-in-float64", sum(row["float64"] <= 1e-9 for row in double), len(double), at_least=True
    )
    compared = [row for row in from_file if isinstance(row["peer_share"], float)]
    ahead = [row for row in compared if row["share"] >= row["peer_share"] - 1e-3]
    note = ", ".join(row["name"] for row in compared if row not in ahead)
    run.goal(
        "networks-with-at-least-the-peer's-share",
        len(ahead),
        len(compared),
        at_least=True,
        note=f"behind: {note}" if note else "",
    )
    largest = sorted(from_file, key=lambda row: -row["parameters"])[:10]
    ratio = sum(row["analysis_seconds"] for row in largest) / max(1e-9, sum(row["export_seconds"] for row in largest))
    run.goal("analysis-time-over-export-time-of-the-10-largest", ratio, 0.5)


if __name__ == "__main__":
    raise SystemExit(main())

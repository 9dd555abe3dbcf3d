"""What a run writes down about itself."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.api.cutting import Cut
from compress.api.widths import describe_rule
from compress.artifact.checksums import write_checksums
from compress.artifact.exports.writing import EXPORTS, write_export
from compress.artifact.folder import (
    REPORT_JSON,
    REPORT_PAGE,
    REPORT_TEXT,
    check_reload,
    versions,
    write_artifact,
    write_json,
)
from compress.atomic import new_folder
from compress.compression.problem import Problem
from compress.errors import CompressError, OutputError, UnsupportedError
from compress.measures.outputs import named_outputs
from compress.preparation import Opened, Prepared
from compress.progress import Progress, Stages
from compress.recipe import Recipe, format_recipe
from compress.report.html import render_report
from compress.report.markdown import markdown_report

RELOAD_TOLERANCE = 1e-5
EXPORT_SAMPLES = 64


def describe_inputs(prepared: Prepared, recipe: Recipe, problem: Problem) -> dict[str, Any]:
    """What went in: file, architecture, data, options."""
    calibration = prepared.calibration
    assert calibration is not None, "a run needs data"
    return {
        "checkpoint": {
            "file": Path(recipe.checkpoint).name,
            "sha256": prepared.checkpoint.sha256,
            "state_key": prepared.checkpoint.state_key,
            "prefix": prepared.checkpoint.prefix,
            "dtype": str(prepared.checkpoint.dtype).removeprefix("torch."),
        },
        "architecture": {
            "spec": prepared.architecture.spec,
            "arguments": prepared.architecture.arguments,
            "recognised": prepared.architecture.how,
            "input_shape": list(prepared.probe.shape[1:]),
            "input_dtype": str(prepared.probe.dtype).removeprefix("torch."),
            "batch_size": prepared.network.batch_size,
        },
        "data": {
            "calibration": {
                "source": recipe.data,
                "samples": problem.fitting.count,
                "held_back": problem.held_back.count,
                "fingerprint": calibration.fingerprint,
            },
            "evaluation": None
            if prepared.evaluation is None
            else {
                "source": recipe.eval,
                "samples": prepared.evaluation.sample_count,
                "fingerprint": prepared.evaluation.fingerprint,
                "overlap": prepared.overlapping,
            },
            "preprocessing": None if prepared.preprocessing is None else prepared.preprocessing.as_dict(),
        },
        "recipe": recipe.model_dump(mode="json", exclude={"output", "force", "export"}),
        "rule": describe_rule(recipe),
        "seed": recipe.seed,
    }


def fingerprint(prepared: Prepared, recipe: Recipe, problem: Problem) -> dict[str, Any]:
    """What a run's intermediate results depend on, by contents, not by paths. Plain data."""
    paths = {"checkpoint", "data", "eval", "output", "force", "trust_code"}
    found = describe_inputs(prepared, recipe, problem)
    evaluation = found["data"]["evaluation"]
    return {
        "model": prepared.checkpoint.sha256,
        "calibration data": found["data"]["calibration"]["fingerprint"],
        "evaluation data": None if evaluation is None else evaluation["fingerprint"],
        **{name: value for name, value in recipe.model_dump(mode="json").items() if name not in paths},
        "versions": versions(),
    }


def write_run(
    folder: Path,
    recipe: Recipe,
    prepared: Prepared,
    cut: Cut,
    report: dict[str, Any],
    clock: Stages,
    progress: Progress,
) -> None:
    """Write the artifact beside its final place, reload it in a fresh process, then put it in place."""
    progress.stage("writing and reloading")
    config = {
        **{name: report[name] for name in ("checkpoint", "architecture", "data", "seed", "versions")},
        **describe_cut(prepared.opened, cut),
        "outputs": [output.as_report() for output in prepared.outputs],
        "certificates": {layer["name"]: layer["lasso"] for layer in report["layers"] if layer.get("lasso") is not None},
        "hashes": {"checkpoint": prepared.checkpoint.sha256},
    }
    with torch.inference_mode():
        expected = named_outputs(cut.narrowed.module(prepared.probe))
    faults: list[CompressError] = []
    with new_folder(folder, force=recipe.force) as draft, tempfile.TemporaryDirectory() as scratch:
        manifest = write_artifact(draft, cut.stored, config, {"recipe.yaml": format_recipe(recipe)})
        report["verification"]["reload_deviation"] = check_reload(
            draft, prepared.probe, expected, RELOAD_TOLERANCE, Path(scratch)
        )
        report["exports"] = []
        for kind in recipe.export:
            progress.stage(f"exporting {kind}")
            try:
                report["exports"].append(export_one(kind, draft, report, prepared, cut))
            except (UnsupportedError, OutputError) as error:
                faults.append(error)
                report["notes"].append(f"not exported to {kind}: {error}")
        report["hashes"] = manifest["hashes"]
        report["seconds"] = clock.seconds
        write_report(draft, report)
        write_checksums(draft)
    if faults:
        reasons = " ".join(str(fault) for fault in faults)
        raise type(faults[0])(f"The compressed network was written to {str(folder)!r}, but not every export: {reasons}")


def describe_cut(before: Opened, cut: Cut) -> dict[str, Any]:
    """Shapes, attributes and kept units against a freshly built original, whatever was cut from it before."""
    kept = {name: list(units) for name, units in before.kept.items()}
    for name, units in cut.kept.items():
        own = units.tolist()
        kept[name] = [kept[name][unit] for unit in own] if name in kept else own
    return {
        "shapes": {**before.shapes, **cut.narrowed.shapes},
        "attributes": {**before.attributes, **cut.narrowed.attributes},
        "kept": kept,
    }


def export_one(kind: str, draft: Path, report: Mapping[str, Any], prepared: Prepared, cut: Cut) -> dict[str, Any]:
    """One export of the artifact in `draft`, compared on evaluation samples (calibration samples where there are none).

    Raises:
        UnsupportedError: the network has no such form; no file is left.
        OutputError: the file gives other outputs; no file is left.
    """
    source = prepared.evaluation or prepared.calibration
    assert source is not None, "a run needs data"
    samples = next(iter(source.batches(EXPORT_SAMPLES, torch.arange(min(EXPORT_SAMPLES, source.sample_count))))).inputs
    module = copy.deepcopy(cut.narrowed.module).cpu()
    try:
        return write_export(kind, draft, report, module, samples, only_batch=prepared.network.batch_size)
    except CompressError:
        target = draft / EXPORTS[kind]
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        raise


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`, `report.md` and `report.html` into a folder."""
    write_json(folder / REPORT_JSON, report)
    (folder / REPORT_TEXT).write_text(markdown_report(report), encoding="utf-8")
    (folder / REPORT_PAGE).write_text(render_report(report), encoding="utf-8")

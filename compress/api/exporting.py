"""Further formats of an artifact that a run wrote."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.api.evaluating import open_evaluation
from compress.api.reporting import read_any_report, write_pages
from compress.api.verifying import find_examples
from compress.api.writing import first_samples
from compress.arithmetic import reproducible
from compress.artifact.checksums import check_checksums, write_checksums
from compress.artifact.exports import EXPORTS, check_exports, write_exports
from compress.artifact.folder import write_json
from compress.atomic import new_file
from compress.checkpoint.manifest import CHECKSUMS, CONFIG, MODEL, open_artifact
from compress.errors import OutputError, RecipeError
from compress.progress import Progress, SilentProgress
from compress.report.model import ExportReport, plain_data


@dataclass(frozen=True)
class Exported:
    """Where further formats were written, and one report for each."""

    folder: str
    exports: tuple[ExportReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return plain_data(self)


@reproducible()
def export(
    folder: str | Path,
    kinds: Sequence[str],
    eval_data: str | None = None,
    *,
    arch: str | None = None,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write an artifact in further formats into its own folder, and note them in its report.

    Args:
        kinds: of `onnx`, `pt2` and `hf`.
        eval_data: data whose first samples the files are compared on; without it, seeded noise.
        arch, trust_code: as of `open_artifact`.

    Raises:
        CompressError: any fault; the folder is left as it was.
    """
    progress = progress or SilentProgress()
    folder = Path(folder)
    kinds = tuple(dict.fromkeys(kinds))
    if not kinds:
        raise RecipeError(f"export: name at least one of {', '.join(EXPORTS)}.")
    check_exports(kinds)
    report = read_any_report(folder)
    changed = [name for name, status in check_checksums(folder).items() if status in ("changed", "missing")]
    if changed:
        raise OutputError(f"{changed[0]} was changed after it was written; `compress verify` tells more.")
    artifact, module = open_artifact(folder, arch=arch, trust_code=trust_code)
    if eval_data is None:
        samples = find_examples(artifact, module, "cpu")
    else:
        samples = first_samples(open_evaluation(artifact, module, eval_data))
    only_batch = artifact.config["architecture"].get("batch_size")
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
            place = Path(scratch)
            for name in (MODEL, CONFIG):
                shutil.copyfile(folder / name, place / name)
            progress.stage("exporting")
            exports = write_exports(kinds, place, report, module, samples, only_batch=only_batch, arch=arch)
            for kind in kinds:
                put(place / EXPORTS[kind], folder / EXPORTS[kind])
    except OSError as error:
        raise OutputError(f"Cannot write to {str(folder)!r}: {error.strerror or error}.") from None
    report = report.with_exports(exports)
    with new_file(folder / report.FILE) as draft:
        write_json(draft, report.to_json())
    write_pages(folder, report)
    if (folder / CHECKSUMS).is_file():
        write_checksums(folder)
    return Exported(str(folder), tuple(exports))


def put(made: Path, target: Path) -> None:
    """Move a finished file or folder to its place, in the place of an older one."""
    if target.is_dir():
        shutil.rmtree(target)
    made.replace(target)

"""JSON schemas of the reports, as files beside this one: `python -m compress.report.schema` writes them anew."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from compress.report.model import Report, RunReport, TrainingReport, adapter

KINDS: tuple[type[Report], ...] = (RunReport, TrainingReport)
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_name(kind: type[Report]) -> str:
    """The file that one kind of report is described in."""
    return kind.FILE.replace(".json", ".schema.json")


def make_schema(kind: type[Report]) -> dict[str, Any]:
    """The JSON schema of what one kind of report is written as."""
    return {"$schema": DIALECT, **adapter(kind).json_schema(mode="serialization")}


def schema_text(kind: type[Report]) -> str:
    """The content of its file."""
    return json.dumps(make_schema(kind), indent=2, ensure_ascii=False) + "\n"


def write_schemas(folder: Path) -> list[Path]:
    """Write the schemas of both kinds of report into a folder; returns their paths."""
    paths = []
    for kind in KINDS:
        paths.append(folder / schema_name(kind))
        paths[-1].write_text(schema_text(kind), encoding="utf-8")
    return paths


def schema_folder() -> Path:
    """Where the schemas lie in this package."""
    return Path(str(resources.files("compress.report"))) / "schemas"


if __name__ == "__main__":
    for path in write_schemas(schema_folder()):
        print(path)

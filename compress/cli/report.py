"""`compress report`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from compress.cli.app import app


@app.command("report")
def report_command(folder: Annotated[str, Argument(help="Folder written by a run.", show_default=False)]) -> None:
    """Rebuild `report.html` and `report.md` from `report.json`: `compress report OUT`."""
    from compress.api.reporting import rebuild_report

    for path in rebuild_report(folder):
        print(path)

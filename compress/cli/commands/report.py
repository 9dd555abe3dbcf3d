"""`compress report`."""

from __future__ import annotations

from compress.cli.options import Folder


def report_command(folder: Folder) -> None:
    """Rebuild `report.html` and `report.md` from `report.json`: `compress report OUT`."""
    from compress.api.reporting import rebuild_report

    for path in rebuild_report(folder):
        print(path)

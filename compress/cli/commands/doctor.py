"""`compress doctor`."""

from __future__ import annotations

from compress.cli.options import Json, print_json


def doctor_command(as_json: Json = False) -> None:
    """Print what a bug report needs: `compress doctor`. It names no path and no host."""
    from compress.api import doctor
    from compress.cli.showing.display import show_findings
    from compress.cli.showing.progress import StderrProgress

    with StderrProgress() as progress:
        findings = doctor(progress)
    if as_json:
        print_json(findings)
    else:
        show_findings(findings)

"""`compress compare`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from compress.cli.options import Json, print_json


def compare_command(
    folders: Annotated[list[str], Argument(metavar="FOLDER...", help="Folders written by runs.", show_default=False)],
    html: Annotated[str | None, Option(metavar="FILE", help="Also write the comparison as one HTML page.")] = None,
    as_json: Json = False,
) -> None:
    """Put runs side by side: `compress compare OUT1 OUT2 --html compare.html`."""
    from compress.api.reporting import compare
    from compress.cli.showing.display import show_comparison

    comparison = compare(folders, html)
    if as_json:
        print_json(comparison.to_json())
    else:
        show_comparison(comparison)
        if html:
            print(f"written to {html}")

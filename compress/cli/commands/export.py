"""`compress export`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from compress.cli.options import Folder, Json, print_json
from compress.cli.takes import OPTIONS


def export_command(
    folder: Folder,
    to: Annotated[list[str], Option(metavar="onnx|pt2|hf", help="The format; give it again for more.")],
    eval_data: Annotated[
        str | None, Option("--eval", metavar="DATA", help="Data to compare the files on; else seeded noise.")
    ] = None,
    arch: Annotated[
        str | None, Option(metavar="ARCH", help="Your package.module:factory, for the one that the folder names.")
    ] = None,
    trust_code: Annotated[bool, Option("--trust-code", help=OPTIONS["trust_code"].help)] = False,
    as_json: Json = False,
) -> None:
    """Write an artifact in other formats, each checked: `compress export OUT --to onnx --eval test.npz`."""
    from compress.api import export
    from compress.cli.showing.display import show_exports
    from compress.cli.showing.progress import StderrProgress

    with StderrProgress() as progress:
        exported = export(folder, to, eval_data, arch=arch, trust_code=trust_code, progress=progress)
    if as_json:
        print_json(exported.to_json())
    else:
        show_exports(exported.folder, exported.exports)

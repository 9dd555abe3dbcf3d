"""What `python -m compress` would import from the working directory, where a stranger's `torch.py` may lie."""

from __future__ import annotations

import os
import sys


def leave_working_directory(package: str) -> None:
    """Take the working directory, which `python -m` puts first, off the module path, before anything else is imported.

    It stays where the package itself lies in it (a checkout), and what the user names is still found
    (`data.importing`).

    Args:
        package: folder of this package.
    """
    here = os.getcwd()
    if sys.argv[:1] == ["-m"] and sys.path[:1] == [here] and os.path.dirname(package) != here:
        del sys.path[0]

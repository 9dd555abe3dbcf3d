"""`python -m compress.cli …` is `compress …`."""

from compress.__main__ import entry

entry()
